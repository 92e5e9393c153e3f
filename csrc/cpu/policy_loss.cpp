// policy_loss on the CPU: loss, statistics and, where a gradient is wanted, d loss / d logprob in
// one pass; no ratio, KL or weight tensor exists. The denominator is known after the last token
// only, so it is left to the backward. Sequence ratios take one more pass before and one after.
#include "simd.h"
#include "math/kl.h"
#include "math/policy.h"
#include "blocks.h"

namespace rlhf_kernels {

struct PolicySums {  // over the valid tokens of a block
  double loss, count, clipped, kl, ratio, ratio_max;
  double slope;  // of the loss in the log-ratio, where that is one for the sequence
};

struct PolicyLossArgs {
  bool wide;  // float64, else float32
  const void *logprob, *advantages;
  const void *old_logprob, *importance_weight, *ref_logprob, *entropy;  // may be null
  const bool* mask;
  const Block* blocks;
  PolicySums* sums;              // one a block
  const double *ratio, *weight;  // one a sequence; null: each token has its ratio, weight 1
  void *coefficient, *entropy_coefficient;  // may be null
  const double* added;  // one a sequence: what the last pass adds to the coefficients
  Objective objective;
  double low, high, dual, clamp, kl_coef, entropy_coef;
  KlKind kl_kind;
};

namespace RK_SIMD {

// Steps whose statistics are added up in float32 before they go on in float64.
inline constexpr int kFewSteps = 8;

template <class T>
static PolicySums forward_block(const PolicyLossArgs& a, const Block& block) {
  using V = typename Compute<T>::V;
  const V zero = splat<V>(0.0), one = splat<V>(1.0);
  const V low = splat<V>(a.low), high = splat<V>(a.high), dual = splat<V>(a.dual);
  const V clamp = splat<V>(a.clamp), weight = splat<V>(a.weight ? a.weight[block.sequence] : 1.0);
  const V kl_coef = splat<V>(a.kl_coef), entropy_coef = splat<V>(a.entropy_coef);
  V losses = zero, counts = zero, clips = zero, most = zero, slopes = zero;
  V few_kls = zero, few_ratios = zero;
  Wide<V> kls{}, ratios{};
  const auto step = [&](int64_t i, int n) RK_INLINE {
    const auto valid = valid_step(a.mask, i, n, V{});
    const V logprob = load_valid<T>(a.logprob, i, n, valid);
    const V advantage = load_valid<T>(a.advantages, i, n, valid);
    const V raw = a.old_logprob ? logprob - load_valid<T>(a.old_logprob, i, n, valid) : zero;
    const V x = min(clamp, max(-clamp, raw)), exp_x = exp(x);
    few_kls += exp_remainder(x, exp_x);  // 0 where not valid, as x is

    const V ratio = a.ratio ? splat<V>(a.ratio[block.sequence]) : exp_x;
    PolicyTerm<V> term;
    if (a.objective == Objective::ppo) {
      term = ppo_term(advantage, ratio, low, high, dual);
      if (!a.ratio) term.slope = select(abs(raw) > clamp, zero, term.slope);
    } else if (a.objective == Objective::cispo) {
      term = cispo_term(advantage, ratio, logprob, low, high);
    } else {
      term = reinforce_term(advantage, logprob);
    }
    if (a.importance_weight) {
      const V importance = load_valid<T>(a.importance_weight, i, n, valid);
      term = {term.loss * importance, term.slope * importance};
    }
    if (a.ratio && a.objective == Objective::ppo) {
      slopes += select(valid, term.slope, zero);
      term.slope = zero;
    }
    if (a.ref_logprob) {
      const V d = logprob - load_valid<T>(a.ref_logprob, i, n, valid);
      const KlTerm<V> kl = kl_estimate(a.kl_kind, d, __builtin_inf());
      term = {term.loss + kl_coef * kl.value, term.slope + kl_coef * kl.slope};
    }
    if (a.entropy) term.loss = term.loss - entropy_coef * load_valid<T>(a.entropy, i, n, valid);

    losses += select(valid, term.loss, zero);  // 0 * a sequence's infinite ratio
    counts += select(valid, one, zero);
    few_ratios += ratio - one;  // near 0: little is rounded away
    most = max(most, select(valid, ratio, zero));
    if (a.objective != Objective::reinforce)
      clips += select(clip_binds(advantage, ratio, low, high), one, zero);
    if (a.coefficient)
      store_step(static_cast<T*>(a.coefficient) + i, select(valid, weight * term.slope, zero), n);
    if (a.entropy_coefficient)
      store_step(static_cast<T*>(a.entropy_coefficient) + i,
                 select(valid, -weight * entropy_coef, zero), n);
  };
  int64_t i = block.begin;
  for (int steps = 1; i + lanes<V> <= block.end; i += lanes<V>, ++steps) {
    step(i, lanes<V>);
    if (steps % kFewSteps == 0) {
      kls += widen(few_kls), ratios += widen(few_ratios);
      few_kls = few_ratios = zero;
    }
  }
  if (i < block.end) step(i, static_cast<int>(block.end - i));
  kls += widen(few_kls), ratios += widen(few_ratios);
  const double count = sum_lanes(counts);
  double ratio = count + sum_lanes(ratios);
  if (a.ratio) ratio = count > 0 ? a.ratio[block.sequence] * count : 0;  // it may be inf
  return {sum_lanes(losses), count, sum_lanes(clips), sum_lanes(kls), ratio, max_lanes(most),
          sum_lanes(slopes)};
}

// coefficient += what the sequence's ratio adds to each of its valid tokens.
template <class T>
static void add_block(const PolicyLossArgs& a, const Block& block) {
  using V = typename Compute<T>::V;
  const V added = splat<V>(a.added[block.sequence]), zero = splat<V>(0.0);
  for (int64_t i = block.begin; i < block.end; i += lanes<V>) {
    const int n = RK_STEP(V, block.end, i);
    T* p = static_cast<T*>(a.coefficient) + i;
    const auto valid = valid_step(a.mask, i, n, V{});
    store_step(p, load_step<V>(p, n) + select(valid, added, zero), n);
  }
}

void policy_loss_fwd_kernel(const PolicyLossArgs& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    a.sums[b] =
        a.wide ? forward_block<double>(a, a.blocks[b]) : forward_block<float>(a, a.blocks[b]);
}
void policy_loss_add_kernel(const PolicyLossArgs& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    a.wide ? add_block<double>(a, a.blocks[b]) : add_block<float>(a, a.blocks[b]);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include "aggregation.h"

namespace rlhf_kernels {
RK_DECLARE(policy_loss_fwd_kernel, PolicyLossArgs)
RK_DECLARE(policy_loss_add_kernel, PolicyLossArgs)

static std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss_fwd(
    const Tensor& logprob_in, const std::optional<Tensor>& entropy_in,
    const std::optional<Tensor>& old_in, const Tensor& advantages_in,
    const std::optional<Tensor>& importance_in, const std::optional<Tensor>& ref_in,
    const std::optional<Tensor>& mask_in, const std::optional<Tensor>& cu_seqlens,
    int64_t aggregation_code, const std::optional<Tensor>& normalizer, double normalizer_value,
    int64_t max_length, int64_t objective, bool by_sequence, double low, double high, double dual,
    double clamp, int64_t kl_kind, double kl_coef, double entropy_coef,
    const std::optional<Tensor>& coefs, bool need, bool need_entropy) {
  const ScalarType type = accumulation_type(
      logprob_in, advantages_in, entropy_in.value_or(logprob_in), old_in.value_or(logprob_in),
      importance_in.value_or(logprob_in), ref_in.value_or(logprob_in));
  const Tensor logprob = dense(logprob_in, type), advantages = dense(advantages_in, type);
  const auto entropy = dense(entropy_in, type), old = dense(old_in, type);
  const auto importance = dense(importance_in, type), ref = dense(ref_in, type);
  const auto mask = dense(mask_in, ScalarType::Bool);
  const Sequences sequences(logprob, cu_seqlens);
  const auto aggregation = static_cast<Aggregation>(aggregation_code);

  std::vector<PolicySums> sums(sequences.block_count());
  PolicyLossArgs a{};
  a.wide = type == ScalarType::Double;
  a.logprob = logprob.const_data_ptr();
  a.old_logprob = data_or_null(old);
  a.advantages = advantages.const_data_ptr();
  a.importance_weight = data_or_null(importance);
  a.ref_logprob = data_or_null(ref);
  a.entropy = data_or_null(entropy);
  a.mask = static_cast<const bool*>(data_or_null(mask));
  a.blocks = sequences.blocks.data();
  a.sums = sums.data();
  a.objective = static_cast<Objective>(objective);
  a.low = low, a.high = high, a.dual = dual, a.clamp = clamp;
  a.kl_coef = coefs ? value_of(*coefs, 0) : kl_coef;
  a.entropy_coef = coefs ? value_of(*coefs, 1) : entropy_coef;
  a.kl_kind = static_cast<KlKind>(kl_kind);
  const auto run = [&](auto kernel) {
    torch::stable::parallel_for(0, sequences.block_count(), kBlocksPerThread,
                                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  };

  std::vector<TokenSums> of_sequences;
  if (by_sequence || aggregation == Aggregation::seq_mean_token_mean)
    of_sequences = sequence_sums(sequences, a.wide, a.mask, a.logprob, a.old_logprob);
  const std::vector<double> weights = token_weights(aggregation, of_sequences);
  std::vector<double> log_ratio, ratio;
  for (int64_t s = 0; by_sequence && s < sequences.count; ++s) {
    const TokenSums& sum = of_sequences[s];
    log_ratio.push_back(sum.count > 0 && old ? sum.difference / sum.count : 0);
    ratio.push_back(::exp(min(clamp, max(-clamp, log_ratio[s]))));
  }
  a.weight = weights.empty() ? nullptr : weights.data();
  a.ratio = by_sequence ? ratio.data() : nullptr;
  Tensor coefficient = need ? empty_as(logprob, type) : empty({0}, type);
  Tensor entropy_coefficient = need_entropy ? empty_as(logprob, type) : empty({0}, type);
  a.coefficient = need ? coefficient.mutable_data_ptr() : nullptr;
  a.entropy_coefficient = need_entropy ? entropy_coefficient.mutable_data_ptr() : nullptr;
  run(RK_KERNEL(policy_loss_fwd_kernel));

  PolicySums total{};
  double filled = 0;  // sequences with a valid token
  int64_t last = -1;
  std::vector<double> added(by_sequence ? sequences.count : 0);
  for (int64_t b = 0; b < sequences.block_count(); ++b) {
    const int64_t s = sequences.blocks[b].sequence;
    const double weight = a.weight ? a.weight[s] : 1;
    total.loss += weight * sums[b].loss;
    total.count += sums[b].count;
    total.clipped += sums[b].clipped;
    total.kl += sums[b].kl;
    total.ratio += sums[b].ratio;
    if (sums[b].ratio_max > total.ratio_max) total.ratio_max = sums[b].ratio_max;
    if (sums[b].count > 0 && s != last) filled += 1, last = s;
    if (by_sequence && sums[b].count > 0 && !(abs(log_ratio[s]) > clamp))
      added[s] += weight * sums[b].slope / of_sequences[s].count;
  }
  if (by_sequence && need && a.objective == Objective::ppo) {
    a.added = added.data();
    run(RK_KERNEL(policy_loss_add_kernel));
  }
  if (total.ratio != total.ratio) total.ratio_max = total.ratio;  // NaN: a maximum drops it
  const double inverse = inverse_denominator(aggregation, total.count, filled, normalizer,
                                             normalizer_value, max_length);
  return {scalar(inverse == 0 ? 0 : total.loss * inverse, type),
          vector_of({total.count, total.clipped, total.kl, total.ratio, total.ratio_max, inverse}),
          coefficient, entropy_coefficient};
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("policy_loss_fwd", TORCH_BOX(&policy_loss_fwd));
  m.impl("policy_loss_bwd", TORCH_BOX(&scale_coefficient));
}

}  // namespace rlhf_kernels
#endif
