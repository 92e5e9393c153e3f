// One row of a softmax in one read: maximum and sums together, in blocks.
#pragma once
#include "simd.h"

#include "math/softmax.h"

namespace rlhf_kernels::RK_SIMD {

// Elements between two looks at the maximum; fixes the order of the sums. 8 KiB of float32: a block
// that has to be done again is still in the first-level cache.
inline constexpr int64_t kBlock = 2048;
inline constexpr int kUnroll = 4;
// A maximum that grows by more than this within a block makes float32 lose range: do the block
// again.
inline constexpr double kMaxGrowth = 16;

template <class V>
struct BlockSums {
  V max, sum, dot;
};

template <bool kDot, class V>
RK_HD V softmax_step(V z, V shift, V scale, V* s, BlockSums<V>* acc) {
  *s = (z - shift) * scale;
  const V e = exp_flush(*s);
  acc->max = max(z, acc->max);
  acc->sum = acc->sum + e;
  if constexpr (kDot) acc->dot = fma(e, at_least(*s, -1000.0), acc->dot);  // e = 0: the term is 0
  return e;
}

template <class V>
RK_HD Softmax collect(const BlockSums<V>* acc) {
  Softmax out{-__builtin_inf(), 0, 0};
  for (int u = 0; u < kUnroll; ++u) {
    out.max = max(double(max_lanes(acc[u].max)), out.max);
    out.sum += sum_lanes(acc[u].sum);
    out.dot += sum_lanes(acc[u].dot);
  }
  return out;
}

// step(u, i, n) for every vector of n elements at i, going round kUnroll accumulators u.
template <class V, class Step>
RK_HD void for_each_vector(int64_t size, const Step& step) {
  int64_t i = 0;
  for (; i + kUnroll * lanes<V> <= size; i += kUnroll * lanes<V>)
    for (int u = 0; u < kUnroll; ++u) step(u, i + u * lanes<V>, lanes<V>);
  for (; i < size; i += lanes<V>) step(0, i, size - i < lanes<V> ? int(size - i) : lanes<V>);
}

// A whole vector where there is one, else padded with -inf.
template <class T>
RK_HD typename Compute<T>::V load_logits(const T* z, int n) {
  return n == lanes<typename Compute<T>::V> ? load(z) : load(z, n, -__builtin_inf());
}

// Sums over n elements relative to `shift`, and their largest element; a NaN ends up in the sum.
template <bool kDot, class T>
static Softmax softmax_block(const T* z, int64_t size, double shift, double scale) {
  using V = typename Compute<T>::V;
  BlockSums<V> acc[kUnroll];
  for (auto& a : acc) a = {splat<V>(-__builtin_inf()), splat<V>(0), splat<V>(0)};
  for_each_vector<V>(size, [&](int u, int64_t i, int n) RK_INLINE {
    V s;
    softmax_step<kDot>(load_logits(z + i, n), splat<V>(shift), splat<V>(scale), &s, &acc[u]);
  });
  return collect(acc);
}

template <class T>
static double max_block(const T* z, int64_t size) {
  using V = typename Compute<T>::V;
  V acc[kUnroll];
  for (auto& a : acc) a = splat<V>(-__builtin_inf());
  for_each_vector<V>(size, [&](int u, int64_t i, int n)
                               RK_INLINE { acc[u] = max(load_logits(z + i, n), acc[u]); });
  double out = -__builtin_inf();
  for (const V& a : acc) out = max(double(max_lanes(a)), out);
  return out;
}

// What the sums of the next block are taken relative to: the largest element so far; of the first
// block its own; 0 while all is -inf (every term is then e^-inf = 0).
template <class T>
static double block_shift(const Softmax& row, const T* block, int64_t size) {
  const double shift = row.max == -__builtin_inf() ? max_block(block, size) : row.max;
  return shift == -__builtin_inf() ? 0 : shift;
}

// Adds the block's sums, which are relative to `shift`, to the row's.
static inline Softmax merge(Softmax row, Softmax block, double shift, double scale) {
  const double top = max(block.max, row.max);
  block.max = shift;
  if (top > shift) block = rescale(block, top, scale);
  if (top > row.max && row.max != -__builtin_inf()) row = rescale(row, top, scale);
  return {top, row.sum + block.sum, row.dot + block.dot};
}

// One read of the row: the sums of a block are taken relative to the maximum before it, rescaled
// when the maximum grows, and taken again (from the cache) when it grows by more than kMaxGrowth.
template <bool kDot, class T>
static Softmax softmax_row(const T* z, int64_t vocab, double scale) {
  Softmax row{-__builtin_inf(), 0, 0};
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t size = vocab - start < kBlock ? vocab - start : kBlock;
    double shift = block_shift(row, z + start, size);
    Softmax block = softmax_block<kDot>(z + start, size, shift, scale);
    if ((block.max - shift) * scale > kMaxGrowth) {
      shift = block.max;
      block = softmax_block<kDot>(z + start, size, shift, scale);
    }
    row = merge(row, block, shift, scale);
  }
  return row;
}

}  // namespace rlhf_kernels::RK_SIMD
