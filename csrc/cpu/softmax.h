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
// From this sum on its maximum, a 1, can be subtracted: no digit gets lost.
inline constexpr double kFlat = 4;

// What the sums of a block are relative to: the maximum before it (0 while all is -inf), or its own
// maximum, of which one is then left out of the sum.
struct Base {
  double at;
  bool own;
};

template <class V>
struct BlockSums {
  V max = splat<V>(-__builtin_inf()), sum = splat<V>(0), dot = splat<V>(0), tops = splat<V>(0);
};

// Of a vector of logits z, d above the base. kOwn: elements at the base are counted, not added.
template <bool kDot, bool kOwn, class V>
RK_HD V softmax_step(V z, V d, V scale, BlockSums<V>* acc) {
  const V s = d * scale, e = exp_flush(s), zero = splat<V>(0);
  acc->max = max(z, acc->max);
  if constexpr (kOwn) {
    const auto top = d == zero;
    acc->sum = acc->sum + select(top, zero, e);
    acc->tops = acc->tops + select(top, splat<V>(1), zero);
  } else {
    acc->sum = acc->sum + e;
  }
  if constexpr (kDot) acc->dot = fma(e, at_least(s, -1000.0), acc->dot);  // e = 0: the term is 0
  return e;
}

template <bool kOwn, class V>
RK_HD Softmax collect(const BlockSums<V>* acc) {
  Softmax out{-__builtin_inf(), 0, 0};
  double tops = 0;
  for (int u = 0; u < kUnroll; ++u) {
    out.max = max(double(max_lanes(acc[u].max)), out.max);
    out.rest += sum_lanes(acc[u].sum);
    out.dot += sum_lanes(acc[u].dot);
    tops += sum_lanes(acc[u].tops);
  }
  if (kOwn) out.rest += tops - 1;
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

// Sums over n elements relative to the base, and their largest element; a NaN ends up in the sum.
template <bool kDot, bool kOwn, class T>
static Softmax softmax_block(const T* z, int64_t size, double base, double scale) {
  using V = typename Compute<T>::V;
  BlockSums<V> acc[kUnroll];
  for_each_vector<V>(size, [&](int u, int64_t i, int n) RK_INLINE {
    const V x = load_logits(z + i, n);
    softmax_step<kDot, kOwn>(x, x - splat<V>(base), splat<V>(scale), &acc[u]);
  });
  return collect<kOwn>(acc);
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

// Of the first block with a finite element its own maximum, else the one so far.
template <class T>
static Base first_base(const Softmax& row, const T* block, int64_t size) {
  if (row.max != -__builtin_inf()) return {row.max, false};
  const double top = max_block(block, size);
  return top == -__builtin_inf() ? Base{0, false} : Base{top, true};
}

// Is the block to be taken again, relative to its own maximum? It is where that has grown, unless
// by little in a row that is flat: then the old base will do.
static inline bool outgrown(const Softmax& row, const Softmax& block, Base base, double scale) {
  if (base.own || !(block.max > row.max)) return false;
  const double growth = (block.max - base.at) * scale;
  return growth > kMaxGrowth || !((sum_of(row) + block.rest) * ::exp(-growth) >= kFlat);
}

// The row with one more block.
static inline Softmax with_block(Softmax row, const Softmax& block, Base base, double scale) {
  if (base.own) row = raise(row, base.at, scale);
  row.rest += block.rest;
  row.dot += block.dot;
  if (!(block.max > row.max)) return row;
  row = raise(row, block.max, scale);  // flat: the maximum is among the sum
  row.rest -= 1;
  return row;
}

// One read of the row: the sums of a block are taken relative to the maximum before it, and again
// (from the cache) where the block has outgrown it.
template <bool kDot, class T>
static Softmax softmax_row(const T* z, int64_t vocab, double scale) {
  Softmax row = kNoElements;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const T* at = z + start;
    const int64_t size = vocab - start < kBlock ? vocab - start : kBlock;
    Base base = first_base(row, at, size);
    Softmax block{};
    if (!base.own) block = softmax_block<kDot, false>(at, size, base.at, scale);
    if (outgrown(row, block, base, scale)) base = {block.max, true};
    if (base.own) block = softmax_block<kDot, true>(at, size, base.at, scale);
    row = with_block(row, block, base, scale);
  }
  return row;
}

}  // namespace rlhf_kernels::RK_SIMD
