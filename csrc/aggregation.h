// How the launchers of per-token losses cut, count and divide (rlhf_kernels/aggregation.py).
#pragma once
#include "common.h"
#include "cpu/blocks.h"

namespace rlhf_kernels {

enum class Aggregation : int64_t {  // the order of AGGREGATIONS in Python
  token_mean,
  token_sum,
  seq_mean_token_sum,
  seq_mean_token_mean,
  seq_mean_token_sum_norm,
};

inline constexpr int64_t kBlocksPerThread = 16;

struct Sequences {
  int64_t count;
  std::vector<Block> blocks;  // in order

  // x: (B, T), or packed (N,) with offsets, or one run.
  Sequences(const Tensor& x, const std::optional<Tensor>& cu_seqlens);
  int64_t block_count() const { return static_cast<int64_t>(blocks.size()); }
};

// Sums over each sequence; x and y may be null.
std::vector<TokenSums> sequence_sums(const Sequences& sequences, bool wide, const bool* mask,
                                     const void* x, const void* y);

// What a token of each sequence weighs; empty where it is 1 for all.
std::vector<double> token_weights(Aggregation aggregation, const std::vector<TokenSums>& sums);

// 1 / denominator, 0 for a denominator of 0. tokens: the valid ones of the call; sequences: those
// that have one.
double inverse_denominator(Aggregation aggregation, double tokens, double sequences,
                           const std::optional<Tensor>& normalizer, double normalizer_value,
                           double max_length);

// coefficient * grad * (last element of totals): the backward of every loss.
Tensor scale_coefficient(const Tensor& grad, const Tensor& totals, const Tensor& coefficient);

}  // namespace rlhf_kernels
