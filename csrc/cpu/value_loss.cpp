// value_loss on the CPU: loss, statistics and, where a gradient is wanted, d loss / d values in one
// pass. The denominator is known after the last token only, so it is left to the backward.
#include "simd.h"
#include "math/value.h"
#include "blocks.h"

namespace rlhf_kernels {

struct ValueSums {  // over the valid tokens of a block
  double loss, count, clipped, error, error_square, target, target_square;
};

struct ValueLossArgs {
  bool wide;                                  // float64, else float32
  const void *values, *old_values, *returns;  // old_values may be null: nothing is clipped
  const bool* mask;
  const Block* blocks;
  ValueSums* sums;       // one a block
  const double* weight;  // one a sequence, or null: 1
  void* coefficient;     // may be null
  double clip;
};

namespace RK_SIMD {

template <class T>
static ValueSums forward_block(const ValueLossArgs& a, const Block& block) {
  using V = typename Compute<T>::V;
  using W = Wide<V>;  // float64: the variance is a difference of these sums
  const V zero = splat<V>(0.0), one = splat<V>(1.0), clip = splat<V>(a.clip);
  const V weight = splat<V>(a.weight ? a.weight[block.sequence] : 1.0);
  V losses = zero, counts = zero, clips = zero;
  W errors{}, error_squares{}, targets{}, target_squares{};
  for (int64_t i = block.begin; i < block.end; i += lanes<V>) {
    const int n = RK_STEP(V, block.end, i);
    const auto valid = valid_step(a.mask, i, n, V{});
    const V value = load_valid<T>(a.values, i, n, valid);
    const V target = load_valid<T>(a.returns, i, n, valid);
    const V old = a.old_values ? load_valid<T>(a.old_values, i, n, valid) : value;
    const ValueTerm<V> term = value_term(value, old, target, clip);
    const W wide_target = widen(target), error = wide_target - widen(value);
    losses += term.loss;
    counts += select(valid, one, zero);
    clips += term.clipped;
    errors += error;
    error_squares += error * error;
    targets += wide_target;
    target_squares += wide_target * wide_target;
    if (a.coefficient) store_step(static_cast<T*>(a.coefficient) + i, weight * term.slope, n);
  }
  return {sum_lanes(losses),        sum_lanes(counts),  sum_lanes(clips),         sum_lanes(errors),
          sum_lanes(error_squares), sum_lanes(targets), sum_lanes(target_squares)};
}

void value_loss_fwd_kernel(const ValueLossArgs& a, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    a.sums[b] =
        a.wide ? forward_block<double>(a, a.blocks[b]) : forward_block<float>(a, a.blocks[b]);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include "aggregation.h"

namespace rlhf_kernels {
RK_DECLARE(value_loss_fwd_kernel, ValueLossArgs)

static std::tuple<Tensor, Tensor, Tensor> value_loss_fwd(
    const Tensor& values_in, const std::optional<Tensor>& old_in, const Tensor& returns_in,
    const std::optional<Tensor>& mask_in, const std::optional<Tensor>& cu_seqlens,
    int64_t aggregation_code, const std::optional<Tensor>& normalizer, double normalizer_value,
    int64_t max_length, double clip, bool need) {
  const ScalarType type = accumulation_type(values_in, returns_in, old_in.value_or(values_in));
  const Tensor values = dense(values_in, type), returns = dense(returns_in, type);
  const auto old = dense(old_in, type), mask = dense(mask_in, ScalarType::Bool);
  const Sequences sequences(values, cu_seqlens);
  const auto aggregation = static_cast<Aggregation>(aggregation_code);

  std::vector<ValueSums> sums(sequences.block_count());
  ValueLossArgs a{};
  a.wide = type == ScalarType::Double;
  a.values = values.const_data_ptr();
  a.old_values = data_or_null(old);
  a.returns = returns.const_data_ptr();
  a.mask = static_cast<const bool*>(data_or_null(mask));
  a.blocks = sequences.blocks.data();
  a.sums = sums.data();
  a.clip = clip;
  std::vector<double> weights;
  if (aggregation == Aggregation::seq_mean_token_mean)
    weights =
        token_weights(aggregation, sequence_sums(sequences, a.wide, a.mask, nullptr, nullptr));
  a.weight = weights.empty() ? nullptr : weights.data();
  Tensor coefficient = need ? empty_as(values, type) : empty({0}, type);
  a.coefficient = need ? coefficient.mutable_data_ptr() : nullptr;
  torch::stable::parallel_for(
      0, sequences.block_count(), kBlocksPerThread,
      [&](int64_t begin, int64_t end) { RK_KERNEL(value_loss_fwd_kernel)(a, begin, end); });

  ValueSums total{};
  double filled = 0;  // sequences with a valid token
  int64_t last = -1;
  for (int64_t b = 0; b < sequences.block_count(); ++b) {
    const int64_t s = sequences.blocks[b].sequence;
    total.loss += (a.weight ? a.weight[s] : 1) * sums[b].loss;
    total.count += sums[b].count;
    total.clipped += sums[b].clipped;
    total.error += sums[b].error;
    total.error_square += sums[b].error_square;
    total.target += sums[b].target;
    total.target_square += sums[b].target_square;
    if (sums[b].count > 0 && s != last) filled += 1, last = s;
  }
  const double inverse = inverse_denominator(aggregation, total.count, filled, normalizer,
                                             normalizer_value, max_length);
  return {scalar(inverse == 0 ? 0 : total.loss * inverse, type),
          vector_of({total.count, total.clipped, total.error, total.error_square, total.target,
                     total.target_square, inverse}),
          coefficient};
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("value_loss_fwd", TORCH_BOX(&value_loss_fwd));
  m.impl("value_loss_bwd", TORCH_BOX(&scale_coefficient));
}

}  // namespace rlhf_kernels
#endif
