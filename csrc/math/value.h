// The clipped value loss of one token, with its derivative.
#pragma once
#include "scalar.h"

namespace rlhf_kernels {

template <class V>
struct ValueTerm {
  V loss, slope, clipped;  // clipped: 1 where the clipped square is the larger, else 0
};

// 0.5 max((v - R)^2, (clip(v, old - c, old + c) - R)^2); slope in v: v - R unless clipped.
template <class V>
RK_HD ValueTerm<V> value_term(V value, V old, V target, V clip) {
  const V zero = splat<V>(0.0);
  const V error = value - target;
  const V inside = min(old + clip, max(old - clip, value));  // has no NaN of old
  const V bounded = select(old == old, inside, old) - target;
  const V plain = error * error * 0.5f, other = bounded * bounded * 0.5f;
  const auto unclipped = plain >= other;
  return {select(unclipped, plain, other), select(unclipped, error, zero),
          select(other > plain, splat<V>(1.0), zero)};
}

}  // namespace rlhf_kernels
