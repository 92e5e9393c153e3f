// The tokens of a loss, cut into blocks: at the same places of a sequence whatever else is in the
// call, so that sums over a block have the same bits in every batch and on any number of threads.
#pragma once
#include "step.h"

namespace rlhf_kernels {

inline constexpr int64_t kBlock = 1024;  // a lane of float32 sums 1024 / kLanes numbers

struct Block {
  int64_t sequence, begin, end;  // tokens [begin, end) of the flattened tensors
};

// Of a block or a sequence: how many tokens are valid, and x - y summed over them.
struct TokenSums {
  double count, difference;
};

namespace RK_SIMD {

// The n tokens at i, 0 where they are not valid (a NaN there goes no further); 0 if x is null.
template <class T, class M>
RK_HD auto load_valid(const void* x, int64_t i, int n, M valid) {
  using V = typename Compute<T>::V;
  const V zero = splat<V>(0.0);
  return x ? select(valid, load_step<V>(static_cast<const T*>(x) + i, n), zero) : zero;
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels
