// The Bradley-Terry loss -log sigmoid(z) of a score difference z. Value and derivative, side by
// side.
#pragma once
#include "scalar.h"

namespace rlhf_kernels {

template <class V>
struct RewardTerm {
  V value, slope;
};

// -log sigmoid(z) = max(-z, 0) + log1p(e^-|z|), slope -sigmoid(-z): no exponential of a positive
// number, so nothing overflows at z = -200 and nothing is lost at z = 200.
template <class V>
RK_HD RewardTerm<V> neg_log_sigmoid(V z) {
  const V e = exp(-abs(z)), zero = splat<V>(0.0), one = splat<V>(1.0);
  return {max(zero, -z) + log1p(e), -select(z > zero, e, one) / (one + e)};
}

// -(1 - smoothing) log sigmoid(z) - smoothing log sigmoid(-z), as log sigmoid(z) - log sigmoid(-z)
// = z
template <class V>
RK_HD RewardTerm<V> neg_log_sigmoid(V z, double smoothing) {
  RewardTerm<V> term = neg_log_sigmoid(z);
  if (smoothing == 0) return term;  // not 0 * inf
  return {fma(splat<V>(smoothing), z, term.value), term.slope + splat<V>(smoothing)};
}

}  // namespace rlhf_kernels
