// The host implementation of csrc/cuda/device.h: the threads of a cluster's blocks are fibers of
// one CPU thread. It need not be fast. It shows a wrong index (alignment is checked), a missing
// barrier (fibers run in several orders; a barrier that not all threads reach is an error), a copy
// that was not waited for, an element that nobody wrote (memory is filled with NaN).
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define RK_D static inline
#define __global__
#define __launch_bounds__(...)

namespace rlhf_kernels {
namespace host_device {

enum class Order : int { forward, backward, shuffled };
inline Order order = Order::forward;
inline uint64_t seed = 1;
inline int most_blocks = 8, most_shared = 227 * 1024;  // what the launchers are told

inline constexpr int kPoison = 0xff;  // NaN in every floating type, -1 in integers
inline constexpr size_t kStack = 64 * 1024;

struct Barrier {
  int size, waiting = 0;
  uint64_t generation = 0;
};

struct Block {
  std::unique_ptr<Bytes16[]> memory;
  unsigned char* shared;
  int rank, running;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<Bytes16> slots;  // what each thread shows to its warp
};

struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Fiber {
  ucontext_t context;
  Block* block;
  int thread;
  bool done = false;
  const Barrier* waits_on = nullptr;
  uint64_t waits_for = 0;
  std::vector<Copy> copies;
  int group = 0;
};

struct Machine {
  const Grid* grid;
  int64_t first_block;  // of the cluster that runs
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier cluster;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  void (*call)(const void*);  // runs the kernel
  const void* what;
  std::string error;
};
inline Machine machine;

// The numbers 0 .. n-1 in the order asked for.
inline std::vector<int64_t> in_order(int64_t n, uint64_t* state) {
  std::vector<int64_t> at(n);
  for (int64_t i = 0; i < n; ++i) at[i] = order == Order::backward ? n - 1 - i : i;
  for (int64_t i = n - 1; order == Order::shuffled && i > 0; --i) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    std::swap(at[i], at[(*state >> 33) % (i + 1)]);
  }
  return at;
}

inline void wait(Barrier* barrier) {
  if (++barrier->waiting == barrier->size) {
    barrier->waiting = 0;
    ++barrier->generation;
    return;
  }
  Fiber* me = machine.current;
  me->waits_on = barrier;
  me->waits_for = barrier->generation + 1;
  swapcontext(&me->context, &machine.scheduler);
}

inline void run_fiber() {
  Fiber* me = machine.current;
  try {
    machine.call(machine.what);
    if (!me->copies.empty()) throw std::runtime_error("a thread ends before its copies do");
  } catch (const std::exception& error) {
    machine.error = error.what();
  }
  me->done = true;
  if (--me->block->running == 0)  // a later remote access to this block is a bug, and reads NaN
    std::memset(me->block->shared, kPoison, machine.grid->shared_bytes);
  swapcontext(&me->context, &machine.scheduler);
}

// Lets a fiber run up to its next wait; whether it could.
inline bool run_once(Fiber& fiber) {
  if (fiber.done || (fiber.waits_on && fiber.waits_on->generation < fiber.waits_for)) return false;
  fiber.waits_on = nullptr;
  machine.current = &fiber;
  swapcontext(&machine.scheduler, &fiber.context);
  return true;
}

// Every warp, and every block, runs as far ahead of the others as the barriers let it: what it then
// overwrites too early, the others read. Whether anything could run.
inline bool run_warp(int first, uint64_t* state) {
  bool moved = false;
  for (const int64_t lane : in_order(kWarp, state)) moved |= run_once(machine.fibers[first + lane]);
  return moved;
}
inline bool run_block(int rank, uint64_t* state) {
  const int threads = machine.grid->threads;
  bool moved = false;
  for (const int64_t warp : in_order(threads / kWarp, state))
    while (run_warp(rank * threads + warp * kWarp, state)) moved = true;
  return moved;
}
inline bool run_blocks(uint64_t* state) {
  bool moved = false;
  for (const int64_t rank : in_order(machine.grid->cluster, state))
    while (run_block(rank, state)) moved = true;
  return moved;
}

// One cluster, from its first to its last instruction.
inline void run_cluster(const Grid& grid, unsigned char* stacks, uint64_t* state) {
  const int threads = grid.threads, warps = threads / kWarp;
  machine.blocks = std::vector<Block>(grid.cluster);
  machine.fibers = std::vector<Fiber>(grid.cluster * threads);
  machine.cluster = {grid.cluster * threads};
  for (int rank = 0; rank < grid.cluster; ++rank) {
    Block& block = machine.blocks[rank];
    block.memory.reset(new Bytes16[grid.shared_bytes / 16 + 9]);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(block.memory.get());
    block.shared = reinterpret_cast<unsigned char*>((begin + 127) / 128 * 128);
    std::memset(block.shared, kPoison, grid.shared_bytes);
    block.rank = rank;
    block.running = block.barrier.size = threads;
    block.warps.assign(warps, Barrier{kWarp});
    block.slots.resize(threads);
    for (int thread = 0; thread < threads; ++thread) {
      const int i = rank * threads + thread;
      Fiber& fiber = machine.fibers[i];
      fiber.block = &block;
      fiber.thread = thread;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks + i * kStack;
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, run_fiber, 0);
    }
  }
  while (run_blocks(state)) {
    if (!machine.error.empty()) throw std::runtime_error(machine.error);
  }
  for (const Fiber& fiber : machine.fibers)
    if (!fiber.done) throw std::runtime_error("threads wait at a barrier that others never reach");
}

template <class P>
P aligned(P p, int bytes = 16) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) throw std::runtime_error("an access is unaligned");
  return p;
}
inline Fiber& me() { return *machine.current; }

}  // namespace host_device

template <class Args>
void launch(const char* name, void (*kernel)(Args), const Grid& grid, void*, const Args& args) {
  using namespace host_device;
  if (grid.threads % kWarp || grid.threads > 1024 || grid.blocks % grid.cluster ||
      grid.blocks >= int64_t(1) << 31 || grid.shared_bytes > most_shared ||
      grid.cluster > most_blocks)
    throw std::runtime_error(std::string(name) + ": no GPU runs such a grid");
  const auto run = [&] { kernel(args); };
  machine.grid = &grid;
  machine.call = [](const void* what) { (*static_cast<const decltype(run)*>(what))(); };
  machine.what = &run;
  machine.error.clear();
  const std::unique_ptr<unsigned char[]> stacks(
      new unsigned char[kStack * grid.threads * grid.cluster]);
  uint64_t state = seed;
  for (const int64_t cluster : in_order(grid.blocks / grid.cluster, &state)) {
    machine.first_block = cluster * grid.cluster;
    try {
      run_cluster(grid, stacks.get(), &state);
    } catch (const std::exception& error) {
      throw std::runtime_error(std::string(name) + ": " + error.what());
    }
  }
}

inline int multiprocessors() { return 1; }  // few: persistent blocks go round
template <class Args>
int most_blocks_in_cluster(void (*)(Args)) {
  return host_device::most_blocks;
}
template <class Args>
bool holds_cluster(void (*)(Args), const Grid&) {
  return true;
}
inline int most_shared_bytes() { return host_device::most_shared; }
inline void poison(void* p, int64_t bytes) { std::memset(p, host_device::kPoison, bytes); }

RK_D int thread_index() { return host_device::me().thread; }
RK_D int block_size() { return host_device::machine.grid->threads; }
RK_D int64_t block_index() {
  return host_device::machine.first_block + host_device::me().block->rank;
}
RK_D int64_t block_count() { return host_device::machine.grid->blocks; }
RK_D unsigned char* shared_memory() { return host_device::me().block->shared; }

RK_D void sync_block() { host_device::wait(&host_device::me().block->barrier); }
template <class A>
RK_D A shuffle_from(A x, int lane) {
  host_device::Fiber& me = host_device::me();
  host_device::Barrier* warp = &me.block->warps[me.thread / kWarp];
  std::memcpy(&me.block->slots[me.thread], &x, sizeof x);
  host_device::wait(warp);
  std::memcpy(&x, &me.block->slots[me.thread / kWarp * kWarp + lane], sizeof x);
  host_device::wait(warp);
  return x;
}
template <class A>
RK_D A shuffle_xor(A x, int mask) {
  return shuffle_from(x, thread_index() % kWarp ^ mask);
}
template <class A>
RK_D A shuffle_down(A x, int by) {
  const int lane = thread_index() % kWarp;
  return shuffle_from(x, lane + by < kWarp ? lane + by : lane);
}

RK_D int cluster_rank() { return host_device::me().block->rank; }
RK_D int cluster_size() { return host_device::machine.grid->cluster; }
RK_D void sync_cluster() { host_device::wait(&host_device::machine.cluster); }
template <class T>
RK_D T* remote(T* p, int rank) {
  const auto offset = reinterpret_cast<unsigned char*>(p) - shared_memory();
  return reinterpret_cast<T*>(host_device::machine.blocks[rank].shared + offset);
}

RK_D Bytes16 load16(const void* p) {
  Bytes16 x;
  std::memcpy(&x, host_device::aligned(p), sizeof x);
  return x;
}
RK_D uint32_t load4(const void* p) {
  uint32_t x;
  std::memcpy(&x, host_device::aligned(p, 4), sizeof x);
  return x;
}
RK_D void store16(void* p, Bytes16 x) { std::memcpy(host_device::aligned(p), &x, sizeof x); }
RK_D Bytes16 load16_shared(const void* p) { return load16(p); }

// The bytes arrive when they are waited for, and not before.
RK_D void copy16_async(void* to, const void* from) {
  host_device::Fiber& me = host_device::me();
  std::memset(host_device::aligned(to), host_device::kPoison, 16);
  me.copies.push_back({to, host_device::aligned(from), me.group});
}
RK_D void copy_commit() { ++host_device::me().group; }
template <int kPending>
RK_D void copy_wait() {
  host_device::Fiber& me = host_device::me();
  std::vector<host_device::Copy> later;
  for (const host_device::Copy& copy : me.copies)
    if (copy.group + kPending < me.group)
      std::memcpy(copy.to, copy.from, 16);
    else
      later.push_back(copy);
  me.copies = std::move(later);
}

RK_D uint32_t funnel_shift(uint32_t low, uint32_t high, int bits) {
  return static_cast<uint32_t>((uint64_t(high) << 32 | low) >> bits);
}

RK_D float exp2_flush(float x) { return x < -126.0f ? 0.0f : ::exp2f(x); }
RK_D double exp2_flush(double x) { return ::exp2(x); }
RK_D float larger(float a, float b) { return ::fmaxf(a, b); }
RK_D double larger(double a, double b) { return ::fmax(a, b); }

template <class T, class A>
void unpack(const Bytes16& x, const T*, A* out) {
  T all[16 / sizeof(T)];
  std::memcpy(all, &x, sizeof all);
  for (const T& one : all) *out++ = to_float(one);
}
template <class T, class A>
Bytes16 pack(const A* x, const T*) {
  Bytes16 y;
  T all[16 / sizeof(T)];
  for (T& one : all) from_float(&one, *x++);
  std::memcpy(&y, all, sizeof y);
  return y;
}

}  // namespace rlhf_kernels
