// One SIMD vector of floats, with the names that csrc/math formulas use. Included once per level.
//
// Written on the compilers' vector extension (GCC, Clang: x86, Arm, ...): the widths differ between
// the levels, the code does not. The few intrinsics are what the extension cannot say.
// Included first, before any formula (see below why).
// No torch and no STL here or in any kernel: see csrc/math/scalar.h on weak symbols.
#pragma once
#include <cstdint>
#include <cstring>

#include "level.h"
#include "math/scalar.h"
#include "types.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rlhf_kernels {

namespace RK_SIMD {

#if defined(RK_SIMD_avx512)
inline constexpr int kLanes = 16;
#elif defined(RK_SIMD_avx2)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vshort __attribute__((vector_size(2 * kLanes)));

// Lanes of V, and the V that a stored type T is computed in: double stays scalar, as it exists for
// checks against the truth, not for speed.
template <class V>
inline constexpr int lanes = 1;
template <>
inline constexpr int lanes<vfloat> = kLanes;
template <class T>
struct Compute {
  using V = vfloat;
  using Scalar = float;
};
template <>
struct Compute<double> {
  using V = double;
  using Scalar = double;
};

}  // namespace RK_SIMD

template <>
struct Splat<RK_SIMD::vfloat> {
  RK_HD RK_SIMD::vfloat of(double x) { return RK_SIMD::vfloat{} + static_cast<float>(x); }
};

// These overloads stand beside the scalar ones, and before any formula is read: built-in vector
// types have no namespace of their own in which a template would look for them later.
using RK_SIMD::kLanes;
using RK_SIMD::vfloat;
using RK_SIMD::vint;
using RK_SIMD::vshort;
using RK_SIMD::vuint;

RK_HD vfloat select(vint condition, vfloat a, vfloat b) { return condition ? a : b; }
RK_HD bool any(vint condition) {
  int32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= condition[i];
  return all != 0;
}

#if defined(RK_SIMD_avx512)
RK_HD vfloat max(vfloat a, vfloat b) { return (vfloat)_mm512_max_ps((__m512)a, (__m512)b); }
RK_HD vfloat min(vfloat a, vfloat b) { return (vfloat)_mm512_min_ps((__m512)a, (__m512)b); }
RK_HD vfloat fma(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(RK_SIMD_avx2)
RK_HD vfloat max(vfloat a, vfloat b) { return (vfloat)_mm256_max_ps((__m256)a, (__m256)b); }
RK_HD vfloat min(vfloat a, vfloat b) { return (vfloat)_mm256_min_ps((__m256)a, (__m256)b); }
RK_HD vfloat fma(vfloat a, vfloat b, vfloat c) {
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
RK_HD vfloat max(vfloat a, vfloat b) { return a > b ? a : b; }
RK_HD vfloat min(vfloat a, vfloat b) { return a < b ? a : b; }
RK_HD vfloat fma(vfloat a, vfloat b, vfloat c) { return a * b + c; }
#endif

RK_HD vfloat abs(vfloat x) { return (vfloat)((vint)x & 0x7fffffff); }

// Lane i gets lane i + N of (x, y). Intrinsics: GCC makes the indices anew at every use.
#if defined(RK_SIMD_avx512) || defined(RK_SIMD_avx2)
inline constexpr int32_t kFromZero[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                        11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                        22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
#endif
template <int N>
RK_HD vfloat later_lanes(vfloat x, vfloat y) {
#if defined(RK_SIMD_avx512)
  const __m512i from = _mm512_loadu_si512(kFromZero + N);
  return (vfloat)_mm512_permutex2var_ps((__m512)x, from, (__m512)y);
#elif defined(RK_SIMD_avx2)
  const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFromZero + N));
  const __m256 in_y = _mm256_castsi256_ps(_mm256_cmpgt_epi32(from, _mm256_set1_epi32(7)));
  return (vfloat)_mm256_blendv_ps(_mm256_permutevar8x32_ps((__m256)x, from),
                                  _mm256_permutevar8x32_ps((__m256)y, from), in_y);
#elif defined(__clang__)
  return __builtin_shufflevector(x, y, N, N + 1, N + 2, N + 3);
#else
  return __builtin_shuffle(x, y, vint{N, N + 1, N + 2, N + 3});
#endif
}

// ---- loads and stores
// ------------------------------------------------------------------------------

RK_HD double load(const double* p) { return *p; }
RK_HD vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
RK_HD vfloat load(const bf16* p) {
  vshort v;
  std::memcpy(&v, p, sizeof v);
  return (vfloat)(__builtin_convertvector(v, vuint) << 16);
}
RK_HD vfloat load(const f16* p) {
#if defined(RK_SIMD_avx512)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(RK_SIMD_avx2)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
// The first n lanes from memory, the others set.
RK_HD double load(const double* p, int, double) { return *p; }
template <class T>
RK_HD vfloat load(const T* p, int n, double other) {
  vfloat v = splat<vfloat>(other);
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}

RK_HD void store(double* p, double x) { *p = x; }
RK_HD void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }
RK_HD void store(bf16* p, vfloat v) {
  const vuint u = (vuint)v;
  const vuint rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vshort s = __builtin_convertvector(
      (vuint)((v != v) ? (vint)(vuint{} + 0x7fc0u) : (vint)rounded), vshort);
  std::memcpy(p, &s, sizeof s);
}
RK_HD void store(f16* p, vfloat v) {
#if defined(RK_SIMD_avx512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(RK_SIMD_avx2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) from_float(p + i, v[i]);
#endif
}
RK_HD void store(double* p, double x, int) { *p = x; }
template <class T>
RK_HD void store(T* p, vfloat v, int n) {
  for (int i = 0; i < n; ++i) from_float(p + i, v[i]);
}

// Masks are bytes (bool); lanes past n are false.
RK_HD bool load_mask(const bool* p, int, double) { return *p; }
RK_HD vint load_mask(const bool* p, int n, vfloat) {
  vint m{};
  for (int i = 0; i < n; ++i) m[i] = -static_cast<int32_t>(p[i]);
  return m;
}

// ---- reductions over the lanes, in a fixed order
// ------------------------------------------------------

RK_HD double sum_lanes(double x) { return x; }
RK_HD double sum_lanes(vfloat v) {
  double s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}
RK_HD double max_lanes(double x) { return x; }
RK_HD float max_lanes(vfloat v) {  // a NaN may get lost: whoever needs it finds it in the sum
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// ---- exp, expm1, log, log1p
// --------------------------------------------------------------------------

// e^r = 1 + r + r^2 q(r) on |r| <= ln 2 / 2; q fitted for the least relative error of e^r: 3.1e-9.
RK_HD vfloat exp_q(vfloat r) {
  vfloat q = fma(r, splat<vfloat>(1.3814598788e-3), splat<vfloat>(8.3687165752e-3));
  q = fma(r, q, splat<vfloat>(4.1668388993e-2));
  q = fma(r, q, splat<vfloat>(0.16666521132));
  return fma(r, q, splat<vfloat>(0.49999994040));
}

// x = n ln 2 + r; n is a whole number. ln 2 in two parts keeps r exact to the last place.
RK_HD vfloat split_ln2(vfloat x, vfloat* r) {
  const vfloat magic = splat<vfloat>(0x1.8p23);  // adding it rounds to a whole number
  const vfloat n = fma(x, splat<vfloat>(1.4426950408889634), magic) - magic;
  *r = fma(n, splat<vfloat>(-0x1.62e4p-1), x);
  *r = fma(n, splat<vfloat>(-1.4286068203094172321e-6), *r);
  return n;
}

// 2^n for whole n in [-126, 127]
RK_HD vfloat exp2_whole(vfloat n) {
  return (vfloat)((__builtin_convertvector(n, vint) + 127) << 23);
}

// e^x for x <= 88, flushed to 0 below the normal range (-87.3); -inf gives 0, NaN gives NaN.
RK_HD vfloat exp_flush(vfloat x) {
  vfloat r;
  const vfloat n = split_ln2(max(splat<vfloat>(-88.0), x), &r);
  const vfloat y = fma(r * r, exp_q(r), r) + 1.0f;
#if defined(RK_SIMD_avx512)
  return select(x < -87.33654f, vfloat{}, (vfloat)_mm512_scalef_ps((__m512)y, (__m512)n));
#else
  return select(x < -87.33654f, vfloat{}, y * exp2_whole(n));
#endif
}
RK_HD double exp_flush(double x) { return ::exp(x); }

// e^x in full: overflow to inf, gradual underflow, NaN.
RK_HD vfloat exp(vfloat x) {
  vfloat r;
  const vfloat n = split_ln2(min(splat<vfloat>(89.0), max(splat<vfloat>(-105.0), x)), &r);
  const vfloat y = fma(r * r, exp_q(r), r) + 1.0f;
#if defined(RK_SIMD_avx512)
  return (vfloat)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  const vfloat half = __builtin_convertvector(__builtin_convertvector(n, vint) >> 1, vfloat);
  return y * exp2_whole(half) * exp2_whole(n - half);
#endif
}

RK_HD vfloat expm1(vfloat x) {
  return select(abs(x) < 0.34f, fma(x * x, exp_q(x), x), exp(x) - 1.0f);
}

// log u for normal u > 0: u = 2^k m, m in [sqrt 1/2, sqrt 2); log m = 2 atanh f, f = (m - 1) / (m +
// 1).
RK_HD vfloat log_positive(vfloat u) {
  const vint k = ((vint)u - 0x3f3504f3) >> 23;
  const vfloat m = (vfloat)((vint)u - (k << 23));
  const vfloat f = (m - 1.0f) / (m + 1.0f), f2 = f * f;
  vfloat s = fma(f2, splat<vfloat>(1.0 / 9), splat<vfloat>(1.0 / 7));
  s = fma(f2, s, splat<vfloat>(1.0 / 5));
  s = fma(f2, s, splat<vfloat>(1.0 / 3));
  const vfloat n = __builtin_convertvector(k, vfloat);
  const vfloat log_m = fma(f * f2 * 2.0f, s, f * 2.0f);
  return fma(n, splat<vfloat>(0x1.62e4p-1), fma(n, splat<vfloat>(1.4286068203094172321e-6), log_m));
}

// log(1 + x) for 0 <= x < inf: what is lost in rounding 1 + x is put back to first order.
RK_HD vfloat log1p(vfloat x) {
  const vfloat u = x + 1.0f;
  return log_positive(u) + (x - (u - 1.0f)) / u;
}

}  // namespace rlhf_kernels

// The number of elements in one step of a loop over n elements at i.
#define RK_STEP(V, n, i) ((n) - (i) < lanes<V> ? static_cast<int>((n) - (i)) : lanes<V>)

#define RK_INLINE __attribute__((always_inline))
