// Generalised advantage estimation (Schulman et al. 2016, equations 11 and 16):
// delta = r + gamma V' - V, A = delta + gamma lambda A', with A' and V' of the next valid step.
#pragma once
#include "scalar.h"

namespace rlhf_kernels {

template <class V>
RK_HD V gae_delta(V reward, V value, V next_value, V gamma) {
  return fma(gamma, next_value, reward - value);
}

template <class V>
RK_HD V gae_advantage(V delta, V next_advantage, V gamma_lambda) {
  return fma(gamma_lambda, next_advantage, delta);
}

}  // namespace rlhf_kernels
