// kl_estimate on the CPU: k1, k2, k3 and their derivative, element by element.
#include "simd.h"
#include "math/kl.h"
#include "step.h"

namespace rlhf_kernels {

struct KlEstimateArgs {
  bool wide;  // float64, else float32
  const void *logprob, *ref_logprob;
  KlKind kind;
  double clamp;
  void* kl;
  const void* grad;               // backward
  void *grad_logprob, *grad_ref;  // grad_ref may be null
};

namespace RK_SIMD {

template <class T>
RK_HD auto kl_step(const KlEstimateArgs& a, int64_t i, int n) {
  using V = typename Compute<T>::V;
  const V d = load_step<V>(static_cast<const T*>(a.logprob) + i, n) -
              load_step<V>(static_cast<const T*>(a.ref_logprob) + i, n);
  return kl_estimate(a.kind, d, a.clamp);
}

template <class T>
static void forward(const KlEstimateArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  for (int64_t i = begin; i < end; i += lanes<V>) {
    const int n = RK_STEP(V, end, i);
    store_step(static_cast<T*>(a.kl) + i, kl_step<T>(a, i, n).value, n);
  }
}

template <class T>
static void backward(const KlEstimateArgs& a, int64_t begin, int64_t end) {
  using V = typename Compute<T>::V;
  for (int64_t i = begin; i < end; i += lanes<V>) {
    const int n = RK_STEP(V, end, i);
    const V upstream = load_step<V>(static_cast<const T*>(a.grad) + i, n);
    const V grad = upstream * kl_step<T>(a, i, n).slope;
    store_step(static_cast<T*>(a.grad_logprob) + i, grad, n);
    if (a.grad_ref) store_step(static_cast<T*>(a.grad_ref) + i, -grad, n);
  }
}

void kl_estimate_fwd_kernel(const KlEstimateArgs& a, int64_t begin, int64_t end) {
  a.wide ? forward<double>(a, begin, end) : forward<float>(a, begin, end);
}
void kl_estimate_bwd_kernel(const KlEstimateArgs& a, int64_t begin, int64_t end) {
  a.wide ? backward<double>(a, begin, end) : backward<float>(a, begin, end);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include "common.h"

namespace rlhf_kernels {
RK_DECLARE(kl_estimate_fwd_kernel, KlEstimateArgs)
RK_DECLARE(kl_estimate_bwd_kernel, KlEstimateArgs)

static Tensor kl_estimate_fwd(const Tensor& logprob_in, const Tensor& ref_in, int64_t kind,
                              double clamp) {
  const ScalarType type = accumulation_type(logprob_in, ref_in);
  const Tensor logprob = dense(logprob_in, type), ref = dense(ref_in, type);
  Tensor kl = empty_as(logprob, type);
  KlEstimateArgs a{};
  a.wide = type == ScalarType::Double;
  a.logprob = logprob.const_data_ptr();
  a.ref_logprob = ref.const_data_ptr();
  a.kind = static_cast<KlKind>(kind);
  a.clamp = clamp;
  a.kl = kl.mutable_data_ptr();
  torch::stable::parallel_for(0, kl.numel(), rows_per_thread(1), [&](int64_t begin, int64_t end) {
    RK_KERNEL(kl_estimate_fwd_kernel)(a, begin, end);
  });
  return kl;
}

static std::tuple<Tensor, Tensor> kl_estimate_bwd(const Tensor& grad_in, const Tensor& logprob_in,
                                                  const Tensor& ref_in, int64_t kind, double clamp,
                                                  bool need_ref) {
  const ScalarType type = accumulation_type(logprob_in, ref_in);
  const Tensor logprob = dense(logprob_in, type), ref = dense(ref_in, type);
  const Tensor grad = dense(grad_in, type);
  Tensor grad_logprob = empty_as(logprob, type);
  Tensor grad_ref = need_ref ? empty_as(logprob, type) : empty({0}, type);
  KlEstimateArgs a{};
  a.wide = type == ScalarType::Double;
  a.logprob = logprob.const_data_ptr();
  a.ref_logprob = ref.const_data_ptr();
  a.kind = static_cast<KlKind>(kind);
  a.clamp = clamp;
  a.grad = grad.const_data_ptr();
  a.grad_logprob = grad_logprob.mutable_data_ptr();
  a.grad_ref = need_ref ? grad_ref.mutable_data_ptr() : nullptr;
  torch::stable::parallel_for(0, grad.numel(), rows_per_thread(1), [&](int64_t begin, int64_t end) {
    RK_KERNEL(kl_estimate_bwd_kernel)(a, begin, end);
  });
  return {grad_logprob, grad_ref};
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) {
  m.impl("kl_estimate_fwd", TORCH_BOX(&kl_estimate_fwd));
  m.impl("kl_estimate_bwd", TORCH_BOX(&kl_estimate_bwd));
}

}  // namespace rlhf_kernels
#endif
