// masked_mean on the CPU: sum and count of the valid elements in one pass, in float64.
#include "simd.h"
#include "step.h"

namespace rlhf_kernels {

struct MaskedMeanArgs {
  bool wide;  // float64, else float32
  const void* x;
  const bool* mask;
  int64_t n;
  double* sums;  // (sum, count) per block
  double grad;   // backward: the upstream gradient over the count
  void* grad_x;
};

namespace RK_SIMD {

template <class T>
static void forward(const MaskedMeanArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  const T* x = static_cast<const T*>(a.x);
  const V zero = splat<V>(0.0), one = splat<V>(1.0);
  sum_blocks<2, V>(a.n, a.sums, begin, end, [&](int64_t i, int n, Wide<V>* acc) RK_INLINE {
    const auto valid = valid_step(a.mask, i, n, V{});
    acc[0] += widen(select(valid, load_step<V>(x + i, n), zero));
    acc[1] += widen(select(valid, one, zero));
  });
}

template <class T>
static void backward(const MaskedMeanArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  const V grad = splat<V>(a.grad), zero = splat<V>(0.0);
  for (int64_t i = begin; i < end; i += lanes<V>) {
    const int n = RK_STEP(V, end, i);
    store_step(static_cast<T*>(a.grad_x) + i, select(valid_step(a.mask, i, n, V{}), grad, zero), n);
  }
}

void masked_mean_fwd_kernel(const MaskedMeanArgs& a, int64_t begin, int64_t end) {
  a.wide ? forward<double>(a, begin, end) : forward<float>(a, begin, end);
}
void masked_mean_bwd_kernel(const MaskedMeanArgs& a, int64_t begin, int64_t end) {
  a.wide ? backward<double>(a, begin, end) : backward<float>(a, begin, end);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include "common.h"

namespace rlhf_kernels {
RK_DECLARE(masked_mean_fwd_kernel, MaskedMeanArgs)
RK_DECLARE(masked_mean_bwd_kernel, MaskedMeanArgs)

static std::tuple<Tensor, Tensor> masked_mean_fwd(const Tensor& x_in, const Tensor& mask_in) {
  const ScalarType type = accumulation_type(x_in);
  const Tensor x = dense(x_in, type), mask = dense(mask_in, ScalarType::Bool);
  MaskedMeanArgs a{};
  a.wide = type == ScalarType::Double;
  a.x = x.const_data_ptr();
  a.mask = static_cast<const bool*>(mask.const_data_ptr());
  a.n = x.numel();
  const auto sums = reduce_blocks<2>(a.n, [&](double* partial, int64_t begin, int64_t end) {
    MaskedMeanArgs part = a;
    part.sums = partial;
    RK_KERNEL(masked_mean_fwd_kernel)(part, begin, end);
  });
  return {scalar(sums[1] > 0 ? sums[0] / sums[1] : 0, type), vector_of({sums[0], sums[1]})};
}

static Tensor masked_mean_bwd(const Tensor& grad, const Tensor& mask_in, const Tensor& sums) {
  const ScalarType type = accumulation_type(grad);
  const Tensor mask = dense(mask_in, ScalarType::Bool);
  Tensor grad_x = empty_as(mask, type);
  const double count = value_of(sums, 1);
  MaskedMeanArgs a{};
  a.wide = type == ScalarType::Double;
  a.mask = static_cast<const bool*>(mask.const_data_ptr());
  a.grad = value_of(dense(grad, type)) / (count > 0 ? count : 1);
  a.grad_x = grad_x.mutable_data_ptr();
  torch::stable::parallel_for(0, mask.numel(), rows_per_thread(1), [&](int64_t begin, int64_t end) {
    RK_KERNEL(masked_mean_bwd_kernel)(a, begin, end);
  });
  return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("masked_mean_fwd", TORCH_BOX(&masked_mean_fwd));
  m.impl("masked_mean_bwd", TORCH_BOX(&masked_mean_bwd));
}

}  // namespace rlhf_kernels
#endif
