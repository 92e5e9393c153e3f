// What every CUDA launcher shares: device, stream, allocation, the checks that need a sync.
#pragma once
#include "common.h"
#include "device.h"

#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <cstring>

#ifdef RK_HOST_DEVICE
#define RK_NAMESPACE rlhf_kernels_host
#define RK_DISPATCH_KEY CPU
#else
#define RK_NAMESPACE rlhf_kernels
#define RK_DISPATCH_KEY CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif
// The macro below needs its arguments expanded.
#define RK_REGISTER(m) RK_REGISTER_IN(RK_NAMESPACE, RK_DISPATCH_KEY, m)
#define RK_REGISTER_IN(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)

namespace rlhf_kernels {

// The device of a tensor as the current one, and its current stream.
class OnDevice {
 public:
#ifdef RK_HOST_DEVICE
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }
#endif
  void* stream = nullptr;

 private:
#ifndef RK_HOST_DEVICE
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// A contiguous, uninitialised tensor on the device of `like`.
inline Tensor device_empty(const Tensor& like, const int64_t* sizes, int64_t dims,
                           ScalarType type) {
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  Tensor out = empty(sizes, dims, type, device, like.get_device_index());
  poison(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}
inline Tensor device_empty(const Tensor& like, std::initializer_list<int64_t> sizes,
                           ScalarType type) {
  return device_empty(like, sizes.begin(), static_cast<int64_t>(sizes.size()), type);
}

// RLHF_KERNELS_CHECK=1: values are looked at before a launch, which waits for the device.
inline bool checking() {
  const char* asked = std::getenv("RLHF_KERNELS_CHECK");
  return asked != nullptr && std::strcmp(asked, "1") == 0;
}
inline Tensor on_cpu(const Tensor& x) {
  return torch::stable::to(x, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a persistent grid for so much work: no more than the device holds at a time, as each
// goes on to what is a grid further.
inline int64_t blocks_for(int64_t work, int threads) {
  const int64_t most = int64_t(multiprocessors()) * (2048 / threads);
  return work < most ? work : most;
}

}  // namespace rlhf_kernels
