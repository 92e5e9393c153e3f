// kl_shaped_rewards on the CPU: one pass over the log-probs of each sequence, then its score on the
// last valid token.
#include "simd.h"
#include "math/kl.h"
#include "step.h"

namespace rlhf_kernels {

struct KlShapedRewardsArgs {
  bool wide;  // float64, else float32
  const void *scores, *logprob, *ref_logprob;
  const bool* mask;        // may be null
  const int64_t* offsets;  // (S + 1), or null: sequences of `length` tokens
  int64_t length;
  double kl_coef, clip_score;
  KlKind kind;
  void* rewards;
};

namespace RK_SIMD {

template <class T>
static void shape(const KlShapedRewardsArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  const T *p = static_cast<const T*>(a.logprob), *q = static_cast<const T*>(a.ref_logprob);
  T* rewards = static_cast<T*>(a.rewards);
  const V coefficient = splat<V>(-a.kl_coef), zero = splat<V>(0.0);
  for (int64_t s = begin; s < end; ++s) {
    const int64_t start = a.offsets ? a.offsets[s] : s * a.length;
    const int64_t stop = a.offsets ? a.offsets[s + 1] : start + a.length;
    for (int64_t i = start; i < stop; i += lanes<V>) {
      const int n = RK_STEP(V, stop, i);
      const V d = load_step<V>(p + i, n) - load_step<V>(q + i, n);
      const V penalty = coefficient * kl_estimate(a.kind, d, __builtin_inf()).value;
      store_step(rewards + i, select(valid_step(a.mask, i, n, V{}), penalty, zero), n);
    }
    int64_t last = stop - 1;
    while (last >= start && a.mask && !a.mask[last]) --last;
    if (last < start) continue;  // no valid token: no score
    const double score = static_cast<const T*>(a.scores)[s];
    rewards[last] += T(min(a.clip_score, max(-a.clip_score, score)));
  }
}

void kl_shaped_rewards_kernel(const KlShapedRewardsArgs& a, int64_t begin, int64_t end) {
  a.wide ? shape<double>(a, begin, end) : shape<float>(a, begin, end);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include "common.h"

namespace rlhf_kernels {
RK_DECLARE(kl_shaped_rewards_kernel, KlShapedRewardsArgs)

static Tensor kl_shaped_rewards(const Tensor& scores_in, const Tensor& logprob_in,
                                const Tensor& ref_in, const std::optional<Tensor>& mask_in,
                                const std::optional<Tensor>& cu_seqlens, double kl_coef,
                                int64_t kl_kind, double clip_score,
                                const std::optional<Tensor>& coef) {
  const ScalarType type = accumulation_type(scores_in, logprob_in, ref_in);
  const int64_t total = logprob_in.numel();
  std::optional<Tensor> offsets;
  if (cu_seqlens) offsets = checked_offsets(*cu_seqlens, total, "cu_seqlens");
  const Tensor scores = dense(scores_in, type), logprob = dense(logprob_in, type);
  const Tensor ref = dense(ref_in, type);
  const auto mask = dense(mask_in, ScalarType::Bool);
  Tensor rewards = empty_as(logprob, type);
  KlShapedRewardsArgs a{};
  a.wide = type == ScalarType::Double;
  a.scores = scores.const_data_ptr();
  a.logprob = logprob.const_data_ptr();
  a.ref_logprob = ref.const_data_ptr();
  a.mask = static_cast<const bool*>(data_or_null(mask));
  a.offsets = static_cast<const int64_t*>(data_or_null(offsets));
  a.length = offsets ? 0 : logprob.size(1);
  a.kl_coef = coef ? value_of(dense(*coef, ScalarType::Double)) : kl_coef;
  a.clip_score = clip_score;
  a.kind = static_cast<KlKind>(kl_kind);
  a.rewards = rewards.mutable_data_ptr();
  const int64_t sequences = scores.numel();
  const int64_t grain = rows_per_thread(sequences > 0 ? total / sequences : 0);
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    RK_KERNEL(kl_shaped_rewards_kernel)(a, begin, end);
  });
  return rewards;
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("kl_shaped_rewards", TORCH_BOX(&kl_shaped_rewards));
}

}  // namespace rlhf_kernels
#endif
