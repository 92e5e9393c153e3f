// One row of a softmax in one read: max, sum of exponentials and, for the entropy, sum of s e^s.
#pragma once
#include "simd.h"

namespace rlhf_kernels {

// Of s = (z - max) * scale: sum = sum e^s, dot = sum s e^s (where asked for).
struct Softmax {
  double max, sum, dot;
};

namespace RK_SIMD {

RK_HD vfloat at_least(vfloat x, double low) { return max(splat<vfloat>(low), x); }  // keeps NaN
RK_HD double at_least(double x, double low) { return max(low, x); }

// Elements between two looks at the maximum; fixes the order of the sums. 8 KiB of float32: a block
// that has to be done again is still in the first-level cache.
inline constexpr int64_t kBlock = 2048;
inline constexpr int kUnroll = 4;

template <class V>
struct BlockSums {
  V max, sum, dot;
};

template <bool kDot, class V, class T>
RK_HD void softmax_step(V z, V shift, V scale, BlockSums<V>* acc) {
  const V s = (z - shift) * scale, e = exp_flush(s);
  acc->max = max(z, acc->max);
  acc->sum = acc->sum + e;
  if constexpr (kDot) acc->dot = fma(e, at_least(s, -1000.0), acc->dot);  // e = 0: the term is 0
}

// Sums over n elements relative to `shift`, and their largest element; NaN ends up in the sum.
template <bool kDot, class T>
static Softmax softmax_block(const T* z, int64_t n, double shift_at, double scale_by) {
  using V = typename Compute<T>::V;
  const V shift = splat<V>(shift_at), scale = splat<V>(scale_by);
  const V lowest = splat<V>(-__builtin_inf());
  BlockSums<V> acc[kUnroll];
  for (auto& a : acc) a = {lowest, splat<V>(0), splat<V>(0)};
  int64_t i = 0;
  for (; i + kUnroll * lanes<V> <= n; i += kUnroll * lanes<V>)
    for (int u = 0; u < kUnroll; ++u)
      softmax_step<kDot, V, T>(load(z + i + u * lanes<V>), shift, scale, &acc[u]);
  for (; i < n; i += lanes<V>)
    softmax_step<kDot, V, T>(load(z + i, RK_STEP(V, n, i), -__builtin_inff()), shift, scale, &acc[0]);
  Softmax out{max_lanes(acc[0].max), 0, 0};
  for (const auto& a : acc) {
    out.max = max(double(max_lanes(a.max)), out.max);
    out.sum += sum_lanes(a.sum);
    if constexpr (kDot) out.dot += sum_lanes(a.dot);
  }
  return out;
}

template <class T>
static double max_block(const T* z, int64_t n) {
  using V = typename Compute<T>::V;
  V acc[kUnroll];
  for (auto& a : acc) a = splat<V>(-__builtin_inf());
  int64_t i = 0;
  for (; i + kUnroll * lanes<V> <= n; i += kUnroll * lanes<V>)
    for (int u = 0; u < kUnroll; ++u) acc[u] = max(load(z + i + u * lanes<V>), acc[u]);
  for (; i < n; i += lanes<V>) acc[0] = max(load(z + i, RK_STEP(V, n, i), -__builtin_inff()), acc[0]);
  double out = max_lanes(acc[0]);
  for (const auto& a : acc) out = max(double(max_lanes(a)), out);
  return out;
}

// The same sums relative to the maximum `to` >= `from`.
static inline Softmax rescale(Softmax s, double from, double to, double scale) {
  const double d = (from - to) * scale, factor = ::exp(d);
  return {to, s.sum * factor, (s.dot + d * s.sum) * factor};
}

// The sums of a block are taken relative to the largest element before it: maximum and sums in one
// pass. They are rescaled when the maximum grows, and taken again when it grows so much (e^16) that
// float32 would lose range.
template <bool kDot, class T>
static Softmax softmax_row(const T* z, int64_t vocab, double scale) {
  Softmax row{-__builtin_inf(), 0, 0};
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    const T* block = z + start;
    const bool first = row.max == -__builtin_inf();
    const double before = first ? max_block(block, n) : row.max;
    // While all is -inf the shift is 0: every term is e^-inf = 0.
    Softmax b = softmax_block<kDot>(block, n, before == -__builtin_inf() ? 0 : before, scale);
    const double after = max(b.max, before);
    if ((after - before) * scale > 16)
      b = softmax_block<kDot>(block, n, after, scale);
    else if (after > before)
      b = rescale(b, before, after, scale);
    if (!first && after > row.max) row = rescale(row, row.max, after, scale);
    row = {after, row.sum + b.sum, row.dot + b.dot};
  }
  return row;
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels
