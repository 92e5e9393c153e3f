// Controls of the host implementation of csrc/cuda/device.h, for ctypes.
#include "device.h"

extern "C" {
// In which order fibers and blocks run: 0 forward, 1 backward, 2 shuffled by `seed`.
void rk_host_order(int order, uint64_t seed) {
  rlhf_kernels::host_device::order = static_cast<rlhf_kernels::host_device::Order>(order);
  rlhf_kernels::host_device::seed = seed;
}
// What the device allows: blocks in a cluster, bytes of shared memory in a block.
void rk_host_limits(int most_blocks, int most_shared) {
  rlhf_kernels::host_device::most_blocks = most_blocks;
  rlhf_kernels::host_device::most_shared = most_shared;
}
}
