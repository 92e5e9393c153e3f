// token_logprob and the gradient of its log-probabilities in one go: one read and one write of the
// logits. The row waits in the shared memory of a cluster's blocks; it is not read again, and no
// probability is written. Fused: forward, the clipped surrogate's slope, backward.
#include "token_logprob.h"

#include "math/policy.h"

namespace rlhf_kernels {

inline constexpr int kScratch = 1024;  // bytes of shared memory before the logits
inline constexpr int kSlots = 8;       // parts of a block whose sums have room there
inline constexpr int kMargin = 16;     // before and after them: what 16-byte accesses reach
// Blocks a multiprocessor, as 64 KiB of shared memory each allow: while one copies, others compute.
template <class T>
inline constexpr int kResident = sizeof(T) == 8 ? 2 : 3;

struct TokenLogprobAndGradArgs : TokenLogprobArgs {
  const void *old_logprob, *advantages;  // (rows) in the accumulation dtype, or null: no surrogate
  double low, high, dual;
  int64_t each;       // parts of a row that a block holds
  void* coefficient;  // (rows): the upstream gradients, for the way with two reads
};

// The slope of the clipped surrogate in the log-probability of the row's token.
template <class A>
RK_D A slope_of(const TokenLogprobAndGradArgs& a, int64_t row, A logprob) {
  return ppo_slope(static_cast<const A*>(a.advantages)[row], logprob,
                   static_cast<const A*>(a.old_logprob)[row], A(a.low), A(a.high), A(a.dual));
}

// Columns [begin, begin + count) of the row to shared memory, at the distance from a 16-byte
// boundary that they have in memory; returns where the first one is to be. Words that reach over an
// end of the row are copied by element.
template <class T>
RK_D const T* copy_part(const Row<const T>& row, int64_t begin, int64_t count, unsigned char* to) {
  const int64_t lead = skew_of(row.at + begin) / static_cast<int>(sizeof(T));
  T* held = reinterpret_cast<T*>(to);  // column begin - lead
  for (int64_t i = thread_index() * kLanes<T>; i < lead + count;
       i += int64_t(block_size()) * kLanes<T>) {
    const int64_t first = begin - lead + i;
    if (first >= 0 && first + kLanes<T> <= row.size) {
      copy16_async(held + i, row.at + first);
    } else {
#pragma unroll
      for (int j = 0; j < kLanes<T>; ++j)
        if (first + j >= 0 && first + j < row.size) held[i + j] = row.at[first + j];
    }
  }
  copy_commit();
  return held + lead;
}

// Columns [first, first + kLanes) of the part; -inf outside of it.
template <class T>
RK_D void load_held(const T* held, int64_t count, int64_t first,
                    typename Compute<T>::Scalar (&out)[kLanes<T>]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) out[i] = -INFINITY;
  if (first >= count) return;
  const T* p = held + first;
  const int skew = skew_of(p);
  const unsigned char* word = reinterpret_cast<const unsigned char*>(p) - skew;
  unpack(skew ? join(load16_shared(word), load16_shared(word + 16), skew) : load16_shared(word), p,
         out);
  if (first >= 0 && first + kLanes<T> <= count) return;
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i)
    if (first + i < 0 || first + i >= count) out[i] = -INFINITY;
}

// What one warp of each block makes of the parts' sums, for all of its threads.
struct Found {
  Softmax sums;
  double log_sum;
};

// A cluster a row; `each` parts of it a block, in order, as token_logprob_fwd_kernel sums them up.
template <class T, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    token_logprob_and_grad_kernel(const TokenLogprobAndGradArgs a) {
  using A = typename Compute<T>::Scalar;
  A* scratch = reinterpret_cast<A*>(shared_memory());
  Sums<A>* slots = reinterpret_cast<Sums<A>*>(scratch + kWarp);
  Found* found = reinterpret_cast<Found*>(shared_memory() + kScratch - sizeof(Found));
  const int64_t begin = cluster_rank() * a.each * a.part, step = block_size() * kLanes<T>;
  const int64_t share = a.each * a.part;
  const int64_t count = begin + share < a.vocab ? share : a.vocab - begin;
  for (int64_t row = block_index() / cluster_size(); row < a.rows;
       row += block_count() / cluster_size()) {
    const Row<const T> z{static_cast<const T*>(a.logits) + row_offset(a.logit_rows, row), a.vocab};
    const Row<T> grad{static_cast<T*>(a.grad_logits) + row_offset(a.grad_rows, row) + begin, count};
    const int64_t lead = skew_of(grad.at) / static_cast<int>(sizeof(T));
    const int64_t* tokens = a.tokens + row * a.per_row;
    A* logprob = static_cast<A*>(a.logprob) + row * a.per_row;
    Upstream<A> u = Upstream<A>::of(a, row);
    const T* held = nullptr;
    // The surrogate's token, before any block puts the gradient in its place.
    const bool surrogate = a.advantages != nullptr && u.used && in_vocab(a, tokens[0]);
    const double target = surrogate ? to_float(z.at[tokens[0]]) : 0;
    if (u.used) {
      held = copy_part(z, begin, count, shared_memory() + kScratch + kMargin);
      copy_wait<0>();
      sync_block();
      const A scale = A(u.scale * kLog2E);
      for (int64_t i = 0; i < a.each && i * a.part < count; ++i) {
        Sums<A> s;
        const int64_t end = (i + 1) * a.part < count ? (i + 1) * a.part : count;
        for (int64_t at = i * a.part; at < end; at += step * kHeld) {
          A x[kHeld][kLanes<T>];
#pragma unroll
          for (int j = 0; j < kHeld; ++j)
            load_held(held, count, at + thread_index() * kLanes<T> + j * step, x[j]);
          add_tile<kEntropy>(x, scale, s);
        }
        reduce_block<kEntropy>(s, scale, scratch);
        if (thread_index() == 0) slots[i] = s;
      }
      sync_cluster();
      if (warp_index() == 0) {
        const Softmax sums = join_parts<A>(a.parts, u.scale, [&](int64_t i) {
          return *remote(slots + i % a.each, static_cast<int>(i / a.each));
        });
        if (lane_index() == 0) *found = {sums, log_sum_of(sums)};
      }
      sync_block();
    }
    const Softmax sums = u.used ? found->sums : Softmax{0, 0, 0};
    const double log_sum = u.used ? found->log_sum : 0;
    u.max = sums.max;
    u.log_sum = A(log_sum);
    if (surrogate && u.total != 0)  // a weight of 0 is a choice: no 0 * inf
      u.total *= slope_of(a, row, logprob_of<A>(a, tokens[0], target, u.max, u.scale, log_sum));
    for (int64_t at = -lead + thread_index() * kLanes<T>; at < count; at += step) {
      A x[kLanes<T>] = {};
      if (u.used) {
        load_held(held, count, at, x);
        gradients<false>(x, u);
      }
      store_columns(grad, at, x);
    }
    sync_block();  // the targets' gradients come last
    for (int64_t k = thread_index(); k < a.per_row; k += block_size()) {
      const int64_t token = tokens[k], at = token - begin;
      const bool scored = token != a.ignore_index && in_vocab(a, token);
      if (scored && at >= 0 && at < count) {
        const double logit = to_float(held[at]);
        const double own = surrogate ? u.total : own_upstream<A>(a, row, token);
        from_float(grad.at + at, target_of(own, logit, u));
        logprob[k] = logprob_of<A>(a, token, logit, u.max, u.scale, log_sum);
      } else if (!scored && begin == 0) {
        logprob[k] = logprob_of<A>(a, token, 0, 0, 1, 0);
      }
    }
    if (begin == 0 && thread_index() == 0) {
      static_cast<A*>(a.row_max)[row] = A(u.max);
      static_cast<A*>(a.log_sum)[row] = A(log_sum);
      if (a.entropy) static_cast<A*>(a.entropy)[row] = A(entropy_of(sums, log_sum));
    }
    sync_cluster();  // before the next row comes, or this block leaves: others read its slot
  }
}

// The upstream gradient of each row from its log-probability; 0 where none is scored.
template <class A>
__global__ void surrogate_kernel(const TokenLogprobAndGradArgs a) {
  for (int64_t row = block_index() * block_size() + thread_index(); row < a.rows;
       row += block_count() * block_size()) {
    const bool scored = a.tokens[row] != a.ignore_index && in_vocab(a, a.tokens[row]);
    const double weight = scored ? upstream_of<A>(a, row) : 0;
    const double slope =
        weight != 0 ? slope_of(a, row, static_cast<const A*>(a.logprob)[row]) : A(0);
    static_cast<A*>(a.coefficient)[row] = A(weight * slope);
  }
}

// ---- launchers ----

// false: a row does not fit.
template <class T>
static bool run_one_read(TokenLogprobAndGradArgs a, void* stream) {
  const auto kernel =
      a.entropy ? token_logprob_and_grad_kernel<T, true> : token_logprob_and_grad_kernel<T, false>;
  const int threads = cut<T>(a, a.vocab);
  a.each = ceil_div(a.parts, most_blocks_in_cluster(kernel));
  const int cluster = static_cast<int>(ceil_div(a.parts, a.each));
  const int64_t share = a.each * a.part < a.vocab ? a.each * a.part : a.vocab;
  const int64_t bytes = share * static_cast<int64_t>(sizeof(T)) + kScratch + 4 * kMargin;
  if (bytes > most_shared_bytes() || a.each > kSlots) return a.rows == 0;
  const int64_t rows = blocks_for(a.rows, threads * cluster);
  const Grid grid{(rows > 0 ? rows : a.rows > 0) * cluster, threads, static_cast<int>(bytes),
                  cluster};
  if (!holds_cluster(kernel, grid)) return a.rows == 0;
  launch("token_logprob_and_grad", kernel, grid, stream, a);
  return true;
}

// One read where a row fits the shared memory of a cluster, else two.
static LogprobResults into(const Tensor& grad_logits, const Tensor& logits, const Tensor& tokens_in,
                           const std::optional<Tensor>& temperature_in, double temperature_value,
                           int64_t ignore_index, const std::optional<Tensor>& weight_in,
                           const std::optional<Tensor>& old_logprob_in,
                           const std::optional<Tensor>& advantages_in, double low, double high,
                           double dual, bool with_entropy) {
  const OnDevice on(logits);
  const ScalarType type = accumulation_type(logits);
  const Tensor tokens = dense(tokens_in, ScalarType::Long);
  const auto temperature = dense(temperature_in, type), weight = dense(weight_in, type);
  const auto old_logprob = dense(old_logprob_in, type), advantages = dense(advantages_in, type);
  TokenLogprobAndGradArgs a{};
  static_cast<TokenLogprobArgs&>(a) =
      token_logprob_args(logits, tokens, temperature, temperature_value, ignore_index);
  const LogprobResults results = allocate_results(a, logits, tokens, type, with_entropy);
  a.grad_logprob = data_or_null(weight);
  a.grad_value = 1;
  a.old_logprob = data_or_null(old_logprob);
  a.advantages = data_or_null(advantages);
  a.low = low;
  a.high = high;
  a.dual = dual;
  a.grad_logits = grad_logits.mutable_data_ptr();
  a.grad_rows = row_strides(grad_logits, "logits");
  const auto one_read = [&]() -> bool {
    RK_SWITCH(dtype_of(logits, "logits"), run_one_read, a, on.stream)
    return false;
  };
  if (one_read()) return results;
  const LogprobResults found =
      token_logprob_fwd(logits, tokens, temperature, temperature_value, ignore_index, with_entropy);
  const auto& [logprob, entropy, row_max, log_sum] = found;
  std::optional<Tensor> upstream = weight;
  if (advantages) {
    upstream = device_empty(logits, tokens.sizes().data(), tokens.dim(), type);
    a.logprob = logprob.mutable_data_ptr();
    a.coefficient = upstream->mutable_data_ptr();
    launch("surrogate",
           type == ScalarType::Double ? surrogate_kernel<double> : surrogate_kernel<float>,
           Grid{blocks_for(ceil_div(a.rows, kThreads), kThreads), kThreads}, on.stream, a);
  }
  token_logprob_bwd_into(grad_logits, upstream, 1, std::nullopt, logits, tokens, temperature,
                         temperature_value, ignore_index, entropy, row_max, log_sum);
  return found;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_logprob_and_grad(
    const Tensor& logits, const Tensor& tokens, const std::optional<Tensor>& temperature,
    double temperature_value, int64_t ignore_index, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& old_logprob, const std::optional<Tensor>& advantages, double low,
    double high, double dual, bool with_entropy) {
  Tensor grad_logits =
      device_empty(logits, logits.sizes().data(), logits.dim(), logits.scalar_type());
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

RK_REGISTER(m) {
  m.impl("token_logprob_and_grad", TORCH_BOX(&token_logprob_and_grad));
  m.impl("token_logprob_and_grad_", TORCH_BOX(&token_logprob_and_grad_));
}

}  // namespace rlhf_kernels
