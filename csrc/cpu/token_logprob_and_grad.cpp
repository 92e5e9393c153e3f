// token_logprob and the gradient of its log-probabilities in one go: a row is read, and then again
// from the cache for its gradient, which may take its place.
#include "token_logprob.h"

#include "math/policy.h"

namespace rlhf_kernels {

struct TokenLogprobAndGradArgs : TokenLogprobArgs {
  const void *weight, *old_logprob, *advantages;  // (rows, per_row) or null; (rows) or null
  double low, high, dual;
  void* coefficient;  // (rows, per_row): the upstream gradients that come of them
};

namespace RK_SIMD {

template <class T>
static void forward_and_backward(const TokenLogprobAndGradArgs& a, int64_t begin, int64_t end) {
  using A = typename Compute<T>::Scalar;
  const auto number = [](const void* p, int64_t i) { return static_cast<const A*>(p)[i]; };
  for (int64_t row = begin; row < end; ++row) {
    forward<T>(a, row, row + 1);
    for (int64_t i = row * a.per_row; i < (row + 1) * a.per_row; ++i) {
      A coefficient = a.weight ? number(a.weight, i) : A(1);
      if (a.advantages && coefficient != 0)  // a weight of 0 is a choice: no 0 * inf
        coefficient *= ppo_slope(number(a.advantages, i), number(a.logprob, i),
                                 number(a.old_logprob, i), A(a.low), A(a.high), A(a.dual));
      static_cast<A*>(a.coefficient)[i] = coefficient;
    }
    backward<T>(a, row, row + 1);
  }
}

void token_logprob_and_grad_kernel(const TokenLogprobAndGradArgs& a, int64_t begin, int64_t end) {
  RK_SWITCH(a.dtype, forward_and_backward, a, begin, end);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
namespace rlhf_kernels {
RK_DECLARE(token_logprob_and_grad_kernel, TokenLogprobAndGradArgs)

static LogprobResults into(const Tensor& grad_logits, const Tensor& logits, const Tensor& tokens_in,
                           const std::optional<Tensor>& temperature_in, double temperature_value,
                           int64_t ignore_index, const std::optional<Tensor>& weight_in,
                           const std::optional<Tensor>& old_logprob_in,
                           const std::optional<Tensor>& advantages_in, double low, double high,
                           double dual, bool with_entropy) {
  const ScalarType type = accumulation_type(logits);
  const Tensor tokens = dense(tokens_in, ScalarType::Long);
  const auto temperature = dense(temperature_in, type), weight = dense(weight_in, type);
  const auto old_logprob = dense(old_logprob_in, type), advantages = dense(advantages_in, type);
  TokenLogprobAndGradArgs a{};
  static_cast<TokenLogprobArgs&>(a) =
      token_logprob_args(logits, tokens, temperature, temperature_value, ignore_index);
  check_tokens(tokens, a.vocab, ignore_index);
  check_temperature(temperature, tokens, ignore_index);
  const LogprobResults results = allocate_results(a, logits, tokens, type, with_entropy);
  const Tensor coefficient = empty_as(tokens, type);
  const Tensor scratch = empty({a.per_row > 1 ? tokens.numel() : 0}, ScalarType::Double);
  a.weight = data_or_null(weight);
  a.old_logprob = data_or_null(old_logprob);
  a.advantages = data_or_null(advantages);
  a.low = low;
  a.high = high;
  a.dual = dual;
  a.grad_logprob = a.coefficient = coefficient.mutable_data_ptr();
  a.grad_logits = grad_logits.mutable_data_ptr();
  a.grad_rows = row_strides(grad_logits, "logits");
  a.scratch = static_cast<double*>(scratch.mutable_data_ptr());
  torch::stable::parallel_for(
      0, std::get<2>(results).numel(), rows_per_thread(a.vocab),
      [&](int64_t begin, int64_t end) { RK_KERNEL(token_logprob_and_grad_kernel)(a, begin, end); });
  return results;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_logprob_and_grad(
    const Tensor& logits, const Tensor& tokens, const std::optional<Tensor>& temperature,
    double temperature_value, int64_t ignore_index, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& old_logprob, const std::optional<Tensor>& advantages, double low,
    double high, double dual, bool with_entropy) {
  Tensor grad_logits = empty_as(logits, logits.scalar_type());
  return std::tuple_cat(
      into(grad_logits, logits, tokens, temperature, temperature_value, ignore_index, weight,
           old_logprob, advantages, low, high, dual, with_entropy),
      std::tuple(grad_logits));
}

// The gradient takes the place of the logits.
static LogprobResults token_logprob_and_grad_(const Tensor& logits, const Tensor& tokens,
                                              const std::optional<Tensor>& temperature,
                                              double temperature_value, int64_t ignore_index,
                                              const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& old_logprob,
                                              const std::optional<Tensor>& advantages, double low,
                                              double high, double dual, bool with_entropy) {
  return into(logits, logits, tokens, temperature, temperature_value, ignore_index, weight,
              old_logprob, advantages, low, high, dual, with_entropy);
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("token_logprob_and_grad", TORCH_BOX(&token_logprob_and_grad));
  m.impl("token_logprob_and_grad_", TORCH_BOX(&token_logprob_and_grad_));
}

}  // namespace rlhf_kernels
#endif
