// Python module _C: how this build was made. The kernels are in libraries that know no Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "level.h"

namespace py = pybind11;
using namespace pybind11::literals;

static py::dict build_info() {
  return py::dict("version"_a = RK_VERSION, "compiler"_a = RK_COMPILER, "flags"_a = RK_FLAGS,
                  "simd_levels"_a = RK_LEVELS,
                  "simd"_a = rlhf_kernels::level_name(rlhf_kernels::level()),
                  "cuda_architectures"_a = RK_CUDA_ARCHITECTURES, "stable_abi"_a = RK_STABLE_ABI);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of rlhf_kernels.";
  m.def("build_info", &build_info,
        "Compiler, flags, SIMD levels built and in use, CUDA architectures, stable-ABI target.");
}
