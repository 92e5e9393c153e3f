// Per-token estimators of KL(p || q) from samples of p, d = log p - log q (Schulman, "Approximating
// KL divergence", 2020): k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d. Value and derivative in d, side
// by side.
#pragma once
#include "scalar.h"

namespace rlhf_kernels {

enum class KlKind : int { k1, k2, k3 };  // the order of KINDS in rlhf_kernels/kl_estimate.py

template <class V>
struct KlTerm {
  V value, slope;
};

// Terms of the series below that count at |x| = 1: the next one is below the last place of the sum.
template <class V>
inline constexpr int kExpTerms = 10;
template <>
inline constexpr int kExpTerms<double> = 18;

// e^x - 1 - x, with e^x given. Near 0 the difference would cancel: of a k3 of 1e-8 nothing would be
// left in float32. There it is x^2 (1/2! + x/3! + x^2/4! + ...), even and odd powers side by side.
template <class V>
RK_HD V exp_remainder(V x, V exp_x) {
  constexpr int n = kExpTerms<V>;
  double inverse[n];  // 1 / (k + 2)!: folded by the compiler
  inverse[0] = 0.5;
  for (int k = 1; k < n; ++k) inverse[k] = inverse[k - 1] / (k + 2);
  const V square = x * x;
  V even = splat<V>(inverse[n - 2]), odd = splat<V>(inverse[n - 1]);
  for (int k = n - 4; k >= 0; k -= 2) {
    even = fma(square, even, splat<V>(inverse[k]));
    odd = fma(square, odd, splat<V>(inverse[k + 1]));
  }
  return select(abs(x) < 1.0f, square * fma(x, odd, even), exp_x - 1.0f - x);
}

// The estimate of the clamped log-ratio: d is bounded to +-clamp (inf: not at all), and beyond it
// the slope is 0. Without a clamp k3 is inf where e^-d is (d < -88 in float32) and its slope -inf.
template <class V>
RK_HD KlTerm<V> kl_estimate(KlKind kind, V d, double clamp) {
  const V zero = splat<V>(0.0), bound = splat<V>(clamp);
  const auto inside = !(abs(d) > bound);
  d = min(bound, max(-bound, d));
  KlTerm<V> term;
  if (kind == KlKind::k1) {
    term = {d, splat<V>(1.0)};
  } else if (kind == KlKind::k2) {
    term = {d * d * 0.5f, d};
  } else {
    const V exp_x = exp(-d), value = exp_remainder(-d, exp_x);
    term = {value, select(abs(d) < 1.0f, d - value, 1.0f - exp_x)};
  }
  term.slope = select(inside, term.slope, zero);
  return term;
}

}  // namespace rlhf_kernels
