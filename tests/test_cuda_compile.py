"""The CUDA library as CMake builds it, for 8.0 and 9.0a: no spills, bounded registers, 128-bit
global loads, every symbol exported by a library that it names, and loading without a GPU.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from rlhf_kernels.backend import LOADED

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a")
LIBRARY = "librlhf_kernels_cuda.so"
# cmake may come from pip into an environment that is not activated.
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
REGISTERS = 128  # of a thread, of 65536 in a multiprocessor: two blocks of 256 threads fit
# Kernels that read no vector: a few numbers for each row.
SCALAR = ("token_logprob_join_kernel", "surrogate_kernel")


def cuobjdump() -> str | None:
    """The disassembler of the toolkit, or the one that Triton brings along."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


def usage(report: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) -> what ptxas -v says of it."""
    found = {}
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, architecture, *numbers in re.findall(pattern, report, re.DOTALL):
        keys = ("stack", "stores", "loads", "registers")
        found[name, architecture] = dict(zip(keys, map(int, numbers), strict=True))
    return found


def wide_loads(tool: str, target: Path) -> dict[tuple[str, str], int]:
    """(kernel, architecture) -> its 128-bit loads from global memory, async copies included."""
    sass = subprocess.run([tool, "--dump-sass", str(target)], capture_output=True, text=True)
    assert sass.returncode == 0, sass.stderr
    found, architecture, name = {}, "", ""
    for line in sass.stdout.splitlines():
        if match := re.match(r"\s*code for sm_(\w+)", line):
            architecture = match[1].rstrip("a")
        elif match := re.match(r"\s*Function : (\w+)", line):
            name = match[1]
            found[name, architecture] = 0
        elif re.search(r"\b(LDG|LDGSTS)\.\S*128", line):
            found[name, architecture] += 1
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """The folder of the build, and what ptxas reports. One process builds it for all."""
    if shutil.which(os.environ.get("NVCC", "nvcc")) is None:
        pytest.skip("there is no nvcc")
    if shutil.which("cmake", path=PATH) is None:
        pytest.skip("there is no cmake")
    shared = tmp_path_factory.getbasetemp().parent
    folder, log = shared / "cuda_library", shared / "cuda_library.log"
    with (shared / "cuda_library.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            compile_library(folder, log)
    return folder, log.read_text()


def compile_library(folder: Path, log: Path) -> None:
    """Configure and compile as setup.py does, with a report of every kernel."""
    environment = os.environ | {
        "PATH": PATH,
        "RLHF_KERNELS_CUDA": "1",
        "RLHF_KERNELS_CUDA_ARCH": ";".join(f"{a[0]}.{a[1:]}" for a in ARCHITECTURES),
        "CUDAFLAGS": "-Xptxas=-v",
    }
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release"]
    text = ""
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(folder), *options],
        ["cmake", "--build", str(folder), "--target", "rlhf_kernels_cuda", "--parallel", "2"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        text += done.stdout + done.stderr
        assert done.returncode == 0, text[-4000:]
    log.write_text(text)


def test_cuda_kernels_do_not_spill(built):
    kernels = usage(built[1])
    sources = [path.read_text() for path in SOURCES]
    wanted = {
        name
        for text in sources
        for name in re.findall(r"__global__ void .*?\b(\w+_kernel)\(", text, re.DOTALL)
    }
    for architecture in ARCHITECTURES:
        names = [name for name, a in kernels if a == architecture]
        assert wanted and all(any(kernel in name for name in names) for kernel in wanted)
    for key, used in kernels.items():
        assert used["stack"] == used["stores"] == used["loads"] == 0, (key, used)
        assert used["registers"] <= REGISTERS, (key, used)


def test_cuda_kernels_load_16_bytes_at_once(built):
    folder, report = built
    tool = cuobjdump()
    if tool is None:
        pytest.skip("there is no cuobjdump")
    loads = wide_loads(tool, folder / LIBRARY)
    assert loads.keys() == {(name, a.rstrip("a")) for name, a in usage(report)}
    for (name, architecture), count in loads.items():
        if not any(kernel in name for kernel in SCALAR):
            assert count > 0, f"{name} for {architecture} has no 128-bit load"


def symbols(library: Path, which: str) -> set[str]:
    """The dynamic symbols of a library, with their versions; weak ones may be undefined."""
    command = ["nm", "--dynamic", "--with-symbol-versions", which, str(library)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found = (line.split()[-2:] for line in lines)
    return {name.replace("@@", "@") for kind, name in found if which[2] == "d" or kind == "U"}


def named_libraries(library: Path, *folders: Path) -> dict[str, Path]:
    """What the library names, by soname, and where the loader finds it beside torch."""
    environment = os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(map(str, folders))}
    command = ["ldd", str(library)]
    text = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
    found = dict(re.findall(r"^\s*(\S+) => (/\S+)", text, re.MULTILINE))
    found |= {Path(path).name: path for path in re.findall(r"^\s*(/\S+) \(", text, re.MULTILINE)}
    command = ["readelf", "--dynamic", "--wide", str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: Path(found[name]) for name in re.findall(r"\(NEEDED\).*\[(.+)\]", text)}


def test_cuda_library_names_what_exports_its_symbols(built):
    """torch loads libtorch_cuda for itself alone: a library that does not name it does not load."""
    if not all(map(shutil.which, ("nm", "ldd", "readelf"))):
        pytest.skip("there are no nm, ldd and readelf")
    folder, _ = built
    torch_folder, stub = Path(torch.__file__).parent / "lib", folder / "stub"
    named = named_libraries(folder / LIBRARY, torch_folder, stub)
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= named.keys()
    exported = {name for path in named.values() for name in symbols(path, "--defined-only")}
    missing = symbols(folder / LIBRARY, "--undefined-only") - exported
    assert not missing, f"exported by none of {', '.join(named)}: {sorted(missing)}"
    # A CPU-only torch has no libtorch_cuda: what its stub exports has to be torch's own interface.
    header = torch_folder.parent / "include/torch/csrc/inductor/aoti_torch/c/shim.h"
    declared = set(re.findall(r"\baoti_torch_\w+(?=\()", header.read_text()))
    (library,) = stub.glob("libtorch_cuda.so")
    assert {x for x in symbols(library, "--defined-only") if x.startswith("aoti")} <= declared


# A CPU-only torch that says it had CUDA, as on a laptop or a login node.
REPORT = """
import sys, torch
torch.version.cuda = "13.0"
from rlhf_kernels.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("found", [True, False], ids=["loads", "does not load"])
def test_a_built_library_is_no_gpu(built, tmp_path, found):
    """Loaded without a GPU: no error. Built and not loaded: an error, with its first cause."""
    if torch.version.cuda or torch.cuda.is_available():
        pytest.skip("this is about a torch without CUDA, which has no libtorch_cuda of its own")
    package = tmp_path / "rlhf_kernels"
    ignore = shutil.ignore_patterns("__pycache__", "librlhf_kernels_cuda.*")
    shutil.copytree(ROOT / "rlhf_kernels", package, ignore=ignore)
    shutil.copy(built[0] / LIBRARY, package)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    if found:
        environment["LD_LIBRARY_PATH"] = str(built[0] / "stub")
    command = [sys.executable, "-c", REPORT]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == (0 if found else 1), done.stdout + done.stderr
    (row, *_) = (x.split() for x in done.stdout.splitlines() if " token_logprob " in x)
    assert row[-2:] == (["loaded", "[2]"] if found else ["no", "[2]"]), done.stdout
    if found:
        assert f"[2] {LOADED}\n" in done.stdout and "does not load" not in done.stderr
        assert done.stdout.endswith("all checks passed\n")
        return
    cause = f"{LIBRARY} does not load: libtorch_cuda.so: cannot open shared object file"
    assert f"[2] {cause}" in done.stdout and f"RuntimeWarning: {cause}" in done.stderr
    assert done.stdout.endswith("a check FAILED\n")
