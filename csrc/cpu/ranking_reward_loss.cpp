// ranking_reward_loss on the CPU: the completions of a prompt are sorted from best to worst, so
// that those ranked below one stand side by side; the K^2 / 2 pairs live in registers, never in
// memory. Each prompt is handled by one thread: its bits do not depend on the other prompts.
#include "simd.h"
#include "math/reward.h"
#include "step.h"

namespace rlhf_kernels {

// One prompt. Behind scores and grad stand elements for the rest of a vector, read but not used.
struct RankingRewardLossArgs {
  bool wide;             // float64, else float32
  const void* scores;    // from best to worst
  const int64_t* below;  // where the completions ranked below completion i begin
  double* grad;          // of the sum of the losses; comes in as zeros
  double* sums;          // out: losses, pairs in the right order, differences
};
inline constexpr int64_t kWidestVector = 16;

namespace RK_SIMD {

template <class T>
static void pairs(const RankingRewardLossArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  const T* scores = static_cast<const T*>(a.scores);
  const V zero{}, one = splat<V>(1.0);
  Wide<V> losses{}, correct{}, differences{};
  for (int64_t i = begin; i < end; ++i) {
    const V better = V{} + scores[i];
    Wide<V> slopes{};
    for (int64_t j = a.below[i]; j < end; j += lanes<V>) {
      const auto inside = first_lanes(RK_STEP(V, end, j), V{});
      const V apart = select(inside, better - load(scores + j), zero);
      const RewardTerm<V> term = neg_log_sigmoid(apart);
      losses += widen(select(inside, term.value, zero));
      correct += widen(select(apart > zero, one, zero));
      differences += widen(apart);
      const Wide<V> slope = widen(select(inside, term.slope, zero));
      slopes += slope;
      Wide<V> grad;
      std::memcpy(&grad, a.grad + j, sizeof grad);
      grad -= slope;
      std::memcpy(a.grad + j, &grad, sizeof grad);
    }
    a.grad[i] += sum_lanes(slopes);
  }
  a.sums[0] = sum_lanes(losses);
  a.sums[1] = sum_lanes(correct);
  a.sums[2] = sum_lanes(differences);
}

void ranking_reward_loss_kernel(const RankingRewardLossArgs& a, int64_t begin, int64_t end) {
  a.wide ? pairs<double>(a, begin, end) : pairs<float>(a, begin, end);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include <algorithm>

#include "common.h"

namespace rlhf_kernels {
RK_DECLARE(ranking_reward_loss_kernel, RankingRewardLossArgs)

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct PromptSums {
  double losses, correct, differences, pairs;
};

// The sums over the pairs of the prompt [start, stop); grad += the gradient of their mean loss.
template <class T, class Rank>
static PromptSums rank_prompt(const T* scores, const Rank* ranks, int64_t start, int64_t stop,
                              double* grad) {
  std::vector<int64_t> order;
  for (int64_t i = start; i < stop; ++i)
    if (ranks[i] == ranks[i]) order.push_back(i);  // NaN: not ranked
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return ranks[i] < ranks[j]; });
  const auto count = static_cast<int64_t>(order.size());
  std::vector<int64_t> below(count);
  std::vector<T> sorted(count + kWidestVector);
  std::vector<double> slopes(count + kWidestVector);
  int64_t pairs = 0;
  for (int64_t i = count - 1; i >= 0; --i) {
    const bool tied = i + 1 < count && ranks[order[i + 1]] == ranks[order[i]];
    below[i] = tied ? below[i + 1] : i + 1;
    pairs += count - below[i];
    sorted[i] = scores[order[i]];
  }
  if (pairs == 0) return {};
  double sums[3];
  RK_KERNEL(ranking_reward_loss_kernel)
  ({sizeof(T) == 8, sorted.data(), below.data(), slopes.data(), sums}, 0, count);
  for (int64_t i = 0; i < count; ++i) grad[order[i]] += slopes[i] / static_cast<double>(pairs);
  return {sums[0], sums[1], sums[2], static_cast<double>(pairs)};
}

template <class T, class Rank>
static Results rank_prompts(const Tensor& scores_in, const Tensor& ranks_in, const Tensor& offsets,
                            double center_coef, bool with_grad) {
  const ScalarType type = scores_in.scalar_type();
  const T* scores = static_cast<const T*>(scores_in.const_data_ptr());
  const Rank* ranks = static_cast<const Rank*>(ranks_in.const_data_ptr());
  const int64_t* at = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t total = scores_in.numel(), prompts = offsets.numel() - 1;
  std::vector<double> grad(total);
  std::vector<PromptSums> sums(prompts);
  const int64_t mean_size = prompts > 0 ? total / prompts : 0;
  torch::stable::parallel_for(
      0, prompts, rows_per_thread(mean_size * mean_size / 2), [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p)
          sums[p] = rank_prompt(scores, ranks, at[p], at[p + 1], grad.data());
      });

  PromptSums all{};
  double used = 0, mean_loss = 0, squares = 0, ranked = 0;
  for (const PromptSums& prompt : sums) {
    if (prompt.pairs == 0) continue;
    used += 1;
    mean_loss += prompt.losses / prompt.pairs;
    all.correct += prompt.correct;
    all.differences += prompt.differences;
    all.pairs += prompt.pairs;
  }
  for (int64_t i = 0; i < total; ++i) {
    if (ranks[i] != ranks[i]) continue;
    ranked += 1;
    squares += double(scores[i]) * scores[i];
  }
  const double share = used > 0 ? 1 / used : 0;
  const double center = ranked > 0 ? center_coef / ranked : 0;
  Tensor grad_scores = empty({with_grad ? total : 0}, type);
  T* out = static_cast<T*>(grad_scores.mutable_data_ptr());
  for (int64_t i = 0; with_grad && i < total; ++i)
    out[i] = ranks[i] == ranks[i] ? T(grad[i] * share + 2 * center * scores[i]) : T(0);
  return {scalar(mean_loss * share + center * squares, type),
          scalar(all.pairs, ScalarType::Double),
          scalar(all.correct, ScalarType::Double),
          scalar(all.differences, ScalarType::Double),
          scalar(static_cast<double>(prompts) - used, ScalarType::Double),
          grad_scores};
}

static Results ranking_reward_loss_fwd(const Tensor& scores_in, const Tensor& ranks_in,
                                       const Tensor& group_offsets, double center_coef,
                                       bool with_grad) {
  const Tensor offsets = checked_offsets(group_offsets, scores_in.numel(), "group_offsets");
  const Tensor scores = dense(scores_in, accumulation_type(scores_in));
  const bool whole = ranks_in.scalar_type() == ScalarType::Long;
  const Tensor ranks = dense(ranks_in, whole ? ScalarType::Long : ScalarType::Double);
  const bool wide = scores.scalar_type() == ScalarType::Double;
  const auto run = wide    ? whole ? rank_prompts<double, int64_t> : rank_prompts<double, double>
                   : whole ? rank_prompts<float, int64_t>
                           : rank_prompts<float, double>;
  return run(scores, ranks, offsets, center_coef, with_grad);
}

static Tensor ranking_reward_loss_bwd(const Tensor& grad, const Tensor& grad_scores) {
  return scaled(grad_scores, grad);
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("ranking_reward_loss_fwd", TORCH_BOX(&ranking_reward_loss_fwd));
  m.impl("ranking_reward_loss_bwd", TORCH_BOX(&ranking_reward_loss_bwd));
}

}  // namespace rlhf_kernels
#endif
