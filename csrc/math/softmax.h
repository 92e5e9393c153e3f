// Formulas of a softmax row and of its gradients: log-probability, entropy, KL to a second row.
#pragma once
#include "math/scalar.h"

namespace rlhf_kernels {

// Of s = (z - max) * scale: sum = sum e^s, dot = sum s e^s (where asked for).
struct Softmax {
  double max, sum, dot;
};

// The same sums relative to the maximum `to` >= max.
RK_HD Softmax rescale(Softmax s, double to, double scale) {
  const double d = (s.max - to) * scale, factor = exp(d);
  return {to, s.sum * factor, (s.dot + d * s.sum) * factor};
}

// The sums of both, relative to the larger maximum. A part without a finite element has sums of 0
// (or NaN, which has to stay).
RK_HD Softmax merge(Softmax a, Softmax b, double scale) {
  const double top = max(b.max, a.max);
  if (top > a.max && a.max != -__builtin_inf()) a = rescale(a, top, scale);
  if (top > b.max && b.max != -__builtin_inf()) b = rescale(b, top, scale);
  return {top, a.sum + b.sum, a.dot + b.dot};
}

// H = log sum - sum p s
RK_HD double entropy_of(Softmax s, double log_sum) { return log_sum - s.dot / s.sum; }

// max(low, x) that keeps a NaN in x.
template <class V>
RK_HD V at_least(V x, double low) {
  return max(splat<V>(low), x);
}

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
