// Policy-gradient objectives of one token, with their derivative. A: advantage, r: ratio new / old.
#pragma once
#include "scalar.h"

namespace rlhf_kernels {

enum class Objective : int64_t { ppo, cispo, reinforce };  // the order of OBJECTIVES in Python

template <class V>
struct PolicyTerm {
  V loss, slope;
};

// max(-A r, -A clip(r, low, high)), at most -A dual for A < 0; slope in log r. (Schulman et al.
// 2017, equation 7; Ye et al. 2020.) It is -A r with r bounded on the side that the sign of A
// gives. On a bound the slope is the unclipped one; beyond it r may be inf.
template <class V>
RK_HD PolicyTerm<V> ppo_term(V advantage, V ratio, V low, V high, V dual) {
  const V zero = splat<V>(0.0);
  const auto negative = advantage < zero;
  const V least = select(negative, low, zero), most = select(negative, dual, high);
  const auto below = ratio<least, above = ratio> most;
  const V loss = -advantage * select(below, least, select(above, most, ratio));
  return {loss, select(below | above, zero, loss)};
}

// The slope of ppo_term in the log-probability of a token.
template <class V>
RK_HD V ppo_slope(V advantage, V logprob, V old_logprob, V low, V high, V dual) {
  return ppo_term(advantage, exp(logprob - old_logprob), low, high, dual).slope;
}

// -stopgrad(clip(r, low, high)) A logprob (MiniMax-M1); slope in logprob.
template <class V>
RK_HD PolicyTerm<V> cispo_term(V advantage, V ratio, V logprob, V low, V high) {
  const V slope = -advantage * min(high, max(low, ratio));
  return {slope * logprob, slope};
}

// -A logprob (Williams 1992); slope in logprob.
template <class V>
RK_HD PolicyTerm<V> reinforce_term(V advantage, V logprob) {
  return {-advantage * logprob, -advantage};
}

// Does the clip bind?
template <class V>
RK_HD auto clip_binds(V advantage, V ratio, V low, V high) {
  const V zero = splat<V>(0.0);
  return ((advantage > zero) & (ratio > high)) | ((advantage < zero) & (ratio < low));
}

}  // namespace rlhf_kernels
