// Formulas of a softmax row and of its gradients: log-probability, entropy, KL to a second row.
#pragma once
#include "math/scalar.h"

namespace rlhf_kernels {

// max(low, x) that keeps a NaN in x.
template <class V>
RK_HD V at_least(V x, double low) {
  return max(splat<V>(low), x);
}

// Of s = (z - max) * scale: rest = sum e^s over all elements but one that is the maximum, dot = sum
// s e^s (where asked for). So log sum e^s = log1p(rest) is accurate relative to itself, and with it
// log p and 1 - p of a maximum whose p is near 1. Without a finite element: kNoElements, or NaN.
struct Softmax {
  double max, rest, dot;
};
inline constexpr Softmax kNoElements{-__builtin_inf(), -1, 0};

RK_HD double sum_of(Softmax s) { return 1 + s.rest; }
RK_HD double log_sum_of(Softmax s) { return log1p(s.rest); }

// (from - to) * scale for from <= to, at least -1000, where e^s is 0: the product of a finite mask
// may overflow, and 0 * inf is NaN. 0 where nothing is at `from`.
RK_HD double distance(double from, double to, double scale) {
  return from == -__builtin_inf() ? 0 : at_least((from - to) * scale, -1000.0);
}

// The same elements as a part of a row with the maximum `to` >= max, which is another element: now
// rest is the sum over all of them.
RK_HD Softmax raise(Softmax s, double to, double scale) {
  const double d = distance(s.max, to, scale), factor = exp(d), sum = sum_of(s);
  return {to, sum * factor, (s.dot + d * sum) * factor};
}

// Two parts of a row as one. Equal maxima are two elements.
RK_HD Softmax merge(Softmax a, Softmax b, double scale) {
  const Softmax top = b.max > a.max ? b : a, low = raise(b.max > a.max ? a : b, top.max, scale);
  return {top.max, top.rest + low.rest, top.dot + low.dot};
}

// H = log sum - sum p s
RK_HD double entropy_of(Softmax s, double log_sum) { return log_sum - s.dot / sum_of(s); }

// -p (G + h (log p + H)): gradient of a logit that is no target, before the temperature. G is the
// sum of the upstream gradients of the row's log-probabilities, h the one of its entropy H. p = 0
// with log p = -inf: the term is 0, not 0 * inf.
template <class V>
RK_HD V logit_gradient(V p, V log_p, V G, V h, V H) {
  return -p * fma(h, at_least(log_p, -1000.0) + H, G);
}

// The same for a target with upstream gradient `own` among G: own (1 - p) - (G - own) p + entropy's
// part, with 1 - p from expm1, because onehot - p cancels where p is near 1.
RK_HD double target_gradient(double log_p, double own, double G, double h, double H) {
  const double p = exp(log_p);
  return -own * expm1(log_p) - (G - own) * p + (p > 0 ? -h * p * (log_p + H) : 0);
}

// p (log p - log q - KL): gradient of KL(p || q) with respect to a logit of p.
template <class V>
RK_HD V kl_gradient(V p, V log_p, V log_q, V kl) {
  return select(p == splat<V>(0), splat<V>(0), p * (log_p - log_q - kl));
}

}  // namespace rlhf_kernels
