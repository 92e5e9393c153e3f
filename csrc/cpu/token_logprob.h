// What the token_logprob kernels share: a row's log-probabilities, and the gradient of its logits.
#pragma once
#include "simd.h"
#include "softmax.h"

namespace rlhf_kernels {

struct TokenLogprobArgs {
  DType dtype;
  const void* logits;
  RowStrides logit_rows;
  int64_t vocab;
  const int64_t* tokens;  // (rows, per_row)
  int64_t per_row;
  const void* temperature;  // (rows) in the accumulation dtype, or null: temperature_value
  double temperature_value;
  int64_t ignore_index;
  void *entropy, *row_max, *log_sum;  // (rows), entropy may be null
  void* logprob;                      // (rows, per_row)
  // backward
  const void *grad_logprob, *grad_entropy;  // (rows, per_row), (rows); may be null
  void* grad_logits;
  RowStrides grad_rows;
  double* scratch;  // (rows, per_row) where per_row > 1
};

namespace RK_SIMD {

template <class T>
static void forward(const TokenLogprobArgs& a, int64_t begin, int64_t end) {
  using A = typename Compute<T>::Scalar;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* tokens = a.tokens + row * a.per_row;
    A* logprob = static_cast<A*>(a.logprob) + row * a.per_row;
    bool used = false;
    for (int64_t k = 0; k < a.per_row; ++k) used |= tokens[k] != a.ignore_index;
    Softmax s{0, 0, 0};
    double log_sum = 0, scale = 1;
    const T* z = static_cast<const T*>(a.logits) + row_offset(a.logit_rows, row);
    if (used) {  // an ignored row is not read
      scale = 1 / (a.temperature ? double(static_cast<const A*>(a.temperature)[row])
                                 : a.temperature_value);
      s = a.entropy ? softmax_row<true>(z, a.vocab, scale) : softmax_row<false>(z, a.vocab, scale);
      log_sum = log_sum_of(s);
    }
    for (int64_t k = 0; k < a.per_row; ++k)
      logprob[k] = tokens[k] == a.ignore_index
                       ? A(0)
                       : A((double(to_float(z[tokens[k]])) - s.max) * scale - log_sum);
    static_cast<A*>(a.row_max)[row] = A(s.max);
    static_cast<A*>(a.log_sum)[row] = A(log_sum);
    if (a.entropy) static_cast<A*>(a.entropy)[row] = A(entropy_of(s, log_sum));
  }
}

// The gradient of every logit as if none were a target.
template <bool kEntropy, class T, class A>
static void backward_row(const T* z, T* grad, int64_t vocab, A max, A scale, A log_sum, A total,
                         A grad_entropy, A entropy) {
  using V = typename Compute<T>::V;
  const V shift = splat<V>(max), unit = splat<V>(scale), base = splat<V>(log_sum);
  const V G = splat<V>(total * scale), h = splat<V>(grad_entropy * scale), H = splat<V>(entropy);
  for_each_vector<V>(vocab, [&](int, int64_t i, int n) RK_INLINE {
    const V log_p = (load_logits(z + i, n) - shift) * unit - base, p = exp_flush(log_p);
    const V g = kEntropy ? logit_gradient(p, log_p, G, h, H) : -p * G;
    n == lanes<V> ? store(grad + i, g) : store(grad + i, g, n);
  });
}

template <class T>
static void backward(const TokenLogprobArgs& a, int64_t begin, int64_t end) {
  using A = typename Compute<T>::Scalar;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* tokens = a.tokens + row * a.per_row;
    const T* z = static_cast<const T*>(a.logits) + row_offset(a.logit_rows, row);
    T* grad = static_cast<T*>(a.grad_logits) + row_offset(a.grad_rows, row);
    const A* upstream = static_cast<const A*>(a.grad_logprob);
    bool used = false;
    double total = 0;
    for (int64_t k = 0; k < a.per_row; ++k) {
      if (tokens[k] == a.ignore_index) continue;
      used = true;
      if (upstream) total += upstream[row * a.per_row + k];
    }
    if (!used) {
      std::memset(static_cast<void*>(grad), 0, a.vocab * sizeof(T));
      continue;
    }
    const A max = static_cast<const A*>(a.row_max)[row],
            log_sum = static_cast<const A*>(a.log_sum)[row];
    const double temperature =
        a.temperature ? double(static_cast<const A*>(a.temperature)[row]) : a.temperature_value;
    const double scale = 1 / temperature;
    const double h = a.grad_entropy ? static_cast<const A*>(a.grad_entropy)[row] : 0;
    const double entropy = a.grad_entropy ? static_cast<const A*>(a.entropy)[row] : 0;

    // The targets first, as the pass below may overwrite the logits: g (1 - p) from expm1, because
    // onehot - p cancels where p is near 1.
    double one;
    double* target = a.per_row == 1 ? &one : a.scratch + row * a.per_row;
    for (int64_t k = 0; k < a.per_row; ++k) {
      if (tokens[k] == a.ignore_index) continue;
      double own = 0;  // a token may be scored twice
      for (int64_t j = 0; upstream && j < a.per_row; ++j)
        if (tokens[j] == tokens[k]) own += upstream[row * a.per_row + j];
      const double logit = to_float(z[tokens[k]]);
      const double log_p = (logit - max) * scale - log_sum;
      target[k] = logit == -__builtin_inf() && max != logit
                      ? 0
                      : target_gradient(log_p, own, total, h, entropy) * scale;
    }
    if (a.grad_entropy)
      backward_row<true, T, A>(z, grad, a.vocab, max, A(scale), log_sum, A(total), A(h),
                               A(entropy));
    else
      backward_row<false, T, A>(z, grad, a.vocab, max, A(scale), log_sum, A(total), A(0), A(0));
    for (int64_t k = 0; k < a.per_row; ++k)
      if (tokens[k] != a.ignore_index) from_float(grad + tokens[k], A(target[k]));
  }
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include "common.h"

namespace rlhf_kernels {

// The arguments that all share. The tensors must outlive the struct.
static TokenLogprobArgs token_logprob_args(const Tensor& logits, const Tensor& tokens,
                                           const std::optional<Tensor>& temperature,
                                           double temperature_value, int64_t ignore_index) {
  check_rows(logits, "logits");
  TokenLogprobArgs a{};
  a.dtype = dtype_of(logits, "logits");
  a.logits = logits.const_data_ptr();
  a.logit_rows = row_strides(logits, "logits");
  a.vocab = logits.size(logits.dim() - 1);
  a.tokens = static_cast<const int64_t*>(tokens.const_data_ptr());
  a.per_row = tokens.dim() == logits.dim() ? tokens.size(tokens.dim() - 1) : 1;
  a.temperature = data_or_null(temperature);
  a.temperature_value = number_in(temperature_value, a.dtype);
  a.ignore_index = ignore_index;
  return a;
}

using LogprobResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// logprob, entropy (empty if not asked for), row_max and log_sum, uninitialised, noted in `a`.
static LogprobResults allocate_results(TokenLogprobArgs& a, const Tensor& logits,
                                       const Tensor& tokens, ScalarType type, bool with_entropy) {
  const int64_t dims = logits.dim() - 1;
  const int64_t* rows_shape = logits.sizes().data();
  Tensor logprob = empty_as(tokens, type);
  Tensor row_max = empty(rows_shape, dims, type), log_sum = empty(rows_shape, dims, type);
  Tensor entropy = with_entropy ? empty(rows_shape, dims, type) : empty({0}, type);
  a.logprob = logprob.mutable_data_ptr();
  a.row_max = row_max.mutable_data_ptr();
  a.log_sum = log_sum.mutable_data_ptr();
  a.entropy = with_entropy ? entropy.mutable_data_ptr() : nullptr;
  return {logprob, entropy, row_max, log_sum};
}

}  // namespace rlhf_kernels
#endif
