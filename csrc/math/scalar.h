// What the formulas in csrc/math are written with, for scalar values: select, fma, max, min, exp,
// ...
//
// A formula is a template over its value type V: float or double here (and on the GPU), or a SIMD
// vector of floats (csrc/cpu/simd.h gives the same names for it). So each formula exists once.
// All functions are always inlined with internal linkage: a weak copy compiled for AVX-512 must not
// end up in the code that an older processor runs.
#pragma once
#include <cmath>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define RK_HD static __host__ __device__ __forceinline__
#else
#define RK_HD static inline __attribute__((always_inline))
#endif

namespace rlhf_kernels {

template <class V>
struct Splat {  // one number in every lane
  RK_HD V of(double x) { return static_cast<V>(x); }
};
template <class V>
RK_HD V splat(double x) {
  return Splat<V>::of(x);
}

RK_HD float select(bool condition, float a, float b) { return condition ? a : b; }
RK_HD double select(bool condition, double a, double b) { return condition ? a : b; }
// a > b ? a : b, so a NaN in b is returned and a NaN in a is not: keep what may be NaN in b.
RK_HD float max(float a, float b) { return a > b ? a : b; }
RK_HD double max(double a, double b) { return a > b ? a : b; }
RK_HD float min(float a, float b) { return a < b ? a : b; }
RK_HD double min(double a, double b) { return a < b ? a : b; }
RK_HD float abs(float x) { return ::fabsf(x); }
RK_HD double abs(double x) { return ::fabs(x); }
RK_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
RK_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }
RK_HD float exp(float x) { return ::expf(x); }
RK_HD double exp(double x) { return ::exp(x); }
RK_HD float expm1(float x) { return ::expm1f(x); }
RK_HD double expm1(double x) { return ::expm1(x); }
RK_HD float log1p(float x) { return ::log1pf(x); }
RK_HD double log1p(double x) { return ::log1p(x); }
RK_HD bool any(bool condition) { return condition; }

}  // namespace rlhf_kernels
