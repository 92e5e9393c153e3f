// What the token_logprob kernels share: arguments, the sums of a row, what is made of them.
#pragma once
#include "launch.h"
#include "row.h"

#include "math/softmax.h"

namespace rlhf_kernels {

struct TokenLogprobArgs {
  const void* logits;
  RowStrides logit_rows;
  int64_t rows, vocab;
  const int64_t* tokens;  // (rows, per_row)
  int64_t per_row;
  const void* temperature;  // (rows) in the accumulation dtype, or null: temperature_value
  double temperature_value;
  int64_t ignore_index;
  void *entropy, *row_max, *log_sum;  // (rows), entropy may be null
  void* logprob;                      // (rows, per_row)
  // A row is cut into `parts` of `part` columns, by V and the dtype alone.
  int64_t parts, part;
  void* partial;  // (rows, parts, 3) where parts > 1: maximum and sums of each part
  // backward
  const void *grad_logprob, *grad_entropy;  // (rows, per_row), (rows); may be null
  double grad_value;                        // of each log-probability where grad_logprob is null
  void* grad_logits;
  RowStrides grad_rows;
  void* scratch;  // (rows, per_row): the targets' gradients
};

inline constexpr int kThreads = 256;  // of a block, at most
inline constexpr int kHeld = 4;       // vectors a thread holds: loads in flight, elements a maximum
inline constexpr int kTiles = 4;      // tiles a part: 64 KiB of logits where the row has them
inline constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
// 2^x is 0 below: bounds exponents that are multiplied by it.
inline constexpr double kNothing = -2000;

// Of x = (z - max) scale log2 e: rest = sum 2^x over all elements but one that is the maximum, dot
// = sum x 2^x (see Softmax). Without an element the sum of all, 1 + rest, is 0.
template <class A>
struct Sums {
  A max = -INFINITY, rest = -1, dot = 0;
};

// The same elements beside the maximum `to` > max, which is another element: rest is the sum over
// all of them.
template <class A>
RK_D void raise(Sums<A>& s, A to, A scale) {
  const A d = s.max == -INFINITY ? A(0) : at_least((s.max - to) * scale, kNothing);
  const A factor = exp2_flush(d), sum = 1 + s.rest;
  s = {to, sum * factor, (s.dot + d * sum) * factor};
}

// The sums of a block from those of its threads. scratch: kWarp elements of shared memory.
template <bool kEntropy, class A>
RK_D void reduce_block(Sums<A>& s, A scale, A* scratch) {
  const A top = block_reduce<Max>(s.max, A(-INFINITY), scratch);
  const bool has_top = !(top > s.max);
  if (!has_top) raise(s, top, scale);
  const A tops = block_reduce<Sum>(A(has_top), A(0), scratch);
  s.rest = block_reduce<Sum>(s.rest, A(0), scratch) + (tops - 1);
  if constexpr (kEntropy) s.dot = block_reduce<Sum>(s.dot, A(0), scratch);
}

// One exponential an element: the maximum of all that is held comes first. Elements at the maximum
// are counted, not added, so that one can be left out.
template <bool kEntropy, class A, int kCount>
RK_D void add_tile(const A (&z)[kHeld][kCount], A scale, Sums<A>& s) {
  A top[kHeld], sum[kHeld] = {}, dot[kHeld] = {};
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    top[j] = z[j][0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) top[j] = larger(top[j], z[j][i]);
  }
  const A most = larger(larger(top[0], top[1]), larger(top[2], top[3]));
  int tops = 0;
  if (most > s.max) {
    raise(s, most, scale);
    tops = -1;
  }
  const A shift = s.max == -INFINITY ? A(0) : s.max;
#pragma unroll
  for (int j = 0; j < kHeld; ++j)
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const A d = z[j][i] - shift, x = d * scale, e = exp2_flush(x);
      const bool at_top = d == 0;  // not at a maximum of inf: there the sum is NaN
      sum[j] += at_top ? A(0) : e;
      tops += at_top;
      if constexpr (kEntropy) dot[j] = fma(e, at_least(x, kNothing), dot[j]);
    }
  s.rest += ((sum[0] + sum[1]) + (sum[2] + sum[3])) + A(tops);
  s.dot += (dot[0] + dot[1]) + (dot[2] + dot[3]);
}

template <class A>
RK_D Softmax in_nats(const Sums<A>& s) {
  return {double(s.max), double(s.rest), double(s.dot) * kLn2};
}

// The sums of a row from those of its parts, in order; part(i): the sums of part i.
template <class A, class Part>
RK_D Softmax join_parts(int64_t parts, double scale, const Part& part) {
  Softmax s = in_nats<A>(part(0));
  for (int64_t i = 1; i < parts; ++i) s = merge(s, in_nats<A>(part(i)), scale);
  return s;
}

RK_D bool in_vocab(const TokenLogprobArgs& a, int64_t token) {
  return token >= 0 && token < a.vocab;
}

// Is any token of the row scored? If not, its logits are not read.
RK_D bool row_used(const TokenLogprobArgs& a, int64_t row) {
  bool used = false;
  for (int64_t k = 0; k < a.per_row; ++k) used |= a.tokens[row * a.per_row + k] != a.ignore_index;
  return used;
}

template <class A>
RK_D double scale_of(const TokenLogprobArgs& a, int64_t row) {
  return 1 /
         (a.temperature ? double(static_cast<const A*>(a.temperature)[row]) : a.temperature_value);
}

// The log-probability of a token with logit z: 0 where ignored, NaN outside of the vocabulary.
template <class A>
RK_D A logprob_of(const TokenLogprobArgs& a, int64_t token, double z, double max, double scale,
                  double log_sum) {
  if (token == a.ignore_index) return A(0);
  return in_vocab(a, token) ? A((z - max) * scale - log_sum) : A(NAN);
}

// One warp: the statistics of a row from its sums, and the log-probabilities of its tokens.
template <class T>
RK_D void write_row(const TokenLogprobArgs& a, int64_t row, bool used, const Softmax& sums) {
  using A = typename Compute<T>::Scalar;
  const T* z = static_cast<const T*>(a.logits) + row_offset(a.logit_rows, row);
  const Softmax s = used ? sums : Softmax{0, 0, 0};
  const double log_sum = log_sum_of(s), scale = scale_of<A>(a, row);
  for (int64_t k = lane_index(); k < a.per_row; k += kWarp) {
    const int64_t i = row * a.per_row + k, token = a.tokens[i];
    const double logit = in_vocab(a, token) && token != a.ignore_index ? to_float(z[token]) : 0;
    static_cast<A*>(a.logprob)[i] = logprob_of<A>(a, token, logit, s.max, scale, log_sum);
  }
  if (lane_index() != 0) return;
  static_cast<A*>(a.row_max)[row] = A(s.max);
  static_cast<A*>(a.log_sum)[row] = A(log_sum);
  if (a.entropy) static_cast<A*>(a.entropy)[row] = A(entropy_of(s, log_sum));
}

// The upstream gradient of the log-probability of token i.
template <class A>
RK_D double upstream_of(const TokenLogprobArgs& a, int64_t i) {
  return a.grad_logprob ? double(static_cast<const A*>(a.grad_logprob)[i]) : a.grad_value;
}

// What the gradient of a row is made of. Tokens outside of the vocabulary have none.
template <class A>
struct Upstream {
  bool used = false;
  double scale = 1, total = 0, grad_entropy = 0, entropy = 0, max = 0, log_sum = 0;

  RK_D Upstream of(const TokenLogprobArgs& a, int64_t row) {
    Upstream u;
    for (int64_t k = row * a.per_row; k < (row + 1) * a.per_row; ++k) {
      if (a.tokens[k] == a.ignore_index) continue;
      u.used = true;
      if (in_vocab(a, a.tokens[k])) u.total += upstream_of<A>(a, k);
    }
    if (!u.used) return u;
    u.scale = scale_of<A>(a, row);
    if (a.grad_entropy) {
      u.grad_entropy = static_cast<const A*>(a.grad_entropy)[row];
      u.entropy = static_cast<const A*>(a.entropy)[row];
    }
    return u;
  }
};

template <class A>
RK_D void read_statistics(const TokenLogprobArgs& a, int64_t row, Upstream<A>& u) {
  u.max = static_cast<const A*>(a.row_max)[row];
  u.log_sum = static_cast<const A*>(a.log_sum)[row];
}

// The upstream gradient of a token, which may be scored more than once in its row.
template <class A>
RK_D double own_upstream(const TokenLogprobArgs& a, int64_t row, int64_t token) {
  double own = 0;
  for (int64_t k = row * a.per_row; k < (row + 1) * a.per_row; ++k)
    if (a.tokens[k] == token) own += upstream_of<A>(a, k);
  return own;
}

// The gradient of the logit z of a token with the upstream gradient `own`: own (1 - p) from expm1.
template <class A>
RK_D A target_of(double own, double z, const Upstream<A>& u) {
  const double log_p = (z - u.max) * u.scale - u.log_sum;
  return z == -INFINITY && u.max != -INFINITY
             ? A(0)
             : A(target_gradient(log_p, own, u.total, u.grad_entropy, u.entropy) * u.scale);
}

// The gradients of a vector of logits as if none were a target, in place of the logits.
template <bool kEntropy, class A, int kCount>
RK_D void gradients(A (&z)[kCount], const Upstream<A>& u) {
  const A max = A(u.max), scale = A(u.scale * kLog2E), log_sum = A(u.log_sum * kLog2E);
  const A G = A(u.total * u.scale), h = A(u.grad_entropy * u.scale), H = A(u.entropy);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const A log2_p = fma(z[i] - max, scale, -log_sum), p = exp2_flush(log2_p);
    z[i] = kEntropy ? logit_gradient(p, log2_p * A(kLn2), G, h, H) : -p * G;
  }
}

// ---- launchers (token_logprob.cu) ----

// The threads of a block for `columns` columns of T, and the parts that a row is cut into: the same
// for all kernels that sum up a row, so that all get the same bits.
template <class T>
int cut(TokenLogprobArgs& a, int64_t columns) {
  const int64_t warps = ceil_div(columns, kHeld * kLanes<T> * kWarp);
  const int threads = kWarp * static_cast<int>(warps < 1 ? 1 : warps < 8 ? warps : 8);
  a.part = int64_t(threads) * kHeld * kLanes<T> * kTiles;
  a.parts = columns > a.part ? ceil_div(columns, a.part) : 1;
  return threads;
}

// The arguments that all share. The tensors must outlive the struct.
TokenLogprobArgs token_logprob_args(const Tensor& logits, const Tensor& tokens,
                                    const std::optional<Tensor>& temperature,
                                    double temperature_value, int64_t ignore_index);

using LogprobResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// logprob, entropy (empty if not asked for), row_max and log_sum, uninitialised, noted in `a`.
LogprobResults allocate_results(TokenLogprobArgs& a, const Tensor& logits, const Tensor& tokens,
                                ScalarType type, bool with_entropy);

LogprobResults token_logprob_fwd(const Tensor& logits, const Tensor& tokens,
                                 const std::optional<Tensor>& temperature, double temperature_value,
                                 int64_t ignore_index, bool with_entropy);

// grad_value: of each log-probability where grad_logprob is missing.
void token_logprob_bwd_into(const Tensor& grad_logits, const std::optional<Tensor>& grad_logprob,
                            double grad_value, const std::optional<Tensor>& grad_entropy,
                            const Tensor& logits, const Tensor& tokens,
                            const std::optional<Tensor>& temperature, double temperature_value,
                            int64_t ignore_index, const Tensor& entropy, const Tensor& row_max,
                            const Tensor& log_sum);

}  // namespace rlhf_kernels
