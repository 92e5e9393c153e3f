// logprob_kl on the CPU: log-probabilities of a token under a policy and a reference, exact KL over
// the vocabulary and the policy's entropy, in one read of both logits. The policy's numbers have
// the same bits as token_logprob's: its sums are taken by the same steps in the same order.
#include "softmax.h"

namespace rlhf_kernels {

struct LogprobKlArgs {
  DType dtype;
  const void *logits, *ref_logits;
  RowStrides logit_rows, ref_rows;
  int64_t vocab;
  const int64_t* tokens;    // (rows)
  const void* temperature;  // (rows) in the accumulation dtype, or null: temperature_value
  double temperature_value;
  int64_t ignore_index;
  void *logprob, *ref_logprob, *kl, *entropy;           // (rows)
  void *row_max, *log_sum, *ref_row_max, *ref_log_sum;  // (rows)
  const void *grad_logprob, *grad_kl, *grad_entropy;    // backward: (rows), may be null
  void* grad_logits;                                    // contiguous
};

namespace RK_SIMD {

struct KlSums {
  Softmax policy, reference;
  double cross;  // sum e^s (d - d_ref), times the scale: sum e^s (s - s_ref)
};

template <bool kOwn, bool kRefOwn, class T>
static KlSums kl_block(const T* z, const T* ref, int64_t size, double base, double ref_base,
                       double scale) {
  using V = typename Compute<T>::V;
  BlockSums<V> acc[kUnroll], ref_acc[kUnroll];
  V cross[kUnroll];
  for (V& c : cross) c = splat<V>(0);
  for_each_vector<V>(size, [&](int u, int64_t i, int n) RK_INLINE {
    const V x = load_logits(z + i, n), y = load_logits(ref + i, n), unit = splat<V>(scale);
    const V d = x - splat<V>(base), ref_d = y - splat<V>(ref_base), apart = d - ref_d;
    const V e = softmax_step<true, kOwn>(x, d, unit, &acc[u]);
    softmax_step<false, kRefOwn>(y, ref_d, unit, &ref_acc[u]);
    // p = 0: the term is 0, also where the reference has probability 0 too (inf - inf).
    cross[u] = cross[u] + select(e == splat<V>(0), splat<V>(0), e * apart);
  });
  KlSums out{collect<kOwn>(acc), collect<kRefOwn>(ref_acc), 0};
  for (const V& c : cross) out.cross += sum_lanes(c);
  return out;
}

template <class T>
static KlSums kl_block(const T* z, const T* ref, int64_t size, Base base, Base ref_base,
                       double scale) {
  const auto block = base.own
                         ? (ref_base.own ? kl_block<true, true, T> : kl_block<true, false, T>)
                         : (ref_base.own ? kl_block<false, true, T> : kl_block<false, false, T>);
  return block(z, ref, size, base.at, ref_base.at, scale);
}

// What `cross` of elements with the sum `sum` is when their two bases move from `base` and
// `ref_base` to `to` and `ref_to`. 0 where p of all of them becomes 0, in the range of A.
template <class A>
static double move(double cross, double sum, double base, double ref_base, double to, double ref_to,
                   double scale) {
  constexpr double kLeast = sizeof(A) == 4 ? __FLT_MIN__ : __DBL_MIN__;
  const double factor = ::exp(distance(base, to, scale));
  if (factor < kLeast || sum == 0) return 0;
  return cross * factor + ((base - to) - (ref_base - ref_to)) * (sum * factor);
}

static double finite_or(double x, double otherwise) {
  return x == -__builtin_inf() ? otherwise : x;
}

template <class A>
static KlSums with_block(const KlSums& row, const KlSums& block, Base base, Base ref_base,
                         double scale) {
  KlSums out{with_block(row.policy, block.policy, base, scale),
             with_block(row.reference, block.reference, ref_base, scale), 0};
  const double to = finite_or(out.policy.max, base.at);
  const double ref_to = finite_or(out.reference.max, ref_base.at);
  out.cross =
      move<A>(row.cross, sum_of(row.policy), finite_or(row.policy.max, to),
              finite_or(row.reference.max, ref_to), to, ref_to, scale) +
      move<A>(block.cross, block.policy.rest + base.own, base.at, ref_base.at, to, ref_to, scale);
  return out;
}

template <class T>
static KlSums kl_row(const T* z, const T* ref, int64_t vocab, double scale) {
  KlSums row{kNoElements, kNoElements, 0};
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t size = vocab - start < kBlock ? vocab - start : kBlock;
    Base base = first_base(row.policy, z + start, size);
    Base ref_base = first_base(row.reference, ref + start, size);
    KlSums block = kl_block(z + start, ref + start, size, base, ref_base, scale);
    const bool again = outgrown(row.policy, block.policy, base, scale);
    const bool ref_again = outgrown(row.reference, block.reference, ref_base, scale);
    if (again) base = {block.policy.max, true};
    if (ref_again) ref_base = {block.reference.max, true};
    if (again || ref_again) block = kl_block(z + start, ref + start, size, base, ref_base, scale);
    row = with_block<typename Compute<T>::Scalar>(row, block, base, ref_base, scale);
  }
  return row;
}

template <class A>
static double scale_of(const LogprobKlArgs& a, int64_t row) {
  return 1 /
         (a.temperature ? double(static_cast<const A*>(a.temperature)[row]) : a.temperature_value);
}

template <class T>
static void forward(const LogprobKlArgs& a, int64_t begin, int64_t end) {
  using A = typename Compute<T>::Scalar;
  const auto put = [](void* to, int64_t row, double x)
                       RK_INLINE { static_cast<A*>(to)[row] = A(x); };
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = a.tokens[row];
    KlSums k{{0, 0, 0}, {0, 0, 0}, 0};
    double logprob = 0, ref_logprob = 0, scale = 1;
    if (token != a.ignore_index) {  // an ignored row is not read
      const T* z = static_cast<const T*>(a.logits) + row_offset(a.logit_rows, row);
      const T* ref = static_cast<const T*>(a.ref_logits) + row_offset(a.ref_rows, row);
      scale = scale_of<A>(a, row);
      k = kl_row(z, ref, a.vocab, scale);
      logprob = (double(to_float(z[token])) - k.policy.max) * scale - log_sum_of(k.policy);
      ref_logprob =
          (double(to_float(ref[token])) - k.reference.max) * scale - log_sum_of(k.reference);
    }
    const double log_sum = log_sum_of(k.policy), ref_log_sum = log_sum_of(k.reference);
    put(a.logprob, row, logprob);
    put(a.ref_logprob, row, ref_logprob);
    put(a.kl, row,
        at_least(k.cross / sum_of(k.policy) * scale - log_sum + ref_log_sum,
                 0.0));  // but for rounding
    put(a.entropy, row, entropy_of(k.policy, log_sum));
    put(a.row_max, row, k.policy.max);
    put(a.log_sum, row, log_sum);
    put(a.ref_row_max, row, k.reference.max);
    put(a.ref_log_sum, row, ref_log_sum);
  }
}

template <class T>
static void backward(const LogprobKlArgs& a, int64_t begin, int64_t end) {
  using A = typename Compute<T>::Scalar;
  using V = typename Compute<T>::V;
  const auto at = [](const void* from, int64_t row)
                      RK_INLINE { return from ? static_cast<const A*>(from)[row] : A(0); };
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = a.tokens[row];
    T* grad = static_cast<T*>(a.grad_logits) + row * a.vocab;
    if (token == a.ignore_index) {
      std::memset(static_cast<void*>(grad), 0, a.vocab * sizeof(T));
      continue;
    }
    const T* z = static_cast<const T*>(a.logits) + row_offset(a.logit_rows, row);
    const T* ref = static_cast<const T*>(a.ref_logits) + row_offset(a.ref_rows, row);
    const double scale = scale_of<A>(a, row);
    const A max = at(a.row_max, row), log_sum = at(a.log_sum, row), kl = at(a.kl, row);
    const A ref_max = at(a.ref_row_max, row), ref_log_sum = at(a.ref_log_sum, row);
    const A g = at(a.grad_logprob, row), g_kl = at(a.grad_kl, row), g_H = at(a.grad_entropy, row);
    const A H = at(a.entropy, row);
    const V unit = splat<V>(scale);
    for_each_vector<V>(a.vocab, [&](int, int64_t i, int n) RK_INLINE {
      const V log_p = (load_logits(z + i, n) - splat<V>(max)) * unit - splat<V>(log_sum);
      const V p = exp_flush(log_p);
      V out = logit_gradient(p, log_p, splat<V>(g), splat<V>(g_H), splat<V>(H));
      if (a.grad_kl) {
        const V log_q =
            (load_logits(ref + i, n) - splat<V>(ref_max)) * unit - splat<V>(ref_log_sum);
        out = out + splat<V>(g_kl) * kl_gradient(p, log_p, log_q, splat<V>(kl));
      }
      out = out * unit;
      n == lanes<V> ? store(grad + i, out) : store(grad + i, out, n);
    });
    const double logit = to_float(z[token]);
    if (logit == -__builtin_inf()) continue;
    const double log_p = (logit - max) * scale - log_sum;
    const double log_q = (double(to_float(ref[token])) - ref_max) * scale - ref_log_sum;
    double out = target_gradient(log_p, g, g, g_H, H);
    if (a.grad_kl) out += g_kl * kl_gradient<double>(::exp(log_p), log_p, log_q, kl);
    from_float(grad + token, A(out * scale));
  }
}

void logprob_kl_fwd_kernel(const LogprobKlArgs& a, int64_t begin, int64_t end) {
  RK_SWITCH(a.dtype, forward, a, begin, end);
}
void logprob_kl_bwd_kernel(const LogprobKlArgs& a, int64_t begin, int64_t end) {
  RK_SWITCH(a.dtype, backward, a, begin, end);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include "common.h"

namespace rlhf_kernels {
RK_DECLARE(logprob_kl_fwd_kernel, LogprobKlArgs)
RK_DECLARE(logprob_kl_bwd_kernel, LogprobKlArgs)

static LogprobKlArgs logprob_kl_args(const Tensor& logits, const Tensor& ref_logits,
                                     const Tensor& tokens, const std::optional<Tensor>& temperature,
                                     double temperature_value, int64_t ignore_index) {
  check_rows(logits, "logits");
  check_rows(ref_logits, "ref_logits");
  LogprobKlArgs a{};
  a.dtype = dtype_of(logits, "logits");
  a.logits = logits.const_data_ptr();
  a.ref_logits = ref_logits.const_data_ptr();
  a.logit_rows = row_strides(logits, "logits");
  a.ref_rows = row_strides(ref_logits, "ref_logits");
  a.vocab = logits.size(logits.dim() - 1);
  a.tokens = static_cast<const int64_t*>(tokens.const_data_ptr());
  a.temperature = data_or_null(temperature);
  a.temperature_value = number_in(temperature_value, a.dtype);
  a.ignore_index = ignore_index;
  check_tokens(tokens, a.vocab, ignore_index);
  check_temperature(temperature, tokens, ignore_index);
  return a;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> logprob_kl_fwd(
    const Tensor& logits, const Tensor& ref_logits, const Tensor& tokens_in,
    const std::optional<Tensor>& temperature_in, double temperature_value, int64_t ignore_index) {
  const ScalarType type = accumulation_type(logits);
  const Tensor tokens = dense(tokens_in, ScalarType::Long);
  const auto temperature = dense(temperature_in, type);
  LogprobKlArgs a =
      logprob_kl_args(logits, ref_logits, tokens, temperature, temperature_value, ignore_index);
  Tensor out[8];
  void** const pointers[] = {&a.logprob, &a.ref_logprob, &a.kl,          &a.entropy,
                             &a.row_max, &a.log_sum,     &a.ref_row_max, &a.ref_log_sum};
  for (int i = 0; i < 8; ++i) {
    out[i] = empty_as(tokens, type);
    *pointers[i] = out[i].mutable_data_ptr();
  }
  torch::stable::parallel_for(
      0, tokens.numel(), rows_per_thread(a.vocab),
      [&](int64_t begin, int64_t end) { RK_KERNEL(logprob_kl_fwd_kernel)(a, begin, end); });
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7]};
}

static Tensor logprob_kl_bwd(const std::optional<Tensor>& grad_logprob_in,
                             const std::optional<Tensor>& grad_kl_in,
                             const std::optional<Tensor>& grad_entropy_in, const Tensor& logits,
                             const Tensor& ref_logits, const Tensor& tokens_in,
                             const std::optional<Tensor>& temperature_in, double temperature_value,
                             int64_t ignore_index, const Tensor& kl_in, const Tensor& entropy_in,
                             const Tensor& row_max_in, const Tensor& log_sum_in,
                             const Tensor& ref_row_max_in, const Tensor& ref_log_sum_in) {
  const ScalarType type = accumulation_type(logits);
  const Tensor tokens = dense(tokens_in, ScalarType::Long);
  const auto temperature = dense(temperature_in, type);
  LogprobKlArgs a =
      logprob_kl_args(logits, ref_logits, tokens, temperature, temperature_value, ignore_index);
  const auto grad_logprob = dense(grad_logprob_in, type), grad_kl = dense(grad_kl_in, type);
  const auto grad_entropy = dense(grad_entropy_in, type);
  a.grad_logprob = data_or_null(grad_logprob);
  a.grad_kl = data_or_null(grad_kl);
  a.grad_entropy = data_or_null(grad_entropy);
  const Tensor saved[] = {dense(kl_in, type),          dense(entropy_in, type),
                          dense(row_max_in, type),     dense(log_sum_in, type),
                          dense(ref_row_max_in, type), dense(ref_log_sum_in, type)};
  void** const pointers[] = {&a.kl,      &a.entropy,     &a.row_max,
                             &a.log_sum, &a.ref_row_max, &a.ref_log_sum};
  for (int i = 0; i < 6; ++i) *pointers[i] = saved[i].mutable_data_ptr();
  Tensor grad_logits = empty_as(logits, logits.scalar_type());
  a.grad_logits = grad_logits.mutable_data_ptr();
  torch::stable::parallel_for(
      0, tokens.numel(), rows_per_thread(a.vocab),
      [&](int64_t begin, int64_t end) { RK_KERNEL(logprob_kl_bwd_kernel)(a, begin, end); });
  return grad_logits;
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("logprob_kl_fwd", TORCH_BOX(&logprob_kl_fwd));
  m.impl("logprob_kl_bwd", TORCH_BOX(&logprob_kl_bwd));
}

}  // namespace rlhf_kernels
#endif
