// masked_whiten on the CPU: squared deviations from the mean, then (x - mean) / sqrt(var + eps);
// and the gradient from the sums of g and of g (x - mean). In float64, so that a common offset
// costs no digits.
#include "simd.h"
#include "step.h"

namespace rlhf_kernels {

struct MaskedWhitenArgs {
  bool wide;  // float64, else float32
  const void *x, *grad;
  const bool* mask;
  int64_t n;
  double mean;
  double* sums;  // per block: sum of (x - mean)^2, or sums of g and of g (x - mean)
  // forward: out = (x - mean) * scale + shift; backward: out = g * scale - (x - mean) * slope -
  // shift
  double scale, slope, shift;
  void* out;
};

namespace RK_SIMD {

// An element and its upstream gradient, 0 where masked: what stands there is selected away.
template <class V, class T, class Valid>
RK_HD Wide<V> element(const void* x, int64_t i, int n, Valid valid) {
  return widen(select(valid, load_step<V>(static_cast<const T*>(x) + i, n), V{}));
}

template <class T>
static void squares(const MaskedWhitenArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  const Wide<V> mean = wide<V>(a.mean);
  sum_blocks<1, V>(a.n, a.sums, begin, end, [&](int64_t i, int n, Wide<V>* acc) RK_INLINE {
    const auto valid = valid_step(a.mask, i, n, V{});
    const Wide<V> d = element<V, T>(a.x, i, n, valid) - mean;
    acc[0] += d * d * widen(select(valid, splat<V>(1.0), V{}));
  });
}

template <class T>
static void gradient_sums(const MaskedWhitenArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  const Wide<V> mean = wide<V>(a.mean);
  sum_blocks<2, V>(a.n, a.sums, begin, end, [&](int64_t i, int n, Wide<V>* acc) RK_INLINE {
    const auto valid = valid_step(a.mask, i, n, V{});
    const Wide<V> g = element<V, T>(a.grad, i, n, valid);
    acc[0] += g;
    acc[1] += g * (element<V, T>(a.x, i, n, valid) - mean);
  });
}

template <bool kBackward, class T>
static void apply(const MaskedWhitenArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  const Wide<V> mean = wide<V>(a.mean), scale = wide<V>(a.scale);
  const Wide<V> slope = wide<V>(a.slope), shift = wide<V>(a.shift);
  for (int64_t i = begin; i < end; i += lanes<V>) {
    const int n = RK_STEP(V, end, i);
    const auto valid = valid_step(a.mask, i, n, V{});
    Wide<V> y = element<V, T>(a.x, i, n, valid) - mean;
    if constexpr (kBackward)
      y = element<V, T>(a.grad, i, n, valid) * scale - y * slope - shift;
    else
      y = y * scale + shift;
    store_step(static_cast<T*>(a.out) + i, select(valid, narrow(y), V{}), n);
  }
}

void masked_whiten_squares_kernel(const MaskedWhitenArgs& a, int64_t begin, int64_t end) {
  a.wide ? squares<double>(a, begin, end) : squares<float>(a, begin, end);
}
void masked_whiten_fwd_kernel(const MaskedWhitenArgs& a, int64_t begin, int64_t end) {
  a.wide ? apply<false, double>(a, begin, end) : apply<false, float>(a, begin, end);
}
void masked_whiten_bwd_sums_kernel(const MaskedWhitenArgs& a, int64_t begin, int64_t end) {
  a.wide ? gradient_sums<double>(a, begin, end) : gradient_sums<float>(a, begin, end);
}
void masked_whiten_bwd_kernel(const MaskedWhitenArgs& a, int64_t begin, int64_t end) {
  a.wide ? apply<true, double>(a, begin, end) : apply<true, float>(a, begin, end);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include <cmath>

#include "common.h"

namespace rlhf_kernels {
RK_DECLARE(masked_whiten_squares_kernel, MaskedWhitenArgs)
RK_DECLARE(masked_whiten_fwd_kernel, MaskedWhitenArgs)
RK_DECLARE(masked_whiten_bwd_sums_kernel, MaskedWhitenArgs)
RK_DECLARE(masked_whiten_bwd_kernel, MaskedWhitenArgs)

// The statistics that all passes share; sums = (sum of x, count), squares = (sum of (x - mean)^2).
struct Moments {
  double count, mean, divisor, scale;  // divisor of the variance; scale = 1 / sqrt(var + eps)

  explicit Moments(const Tensor& sums) : count(value_of(sums, 1) > 0 ? value_of(sums, 1) : 1) {
    mean = value_of(sums) / count;
  }
  Moments(const Tensor& sums, const Tensor& squares, bool unbiased, double eps) : Moments(sums) {
    divisor = unbiased && count > 1 ? count - 1 : count;
    scale = 1 / std::sqrt(value_of(squares) / divisor + eps);
  }
};

// What the passes read. The tensors must outlive the struct.
static MaskedWhitenArgs masked_whiten_args(const Tensor& x, const Tensor& mask, double mean) {
  MaskedWhitenArgs a{};
  a.wide = x.scalar_type() == ScalarType::Double;
  a.x = x.const_data_ptr();
  a.mask = static_cast<const bool*>(mask.const_data_ptr());
  a.n = x.numel();
  a.mean = mean;
  return a;
}

static Tensor masked_whiten_squares(const Tensor& x_in, const Tensor& mask_in, const Tensor& sums) {
  const Tensor x = dense(x_in, accumulation_type(x_in)), mask = dense(mask_in, ScalarType::Bool);
  MaskedWhitenArgs a = masked_whiten_args(x, mask, Moments(sums).mean);
  return vector_of({reduce_blocks<1>(a.n, [&](double* partial, int64_t begin, int64_t end) {
    MaskedWhitenArgs part = a;
    part.sums = partial;
    RK_KERNEL(masked_whiten_squares_kernel)(part, begin, end);
  })[0]});
}

static Tensor masked_whiten_fwd(const Tensor& x_in, const Tensor& mask_in, const Tensor& sums,
                                const Tensor& squares, bool shift_mean, bool unbiased, double eps) {
  const Tensor x = dense(x_in, accumulation_type(x_in)), mask = dense(mask_in, ScalarType::Bool);
  const Moments moments(sums, squares, unbiased, eps);
  Tensor whitened = empty_as(x, x.scalar_type());
  MaskedWhitenArgs a = masked_whiten_args(x, mask, moments.mean);
  a.scale = moments.scale;
  a.shift = shift_mean ? 0 : moments.mean;
  a.out = whitened.mutable_data_ptr();
  torch::stable::parallel_for(0, a.n, rows_per_thread(1), [&](int64_t begin, int64_t end) {
    RK_KERNEL(masked_whiten_fwd_kernel)(a, begin, end);
  });
  return whitened;
}

static Tensor masked_whiten_bwd_sums(const Tensor& grad_in, const Tensor& x_in,
                                     const Tensor& mask_in, const Tensor& sums) {
  const Tensor x = dense(x_in, accumulation_type(x_in)), mask = dense(mask_in, ScalarType::Bool);
  const Tensor grad = dense(grad_in, x.scalar_type());
  MaskedWhitenArgs a = masked_whiten_args(x, mask, Moments(sums).mean);
  a.grad = grad.const_data_ptr();
  const auto both = reduce_blocks<2>(a.n, [&](double* partial, int64_t begin, int64_t end) {
    MaskedWhitenArgs part = a;
    part.sums = partial;
    RK_KERNEL(masked_whiten_bwd_sums_kernel)(part, begin, end);
  });
  return vector_of({both[0], both[1]});
}

static Tensor masked_whiten_bwd(const Tensor& grad_in, const Tensor& x_in, const Tensor& mask_in,
                                const Tensor& sums, const Tensor& squares, const Tensor& grad_sums,
                                bool shift_mean, bool unbiased, double eps) {
  const Tensor x = dense(x_in, accumulation_type(x_in)), mask = dense(mask_in, ScalarType::Bool);
  const Tensor grad = dense(grad_in, x.scalar_type());
  const Moments moments(sums, squares, unbiased, eps);
  const double scale = moments.scale;
  Tensor grad_x = empty_as(x, x.scalar_type());
  MaskedWhitenArgs a = masked_whiten_args(x, mask, moments.mean);
  a.grad = grad.const_data_ptr();
  a.scale = scale;
  a.slope = value_of(grad_sums, 1) * scale * scale * scale / moments.divisor;
  a.shift = value_of(grad_sums, 0) / moments.count * (shift_mean ? scale : scale - 1);
  a.out = grad_x.mutable_data_ptr();
  torch::stable::parallel_for(0, a.n, rows_per_thread(1), [&](int64_t begin, int64_t end) {
    RK_KERNEL(masked_whiten_bwd_kernel)(a, begin, end);
  });
  return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("masked_whiten_squares", TORCH_BOX(&masked_whiten_squares));
  m.impl("masked_whiten_fwd", TORCH_BOX(&masked_whiten_fwd));
  m.impl("masked_whiten_bwd_sums", TORCH_BOX(&masked_whiten_bwd_sums));
  m.impl("masked_whiten_bwd", TORCH_BOX(&masked_whiten_bwd));
}

}  // namespace rlhf_kernels
#endif
