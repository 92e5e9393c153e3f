// token_logprob on the CPU: log-probability of given tokens and entropy, one read of the logits.
// No vocabulary-sized tensor is made but the gradient. Each row is handled by one thread, in blocks
// fixed by V alone, so a row has the same bits whatever else is in the call.
#include "token_logprob.h"

namespace rlhf_kernels {
namespace RK_SIMD {

void token_logprob_fwd_kernel(const TokenLogprobArgs& a, int64_t begin, int64_t end) {
  RK_SWITCH(a.dtype, forward, a, begin, end);
}
void token_logprob_bwd_kernel(const TokenLogprobArgs& a, int64_t begin, int64_t end) {
  RK_SWITCH(a.dtype, backward, a, begin, end);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
namespace rlhf_kernels {
RK_DECLARE(token_logprob_fwd_kernel, TokenLogprobArgs)
RK_DECLARE(token_logprob_bwd_kernel, TokenLogprobArgs)

static LogprobResults token_logprob_fwd(const Tensor& logits, const Tensor& tokens_in,
                                        const std::optional<Tensor>& temperature_in,
                                        double temperature_value, int64_t ignore_index,
                                        bool with_entropy) {
  const ScalarType type = accumulation_type(logits);
  const Tensor tokens = dense(tokens_in, ScalarType::Long);
  const auto temperature = dense(temperature_in, type);
  TokenLogprobArgs a =
      token_logprob_args(logits, tokens, temperature, temperature_value, ignore_index);
  check_tokens(tokens, a.vocab, ignore_index);
  check_temperature(temperature, tokens, ignore_index);
  const LogprobResults results = allocate_results(a, logits, tokens, type, with_entropy);
  torch::stable::parallel_for(
      0, std::get<2>(results).numel(), rows_per_thread(a.vocab),
      [&](int64_t begin, int64_t end) { RK_KERNEL(token_logprob_fwd_kernel)(a, begin, end); });
  return results;
}

static void backward_into(const Tensor& grad_logits, const std::optional<Tensor>& grad_logprob_in,
                          const std::optional<Tensor>& grad_entropy_in, const Tensor& logits,
                          const Tensor& tokens_in, const std::optional<Tensor>& temperature_in,
                          double temperature_value, int64_t ignore_index, const Tensor& entropy_in,
                          const Tensor& row_max_in, const Tensor& log_sum_in) {
  const ScalarType type = accumulation_type(logits);
  const Tensor tokens = dense(tokens_in, ScalarType::Long);
  const auto temperature = dense(temperature_in, type);
  TokenLogprobArgs a =
      token_logprob_args(logits, tokens, temperature, temperature_value, ignore_index);
  check_tokens(tokens, a.vocab, ignore_index);
  const auto grad_logprob = dense(grad_logprob_in, type),
             grad_entropy = dense(grad_entropy_in, type);
  const Tensor entropy = dense(entropy_in, type), row_max = dense(row_max_in, type);
  const Tensor log_sum = dense(log_sum_in, type);
  const Tensor scratch = empty({a.per_row > 1 ? tokens.numel() : 0}, ScalarType::Double);
  a.grad_logprob = data_or_null(grad_logprob);
  a.grad_entropy = data_or_null(grad_entropy);
  a.entropy = entropy.mutable_data_ptr();
  a.row_max = row_max.mutable_data_ptr();
  a.log_sum = log_sum.mutable_data_ptr();
  a.grad_logits = grad_logits.mutable_data_ptr();
  a.grad_rows = row_strides(grad_logits, "logits");
  a.scratch = static_cast<double*>(scratch.mutable_data_ptr());
  torch::stable::parallel_for(
      0, row_max.numel(), rows_per_thread(a.vocab),
      [&](int64_t begin, int64_t end) { RK_KERNEL(token_logprob_bwd_kernel)(a, begin, end); });
}

static Tensor token_logprob_bwd(const std::optional<Tensor>& grad_logprob,
                                const std::optional<Tensor>& grad_entropy, const Tensor& logits,
                                const Tensor& tokens, const std::optional<Tensor>& temperature,
                                double temperature_value, int64_t ignore_index,
                                const Tensor& entropy, const Tensor& row_max,
                                const Tensor& log_sum) {
  Tensor grad_logits = empty_as(logits, logits.scalar_type());
  backward_into(grad_logits, grad_logprob, grad_entropy, logits, tokens, temperature,
                temperature_value, ignore_index, entropy, row_max, log_sum);
  return grad_logits;
}

// The gradient takes the place of the logits.
static void token_logprob_bwd_(const std::optional<Tensor>& grad_logprob,
                               const std::optional<Tensor>& grad_entropy, const Tensor& logits,
                               const Tensor& tokens, const std::optional<Tensor>& temperature,
                               double temperature_value, int64_t ignore_index,
                               const Tensor& entropy, const Tensor& row_max,
                               const Tensor& log_sum) {
  backward_into(logits, grad_logprob, grad_entropy, logits, tokens, temperature, temperature_value,
                ignore_index, entropy, row_max, log_sum);
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("token_logprob_fwd", TORCH_BOX(&token_logprob_fwd));
  m.impl("token_logprob_bwd", TORCH_BOX(&token_logprob_bwd));
  m.impl("token_logprob_bwd_", TORCH_BOX(&token_logprob_bwd_));
}

}  // namespace rlhf_kernels
#endif
