// token_logprob on CUDA: log-probability of given tokens and entropy, one read of the logits.
// No vocabulary-sized tensor is made but the gradient; no probability is written.
// Fused: maximum, sum and entropy in one pass; in the backward the gradient of both.
#include "token_logprob.h"

namespace rlhf_kernels {

// Blocks a multiprocessor: bounds the registers so that nothing is spilled.
template <class T>
inline constexpr int kResident = sizeof(T) == 8 ? 2 : 4;

// Each block sums up one part of a row. The columns that a thread gets, and the order of the sums,
// depend on the column alone.
template <class T, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    token_logprob_fwd_kernel(const TokenLogprobArgs a) {
  using A = typename Compute<T>::Scalar;
  A* scratch = reinterpret_cast<A*>(shared_memory());
  const int step = block_size() * kLanes<T>, tile = step * kHeld;
  for (int64_t work = block_index(); work < a.rows * a.parts; work += block_count()) {
    const int64_t row = work / a.parts, begin = work % a.parts * a.part;
    const int64_t end = begin + a.part < a.vocab ? begin + a.part : a.vocab;
    const Row<const T> z{static_cast<const T*>(a.logits) + row_offset(a.logit_rows, row), a.vocab};
    const bool used = row_used(a, row);
    const A scale = A(scale_of<A>(a, row) * kLog2E);
    Sums<A> s;
    for (int64_t at = begin; used && at < end; at += tile) {
      A held[kHeld][kLanes<T>];
      load_tile(z, at + thread_index() * kLanes<T>, step, at, at + tile, held);
      add_tile<kEntropy>(held, scale, s);
    }
    reduce_block<kEntropy>(s, scale, scratch);
    if (a.parts > 1) {
      A* partial = static_cast<A*>(a.partial) + work * 3;
      if (thread_index() == 0) partial[0] = s.max, partial[1] = s.rest, partial[2] = s.dot;
    } else if (warp_index() == 0) {
      write_row<T>(a, row, used, in_nats(s));
    }
  }
}

// A warp a row: puts the parts together, in order.
template <class T>
__global__ void __launch_bounds__(kThreads) token_logprob_join_kernel(const TokenLogprobArgs a) {
  using A = typename Compute<T>::Scalar;
  const int64_t warps = block_size() / kWarp;
  for (int64_t row = block_index() * warps + warp_index(); row < a.rows;
       row += block_count() * warps) {
    const double scale = scale_of<A>(a, row);
    const A* partial = static_cast<const A*>(a.partial) + row * a.parts * 3;
    const Softmax s = join_parts<A>(a.parts, scale, [&](int64_t i) {
      return Sums<A>{partial[3 * i], partial[3 * i + 1], partial[3 * i + 2]};
    });
    write_row<T>(a, row, row_used(a, row), s);
  }
}

// Each block writes one part of a row's gradient; the parts are cut on the 16-byte boundaries of
// the gradient, as nothing is summed up here. The gradient may take the place of the logits: a
// block reads the logits of its targets before it writes, and writes the targets last.
template <class T, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    token_logprob_bwd_kernel(const TokenLogprobArgs a) {
  using A = typename Compute<T>::Scalar;
  const int step = block_size() * kLanes<T>, tile = step * kHeld;
  for (int64_t work = block_index(); work < a.rows * a.parts; work += block_count()) {
    const int64_t row = work / a.parts;
    const Row<const T> z{static_cast<const T*>(a.logits) + row_offset(a.logit_rows, row), a.vocab};
    const Row<T> grad{static_cast<T*>(a.grad_logits) + row_offset(a.grad_rows, row), a.vocab};
    const int64_t lead = skew_of(grad.at) / static_cast<int>(sizeof(T));
    const int64_t begin = work % a.parts * a.part - lead;
    const int64_t end = begin + a.part < a.vocab ? begin + a.part : a.vocab;
    Upstream<A> u = Upstream<A>::of(a, row);
    if (u.used) read_statistics(a, row, u);
    const int64_t* tokens = a.tokens + row * a.per_row;
    A* targets = static_cast<A*>(a.scratch) + row * a.per_row;
    const auto mine = [&](int64_t token) {
      return token != a.ignore_index && token >= 0 && token >= begin && token < end;
    };
    for (int64_t k = thread_index(); k < a.per_row; k += block_size())
      if (mine(tokens[k]))
        targets[k] = target_of(own_upstream<A>(a, row, tokens[k]), to_float(z.at[tokens[k]]), u);
    sync_block();
    for (int64_t at = begin; at < end; at += tile) {
      const int64_t first = at + thread_index() * kLanes<T>;
      A held[kHeld][kLanes<T>] = {};
      if (u.used) load_tile(z, first, step, at, at + tile, held);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        if (u.used) gradients<kEntropy>(held[j], u);
        store_columns(grad, first + j * step, held[j]);
      }
    }
    sync_block();
    for (int64_t k = thread_index(); k < a.per_row; k += block_size())
      if (mine(tokens[k])) from_float(grad.at + tokens[k], targets[k]);
  }
}

// ---- launchers ----

TokenLogprobArgs token_logprob_args(const Tensor& logits, const Tensor& tokens,
                                    const std::optional<Tensor>& temperature,
                                    double temperature_value, int64_t ignore_index) {
  check_rows(logits, "logits");
  TokenLogprobArgs a{};
  const int64_t dims = logits.dim();
  a.logits = logits.const_data_ptr();
  a.logit_rows = row_strides(logits, "logits");
  a.vocab = logits.size(dims - 1);
  a.rows = 1;
  for (int64_t d = 0; d < dims - 1; ++d) a.rows *= logits.size(d);
  a.tokens = static_cast<const int64_t*>(tokens.const_data_ptr());
  a.per_row = tokens.dim() == dims ? tokens.size(dims - 1) : 1;
  a.temperature = data_or_null(temperature);
  a.temperature_value = number_in(temperature_value, dtype_of(logits, "logits"));
  a.ignore_index = ignore_index;
  if (checking()) {
    const Tensor values = on_cpu(tokens);
    check_tokens(values, a.vocab, ignore_index);
    if (temperature) check_temperature(on_cpu(*temperature), values, ignore_index);
  }
  return a;
}

template <class T>
static Grid grid_of(TokenLogprobArgs& a, int64_t columns) {
  const int threads = cut<T>(a, columns);
  return {blocks_for(a.rows * a.parts, threads), threads, kWarp * static_cast<int>(sizeof(double))};
}

template <class T>
static void run_forward(TokenLogprobArgs a, const Tensor& logits, ScalarType type, void* stream) {
  const Grid grid = grid_of<T>(a, a.vocab);
  const Tensor partial = device_empty(logits, {a.parts > 1 ? a.rows * a.parts * 3 : 0}, type);
  a.partial = partial.mutable_data_ptr();
  launch("token_logprob_fwd",
         a.entropy ? token_logprob_fwd_kernel<T, true> : token_logprob_fwd_kernel<T, false>, grid,
         stream, a);
  if (a.parts == 1) return;
  launch("token_logprob_fwd", token_logprob_join_kernel<T>,
         Grid{blocks_for(ceil_div(a.rows, kThreads / kWarp), kThreads), kThreads}, stream, a);
}

template <class T>
static void run_backward(TokenLogprobArgs a, void* stream) {
  const Grid grid = grid_of<T>(a, a.vocab + kLanes<T> - 1);  // with the columns before a boundary
  launch("token_logprob_bwd",
         a.grad_entropy ? token_logprob_bwd_kernel<T, true> : token_logprob_bwd_kernel<T, false>,
         grid, stream, a);
}

LogprobResults allocate_results(TokenLogprobArgs& a, const Tensor& logits, const Tensor& tokens,
                                ScalarType type, bool with_entropy) {
  const int64_t* rows_shape = logits.sizes().data();
  const int64_t dims = logits.dim() - 1;
  Tensor logprob = device_empty(logits, tokens.sizes().data(), tokens.dim(), type);
  Tensor row_max = device_empty(logits, rows_shape, dims, type);
  Tensor log_sum = device_empty(logits, rows_shape, dims, type);
  Tensor entropy =
      with_entropy ? device_empty(logits, rows_shape, dims, type) : device_empty(logits, {0}, type);
  a.logprob = logprob.mutable_data_ptr();
  a.row_max = row_max.mutable_data_ptr();
  a.log_sum = log_sum.mutable_data_ptr();
  a.entropy = with_entropy ? entropy.mutable_data_ptr() : nullptr;
  return {logprob, entropy, row_max, log_sum};
}

LogprobResults token_logprob_fwd(const Tensor& logits, const Tensor& tokens_in,
                                 const std::optional<Tensor>& temperature_in,
                                 double temperature_value, int64_t ignore_index,
                                 bool with_entropy) {
  const OnDevice on(logits);
  const ScalarType type = accumulation_type(logits);
  const Tensor tokens = dense(tokens_in, ScalarType::Long);
  const auto temperature = dense(temperature_in, type);
  TokenLogprobArgs a =
      token_logprob_args(logits, tokens, temperature, temperature_value, ignore_index);
  const LogprobResults results = allocate_results(a, logits, tokens, type, with_entropy);
  const auto run = [&] {
    RK_SWITCH(dtype_of(logits, "logits"), run_forward, a, logits, type, on.stream)
  };
  run();
  return results;
}

void token_logprob_bwd_into(const Tensor& grad_logits, const std::optional<Tensor>& grad_logprob_in,
                            double grad_value, const std::optional<Tensor>& grad_entropy_in,
                            const Tensor& logits, const Tensor& tokens_in,
                            const std::optional<Tensor>& temperature_in, double temperature_value,
                            int64_t ignore_index, const Tensor& entropy_in,
                            const Tensor& row_max_in, const Tensor& log_sum_in) {
  const OnDevice on(logits);
  const ScalarType type = accumulation_type(logits);
  const Tensor tokens = dense(tokens_in, ScalarType::Long);
  const auto temperature = dense(temperature_in, type);
  TokenLogprobArgs a =
      token_logprob_args(logits, tokens, temperature, temperature_value, ignore_index);
  const auto grad_logprob = dense(grad_logprob_in, type),
             grad_entropy = dense(grad_entropy_in, type);
  const Tensor entropy = dense(entropy_in, type), row_max = dense(row_max_in, type);
  const Tensor log_sum = dense(log_sum_in, type);
  const Tensor scratch = device_empty(logits, {tokens.numel()}, type);
  a.grad_logprob = data_or_null(grad_logprob);
  a.grad_value = grad_value;
  a.grad_entropy = data_or_null(grad_entropy);
  a.entropy = entropy.mutable_data_ptr();
  a.row_max = row_max.mutable_data_ptr();
  a.log_sum = log_sum.mutable_data_ptr();
  a.scratch = scratch.mutable_data_ptr();
  a.grad_logits = grad_logits.mutable_data_ptr();
  a.grad_rows = row_strides(grad_logits, "logits");
  RK_SWITCH(dtype_of(logits, "logits"), run_backward, a, on.stream)
}

static Tensor token_logprob_bwd(const std::optional<Tensor>& grad_logprob,
                                const std::optional<Tensor>& grad_entropy, const Tensor& logits,
                                const Tensor& tokens, const std::optional<Tensor>& temperature,
                                double temperature_value, int64_t ignore_index,
                                const Tensor& entropy, const Tensor& row_max,
                                const Tensor& log_sum) {
  Tensor grad_logits =
      device_empty(logits, logits.sizes().data(), logits.dim(), logits.scalar_type());
  token_logprob_bwd_into(grad_logits, grad_logprob, 0, grad_entropy, logits, tokens, temperature,
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
  token_logprob_bwd_into(logits, grad_logprob, 0, grad_entropy, logits, tokens, temperature,
                         temperature_value, ignore_index, entropy, row_max, log_sum);
}

RK_REGISTER(m) {
  m.impl("token_logprob_fwd", TORCH_BOX(&token_logprob_fwd));
  m.impl("token_logprob_bwd", TORCH_BOX(&token_logprob_bwd));
  m.impl("token_logprob_bwd_", TORCH_BOX(&token_logprob_bwd_));
}

}  // namespace rlhf_kernels
