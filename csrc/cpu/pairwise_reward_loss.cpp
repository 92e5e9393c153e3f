// pairwise_reward_loss on the CPU: loss, statistics and the gradient of the loss in one pass.
#include "simd.h"
#include "math/reward.h"
#include "step.h"

namespace rlhf_kernels {

struct PairwiseRewardLossArgs {
  bool wide;                               // float64, else float32
  const void *chosen, *rejected, *margin;  // margin may be null: margin_value
  double margin_value, center_coef, label_smoothing;
  int64_t n;
  double* sums;                       // per block: loss, pairs in the right order, differences
  void *grad_chosen, *grad_rejected;  // null when no gradient is wanted
};

namespace RK_SIMD {

template <class T>
static void pairs(const PairwiseRewardLossArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  const T *chosen = static_cast<const T*>(a.chosen), *rejected = static_cast<const T*>(a.rejected);
  const T* margin = static_cast<const T*>(a.margin);
  const V zero{}, one = splat<V>(1.0), center = splat<V>(a.center_coef);
  const V share = splat<V>(1.0 / static_cast<double>(a.n));
  sum_blocks<3, V>(a.n, a.sums, begin, end, [&](int64_t i, int n, Wide<V>* acc) RK_INLINE {
    const V c = load_step<V>(chosen + i, n), r = load_step<V>(rejected + i, n);
    const V apart = c - r, total = c + r;
    const V z = apart - (margin ? load_step<V>(margin + i, n) : splat<V>(a.margin_value));
    const RewardTerm<V> term = neg_log_sigmoid(z, a.label_smoothing);
    const V pull = center * total;
    acc[0] += widen(select(first_lanes(n, V{}), fma(pull, total, term.value), zero));
    acc[1] += widen(select(apart > zero, one, zero));
    acc[2] += widen(apart);
    if (!a.grad_chosen) return;
    store_step(static_cast<T*>(a.grad_chosen) + i, (pull + pull + term.slope) * share, n);
    store_step(static_cast<T*>(a.grad_rejected) + i, (pull + pull - term.slope) * share, n);
  });
}

void pairwise_reward_loss_kernel(const PairwiseRewardLossArgs& a, int64_t begin, int64_t end) {
  a.wide ? pairs<double>(a, begin, end) : pairs<float>(a, begin, end);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include "common.h"

namespace rlhf_kernels {
RK_DECLARE(pairwise_reward_loss_kernel, PairwiseRewardLossArgs)

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pairwise_reward_loss_fwd(
    const Tensor& chosen_in, const Tensor& rejected_in, const std::optional<Tensor>& margin_in,
    double margin_value, double center_coef, double label_smoothing, bool with_grad) {
  const ScalarType type = accumulation_type(chosen_in, rejected_in);
  const Tensor chosen = dense(chosen_in, type), rejected = dense(rejected_in, type);
  const auto margin = dense(margin_in, type);
  Tensor grad_chosen = with_grad ? empty_as(chosen, type) : empty({0}, type);
  Tensor grad_rejected = with_grad ? empty_as(chosen, type) : empty({0}, type);
  PairwiseRewardLossArgs a{};
  a.wide = type == ScalarType::Double;
  a.chosen = chosen.const_data_ptr();
  a.rejected = rejected.const_data_ptr();
  a.margin = data_or_null(margin);
  a.margin_value = margin_value;
  a.center_coef = center_coef;
  a.label_smoothing = label_smoothing;
  a.n = chosen.numel();
  a.grad_chosen = with_grad ? grad_chosen.mutable_data_ptr() : nullptr;
  a.grad_rejected = with_grad ? grad_rejected.mutable_data_ptr() : nullptr;
  const auto sums = reduce_blocks<3>(a.n, [&](double* partial, int64_t begin, int64_t end) {
    PairwiseRewardLossArgs part = a;
    part.sums = partial;
    RK_KERNEL(pairwise_reward_loss_kernel)(part, begin, end);
  });
  const double n = static_cast<double>(a.n);
  return {scalar(a.n > 0 ? sums[0] / n : 0, type),
          scalar(n, ScalarType::Double),
          scalar(sums[1], ScalarType::Double),
          scalar(sums[2], ScalarType::Double),
          grad_chosen,
          grad_rejected};
}

static std::tuple<Tensor, Tensor> pairwise_reward_loss_bwd(const Tensor& grad,
                                                           const Tensor& grad_chosen,
                                                           const Tensor& grad_rejected) {
  return {scaled(grad_chosen, grad), scaled(grad_rejected, grad)};
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("pairwise_reward_loss_fwd", TORCH_BOX(&pairwise_reward_loss_fwd));
  m.impl("pairwise_reward_loss_bwd", TORCH_BOX(&pairwise_reward_loss_bwd));
}

}  // namespace rlhf_kernels
#endif
