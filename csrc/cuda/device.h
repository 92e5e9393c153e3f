// The one door to the GPU: how a kernel is launched, and the device intrinsics that kernels use.
// Under nvcc these are the real ones. With RK_HOST_DEVICE the same names come from
// tests/host_device/host_device.h, where each thread is a fiber on the CPU, so that the kernels'
// own source runs, and is tested, without a GPU.
#pragma once
#include "types.h"

namespace rlhf_kernels {

inline constexpr int kWarp = 32;

struct alignas(16) Bytes16 {  // what one access moves
  uint32_t word[4];
};

struct Grid {
  int64_t blocks;        // in one dimension; a multiple of `cluster`
  int threads;           // a block; a multiple of kWarp
  int shared_bytes = 0;  // a block, at shared_memory()
  int cluster = 1;       // blocks that see each other's shared memory (9.0 and later)
};

}  // namespace rlhf_kernels

#ifdef RK_HOST_DEVICE
#include "host_device.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define RK_D static __device__ __forceinline__

namespace rlhf_kernels {

// ---- launch ----

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class Args>
void configure(void (*kernel)(Args), const Grid& grid, void* stream, const char* name,
               cudaLaunchAttribute* cluster, cudaLaunchConfig_t* config) {
  if (grid.shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    grid.shared_bytes),
               name);
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim.x = grid.cluster;
  cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
  config->gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config->blockDim = dim3(grid.threads);
  config->dynamicSmemBytes = grid.shared_bytes;
  config->stream = static_cast<cudaStream_t>(stream);
  config->attrs = cluster;
  config->numAttrs = grid.cluster > 1;
}

// Runs kernel(args) on the stream. Nothing is launched for a grid without blocks.
template <class Args>
void launch(const char* name, void (*kernel)(Args), const Grid& grid, void* stream,
            const Args& args) {
  if (grid.blocks == 0) return;
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config{};
  configure(kernel, grid, stream, name, &cluster, &config);
  check_cuda(cudaLaunchKernelEx(&config, kernel, args), name);
}

// What the current device allows: blocks in a cluster, bytes of shared memory in a block.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int most_shared_bytes() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// 1 as well where the code in use was made for a GPU before 9.0, from PTX: it knows no clusters.
template <class Args>
int most_blocks_in_cluster(void (*kernel)(Args)) {
  if (!device_attribute(cudaDevAttrClusterLaunch)) return 1;
  cudaFuncAttributes code{};
  check_cuda(cudaFuncGetAttributes(&code, kernel), "cudaFuncGetAttributes");
  return code.ptxVersion >= 90 ? 8 : 1;
}

// Has the device room for a cluster of the grid? (A slice of a GPU may not.)
template <class Args>
bool holds_cluster(void (*kernel)(Args), const Grid& grid) {
  if (grid.cluster == 1) return true;
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config{};
  configure(kernel, grid, nullptr, "holds_cluster", &cluster, &config);
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "holds_cluster");
  return clusters > 0;
}

inline void poison(void*, int64_t) {}  // what is allocated stays as it is; the host fills it

// ---- where a thread is ----

RK_D int thread_index() { return threadIdx.x; }
RK_D int block_size() { return blockDim.x; }
RK_D int64_t block_index() { return blockIdx.x; }
RK_D int64_t block_count() { return gridDim.x; }
RK_D unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char rk_shared[];
  return rk_shared;
}

// ---- barriers, and what threads tell each other ----

RK_D void sync_block() { __syncthreads(); }
template <class A>
RK_D A shuffle_xor(A x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class A>
RK_D A shuffle_down(A x, int by) {  // own value where there is no lane that far up
  return __shfl_down_sync(0xffffffffu, x, by);
}
template <class A>
RK_D A shuffle_from(A x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
RK_D int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
RK_D int cluster_size() {
  uint32_t size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}
RK_D void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Where *p, in this block's shared memory, stands in that of block `rank` of the cluster.
template <class T>
RK_D T* remote(T* p, int rank) {
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(there);
}
#else  // a block is a cluster of its own
RK_D int cluster_rank() { return 0; }
RK_D int cluster_size() { return 1; }
RK_D void sync_cluster() { __syncthreads(); }
template <class T>
RK_D T* remote(T* p, int) {
  return p;
}
#endif

// ---- memory ----

// Data that is used once: first to leave the caches.
RK_D Bytes16 load16(const void* p) {
  const uint4 x = __ldcs(static_cast<const uint4*>(p));
  return {{x.x, x.y, x.z, x.w}};
}
RK_D uint32_t load4(const void* p) { return __ldcs(static_cast<const uint32_t*>(p)); }
RK_D void store16(void* p, Bytes16 x) {
  __stcs(static_cast<uint4*>(p), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
}
// Shared memory.
RK_D Bytes16 load16_shared(const void* p) {
  const uint4 x = *static_cast<const uint4*>(p);
  return {{x.x, x.y, x.z, x.w}};
}
// Global to shared memory, without waiting: `to` may be read, by this thread, after copy_wait.
RK_D void copy16_async(void* to, const void* from) {
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
RK_D void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `kPending` of this thread's latest groups are under way.
template <int kPending>
RK_D void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The 4 bytes that begin `bits` into the 8 bytes (low, high).
RK_D uint32_t funnel_shift(uint32_t low, uint32_t high, int bits) {
  return __funnelshift_r(low, high, bits);
}

// ---- arithmetic ----

// 2^x, in float32 flushed to 0 below the normal range.
RK_D float exp2_flush(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RK_D double exp2_flush(double x) { return ::exp2(x); }
// The larger one; a NaN gets lost.
RK_D float larger(float a, float b) { return ::fmaxf(a, b); }
RK_D double larger(double a, double b) { return ::fmax(a, b); }

RK_D void unpack(const Bytes16& x, const bf16*, float* out) {
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(x.word[i] << 16);
    out[2 * i + 1] = __uint_as_float(x.word[i] & 0xffff0000u);
  }
}
RK_D void unpack(const Bytes16& x, const f16*, float* out) {
  for (int i = 0; i < 4; ++i)
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(out[2 * i]), "=f"(out[2 * i + 1])
        : "r"(x.word[i]));
}
RK_D void unpack(const Bytes16& x, const float*, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(x.word[i]);
}
RK_D void unpack(const Bytes16& x, const double*, double* out) {
  for (int i = 0; i < 2; ++i) out[i] = __hiloint2double(x.word[2 * i + 1], x.word[2 * i]);
}
RK_D Bytes16 pack(const float* x, const bf16*) {
  Bytes16 y;
  for (int i = 0; i < 4; ++i)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y.word[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
  return y;
}
RK_D Bytes16 pack(const float* x, const f16*) {
  Bytes16 y;
  for (int i = 0; i < 4; ++i)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y.word[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
  return y;
}
RK_D Bytes16 pack(const float* x, const float*) {
  Bytes16 y;
  for (int i = 0; i < 4; ++i) y.word[i] = __float_as_uint(x[i]);
  return y;
}
RK_D Bytes16 pack(const double* x, const double*) {
  Bytes16 y;
  for (int i = 0; i < 2; ++i) {
    y.word[2 * i] = __double2loint(x[i]);
    y.word[2 * i + 1] = __double2hiint(x[i]);
  }
  return y;
}

}  // namespace rlhf_kernels
#endif

// ---- reductions in a fixed order, from the parts above ----

namespace rlhf_kernels {

RK_D int lane_index() { return thread_index() % kWarp; }
RK_D int warp_index() { return thread_index() / kWarp; }

struct Sum {
  template <class A>
  RK_D A of(A a, A b) {
    return a + b;
  }
};
struct Max {
  template <class A>
  RK_D A of(A a, A b) {
    return larger(a, b);
  }
};

// All lanes get the same bits, as Op is commutative.
template <class Op, class A>
RK_D A warp_reduce(A x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = Op::of(x, shuffle_xor(x, mask));
  return x;
}

// All threads of the block get the same bits. scratch: kWarp elements of shared memory, free again
// on return.
template <class Op, class A>
RK_D A block_reduce(A x, A identity, A* scratch) {
  x = warp_reduce<Op>(x);
  if (block_size() == kWarp) return x;
  if (lane_index() == 0) scratch[warp_index()] = x;
  sync_block();
  x = warp_reduce<Op>(lane_index() < block_size() / kWarp ? scratch[lane_index()] : identity);
  sync_block();
  return x;
}

}  // namespace rlhf_kernels
