// What the per-token losses share on the CPU: sums per sequence before the main pass, and the
// backward, which is the coefficient times one number (8 bytes a token in float32).
#include "blocks.h"

namespace rlhf_kernels {

struct TokenSumsArgs {
  bool wide;  // float64, else float32
  const bool* mask;
  const void *x, *y;
  const Block* blocks;
  TokenSums* sums;  // one a block
};

struct ScaleArgs {
  bool wide;
  const void* coefficient;
  void* grad;
  double scale;
};

namespace RK_SIMD {

template <class T>
static void token_sums(const TokenSumsArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  const V zero = splat<V>(0.0), one = splat<V>(1.0);
  for (int64_t b = begin; b < end; ++b) {
    const Block block = a.blocks[b];
    V count = zero, difference = zero;
    for (int64_t i = block.begin; i < block.end; i += lanes<V>) {
      const int n = RK_STEP(V, block.end, i);
      const auto valid = valid_step(a.mask, i, n, V{});
      count += select(valid, one, zero);
      difference += load_valid<T>(a.x, i, n, valid) - load_valid<T>(a.y, i, n, valid);
    }
    a.sums[b] = {sum_lanes(count), sum_lanes(difference)};
  }
}

template <class T>
static void scale(const ScaleArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  const V factor = splat<V>(a.scale);
  for (int64_t i = begin; i < end; i += lanes<V>) {
    const int n = RK_STEP(V, end, i);
    const V x = load_step<V>(static_cast<const T*>(a.coefficient) + i, n);
    store_step(static_cast<T*>(a.grad) + i, x * factor, n);
  }
}

void token_sums_kernel(const TokenSumsArgs& a, int64_t begin, int64_t end) {
  a.wide ? token_sums<double>(a, begin, end) : token_sums<float>(a, begin, end);
}
void scale_kernel(const ScaleArgs& a, int64_t begin, int64_t end) {
  a.wide ? scale<double>(a, begin, end) : scale<float>(a, begin, end);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include "aggregation.h"

namespace rlhf_kernels {
RK_DECLARE(token_sums_kernel, TokenSumsArgs)
RK_DECLARE(scale_kernel, ScaleArgs)

Sequences::Sequences(const Tensor& x, const std::optional<Tensor>& cu_seqlens) : count(1) {
  const auto cut = [&](int64_t sequence, int64_t begin, int64_t end) {
    for (; begin < end; begin += kBlock)
      blocks.push_back({sequence, begin, begin + kBlock < end ? begin + kBlock : end});
  };
  blocks.reserve(x.numel() / kBlock + 1);
  if (cu_seqlens) {
    const Tensor offsets = checked_offsets(*cu_seqlens, x.numel(), "cu_seqlens");
    const int64_t* p = offsets.const_data_ptr<int64_t>();
    count = offsets.numel() - 1;
    for (int64_t s = 0; s < count; ++s) cut(s, p[s], p[s + 1]);
  } else if (x.dim() == 2) {
    count = x.size(0);
    for (int64_t s = 0; s < count; ++s) cut(s, s * x.size(1), (s + 1) * x.size(1));
  } else {
    cut(0, 0, x.numel());
  }
}

std::vector<TokenSums> sequence_sums(const Sequences& sequences, bool wide, const bool* mask,
                                     const void* x, const void* y) {
  std::vector<TokenSums> of_blocks(sequences.block_count()), sums(sequences.count, TokenSums{0, 0});
  const TokenSumsArgs a{wide, mask, x, y, sequences.blocks.data(), of_blocks.data()};
  torch::stable::parallel_for(
      0, sequences.block_count(), kBlocksPerThread,
      [&](int64_t begin, int64_t end) { RK_KERNEL(token_sums_kernel)(a, begin, end); });
  for (int64_t b = 0; b < sequences.block_count(); ++b) {
    TokenSums& sum = sums[sequences.blocks[b].sequence];
    sum.count += of_blocks[b].count;
    sum.difference += of_blocks[b].difference;
  }
  return sums;
}

std::vector<double> token_weights(Aggregation aggregation, const std::vector<TokenSums>& sums) {
  std::vector<double> weights;
  if (aggregation == Aggregation::seq_mean_token_mean)
    for (const TokenSums& sum : sums) weights.push_back(sum.count > 0 ? 1 / sum.count : 0);
  return weights;
}

double inverse_denominator(Aggregation aggregation, double tokens, double sequences,
                           const std::optional<Tensor>& normalizer, double normalizer_value,
                           double max_length) {
  double count = aggregation == Aggregation::token_mean  ? tokens
                 : aggregation == Aggregation::token_sum ? 1
                                                         : sequences;
  if (normalizer)
    count = value_of(dense(*normalizer, ScalarType::Double));
  else if (normalizer_value >= 0)
    count = normalizer_value;
  return count == 0 ? 0 : 1 / (count * max_length);
}

Tensor scale_coefficient(const Tensor& grad, const Tensor& totals, const Tensor& coefficient_in) {
  const ScalarType type = coefficient_in.scalar_type();
  const Tensor coefficient = dense(coefficient_in, type);
  Tensor out = empty_as(coefficient, type);
  const double scale = value_of(dense(grad, type)) * value_of(totals, totals.numel() - 1);
  const ScaleArgs a{type == ScalarType::Double, coefficient.const_data_ptr(),
                    out.mutable_data_ptr(), scale};
  torch::stable::parallel_for(
      0, out.numel(), kBlocksPerThread * kBlock,
      [&](int64_t begin, int64_t end) { RK_KERNEL(scale_kernel)(a, begin, end); });
  return out;
}

}  // namespace rlhf_kernels
#endif
