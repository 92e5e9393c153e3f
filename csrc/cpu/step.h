// One step of a loop over (B, T)-sized tensors: a whole vector, or the n elements that are left;
// and sums over fixed blocks in float64, so that a result depends neither on the threads nor on an
// offset.
#pragma once
#include "simd.h"

namespace rlhf_kernels {

// Elements per partial sum. Fixed: it sets the order of the sums.
inline constexpr int64_t kSumBlock = 4096;

namespace RK_SIMD {

template <class V, class T>
RK_HD V load_step(const T* p, int n) {
  return n == lanes<V> ? load(p) : load(p, n, 0.0);
}
template <class V, class T>
RK_HD void store_step(T* p, V x, int n) {
  n == lanes<V> ? store(p, x) : store(p, x, n);
}

// The first n lanes.
RK_HD bool first_lanes(int n, double) { return n > 0; }
RK_HD vint first_lanes(int n, vfloat) {
  vint lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < n;
}

// Which of the n elements from i are valid: bytes of a mask, or all where there is no mask.
RK_HD bool valid_step(const bool* mask, int64_t i, int, double) { return !mask || mask[i]; }
RK_HD vint valid_step(const bool* mask, int64_t i, int n, vfloat) {
  if (!mask) return first_lanes(n, vfloat{});
  if (n < kLanes) return load_mask(mask + i, n, vfloat{});
#if defined(RK_SIMD_avx512)
  return (vint)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(mask + i))) != 0;
#elif defined(RK_SIMD_avx2)
  return (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(mask + i))) != 0;
#else
  return load_mask(mask + i, kLanes, vfloat{});
#endif
}

// kLanes numbers of float64, in two vectors of the width that the processor has. Conversions are
// intrinsics where there are any: GCC 12 takes __builtin_convertvector apart.
typedef double vhalf __attribute__((vector_size(4 * kLanes)));
struct vdouble {
  vhalf low, high;
};
RK_HD vdouble operator+(vdouble a, vdouble b) { return {a.low + b.low, a.high + b.high}; }
RK_HD vdouble operator-(vdouble a, vdouble b) { return {a.low - b.low, a.high - b.high}; }
RK_HD vdouble operator*(vdouble a, vdouble b) { return {a.low * b.low, a.high * b.high}; }
RK_HD void operator+=(vdouble& a, vdouble b) { a = a + b; }
RK_HD void operator-=(vdouble& a, vdouble b) { a = a - b; }

RK_HD double widen(double x) { return x; }
RK_HD vdouble widen(vfloat x) {
#if defined(RK_SIMD_avx512)
  const __m512 v = (__m512)x;
  return {(vhalf)_mm512_cvtps_pd(_mm512_castps512_ps256(v)),
          (vhalf)_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
#elif defined(RK_SIMD_avx2)
  const __m256 v = (__m256)x;
  return {(vhalf)_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
          (vhalf)_mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
#else
  vdouble y;
  for (int i = 0; i < kLanes / 2; ++i) y.low[i] = x[i], y.high[i] = x[kLanes / 2 + i];
  return y;
#endif
}
RK_HD double narrow(double x) { return x; }
RK_HD vfloat narrow(vdouble x) {
#if defined(RK_SIMD_avx512)
  return (vfloat)_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)x.low)),
                                    _mm512_cvtpd_ps((__m512d)x.high), 1);
#elif defined(RK_SIMD_avx2)
  return (vfloat)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps((__m256d)x.low)),
                                      _mm256_cvtpd_ps((__m256d)x.high), 1);
#else
  vfloat y;
  for (int i = 0; i < kLanes / 2; ++i) y[i] = float(x.low[i]), y[kLanes / 2 + i] = float(x.high[i]);
  return y;
#endif
}
using rlhf_kernels::sum_lanes;
RK_HD double sum_lanes(vdouble x) {
  const vhalf pairs = x.low + x.high;
  double sum = 0;
  for (int i = 0; i < kLanes / 2; ++i) sum += pairs[i];
  return sum;
}
template <class V>
using Wide = decltype(widen(V{}));
template <class V>
RK_HD Wide<V> wide(double x) {  // one number in every lane
  if constexpr (lanes<V> == 1)
    return x;
  else
    return {x + vhalf{}, x + vhalf{}};
}

// sums[K * block + k], for the blocks [begin, end) of n elements: add(i, count, acc) adds what the
// `count` elements from i contribute to the K sums.
template <int K, class V, class Add>
static void sum_blocks(int64_t n, double* sums, int64_t begin, int64_t end, Add add) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kSumBlock, last = n < first + kSumBlock ? n : first + kSumBlock;
    Wide<V> acc[K] = {};
    for (int64_t i = first; i < last; i += lanes<V>) add(i, RK_STEP(V, last, i), acc);
    for (int k = 0; k < K; ++k) sums[K * block + k] = sum_lanes(acc[k]);
  }
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include "common.h"

namespace rlhf_kernels {

// Runs sum_kernel(partial sums, first block, last block) on all threads; the K sums, in block
// order.
template <int K, class Kernel>
std::vector<double> reduce_blocks(int64_t n, Kernel sum_kernel) {
  const int64_t blocks = (n + kSumBlock - 1) / kSumBlock;
  std::vector<double> partial(K * blocks), sums(K, 0.0);
  torch::stable::parallel_for(
      0, blocks, rows_per_thread(kSumBlock),
      [&](int64_t begin, int64_t end) { sum_kernel(partial.data(), begin, end); });
  for (int64_t i = 0; i < K * blocks; ++i) sums[i % K] += partial[i];
  return sums;
}

// A tensor without dimensions that holds x.
inline Tensor scalar(double x, ScalarType type) {
  Tensor y = empty({}, type);
  if (type == ScalarType::Double)
    *static_cast<double*>(y.mutable_data_ptr()) = x;
  else
    *static_cast<float*>(y.mutable_data_ptr()) = static_cast<float>(x);
  return y;
}

// A float64 tensor of one dimension.
inline Tensor vector_of(std::initializer_list<double> values) {
  Tensor y = empty({static_cast<int64_t>(values.size())}, ScalarType::Double);
  std::memcpy(y.mutable_data_ptr(), values.begin(), values.size() * sizeof(double));
  return y;
}

inline double value_of(const Tensor& one, int64_t i = 0) {
  return one.scalar_type() == ScalarType::Double
             ? static_cast<const double*>(one.const_data_ptr())[i]
             : static_cast<const float*>(one.const_data_ptr())[i];
}

// x times the number `by`: the backward of a loss whose forward has written its gradient.
inline Tensor scaled(const Tensor& x_in, const Tensor& by) {
  const ScalarType type = x_in.scalar_type();
  const Tensor x = dense(x_in, type);
  Tensor y = empty_as(x, type);
  const auto scale = [&](auto one) {
    using T = decltype(one);
    const T factor = static_cast<T>(value_of(dense(by, type)));
    const T* from = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    for (int64_t i = 0, n = x.numel(); i < n; ++i) to[i] = from[i] * factor;
  };
  type == ScalarType::Double ? scale(double{}) : scale(float{});
  return y;
}

}  // namespace rlhf_kernels
#endif
