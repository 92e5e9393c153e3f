// gae on CUDA: a reverse scan over time, a block for each sequence, any mask, padded or packed.
// No deltas, next values or offsets of valid steps are written; every step is read and written
// once. Fused: the search for the next valid value, delta, the scan, returns.
#include "row.h"

#include "math/gae.h"
#include "launch.h"

namespace rlhf_kernels {

struct GaeArgs {
  const void *rewards, *values, *last_value;  // last_value (sequences) may be null
  const bool* mask;                           // may be null
  const int64_t* offsets;                     // (sequences + 1), or null: `length` steps each
  int64_t sequences, length, total;
  double gamma, gamma_lambda;
  void *advantages, *returns;
};

inline constexpr int kThreads = 256;
inline constexpr int kSteps = 4;  // a thread, side by side

template <class A>
struct Carry {  // of the next valid step; after the last one 0 and the bootstrap value
  A advantage, value;
};

// What some steps in a row make of the carry behind them: the advantage of the first valid one is
// sum + power * advantage + next * value, its value is `value`. Without a valid step nothing
// changes.
template <class A>
struct Segment {
  A sum = 0, power = 1, next = 0, value = 0;
  int valid = 0;
};

template <class A>
RK_D Carry<A> apply(const Segment<A>& s, Carry<A> behind) {
  if (!s.valid) return behind;
  return {gae_advantage(fma(s.next, behind.value, s.sum), behind.advantage, s.power), s.value};
}

// `first` and then `then`, in the order of time.
template <class A>
RK_D Segment<A> chain(const Segment<A>& first, const Segment<A>& then) {
  if (!first.valid) return then;
  if (!then.valid) return first;
  const A sum = fma(first.next, then.value, first.sum);
  return {fma(first.power, then.sum, sum), first.power * then.power, first.power * then.next,
          first.value, 1};
}

template <class A>
RK_D Segment<A> segment_after(const Segment<A>& s, int lanes) {
  return {shuffle_down(s.sum, lanes), shuffle_down(s.power, lanes), shuffle_down(s.next, lanes),
          shuffle_down(s.value, lanes), shuffle_down(s.valid, lanes)};
}

// The steps of one thread. `whole`: all of them are there, and on 16-byte boundaries.
template <class A>
RK_D void load_steps(const A* p, int64_t count, bool whole, A (&out)[kSteps]) {
  if (whole) {
#pragma unroll
    for (int i = 0; i < kSteps; i += kLanes<A>) unpack(load16(p + i), p, out + i);
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) out[i] = i < count ? p[i] : A(0);
  }
}
template <class A>
RK_D void store_steps(A* p, int64_t count, bool whole, const A (&x)[kSteps]) {
  if (whole) {
#pragma unroll
    for (int i = 0; i < kSteps; i += kLanes<A>) store16(p + i, pack(x + i, p));
  } else {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (i < count) p[i] = x[i];
  }
}
// Bit i: step i is there and valid.
RK_D int valid_steps(const bool* mask, int64_t count, bool whole) {
  int bits = 0;
  const uint32_t bytes = mask && whole ? load4(mask) : 0x01010101u;
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
    bits |= (i < count && (whole || !mask ? bytes >> 8 * i & 1 : mask[i])) << i;
  return bits;
}

// The carry behind each thread's steps, and in front of all of them in *carry. warps: a segment for
// each warp, in shared memory.
template <class A>
RK_D Carry<A> scan_block(Segment<A> own, Segment<A>* warps, Carry<A>* carry) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const Segment<A> then = segment_after(own, lanes);
    if (lane_index() + lanes < kWarp) own = chain(own, then);
  }
  const Segment<A> later = segment_after(own, 1);
  if (lane_index() == 0) warps[warp_index()] = own;
  sync_block();
  Carry<A> behind = *carry;
  for (int warp = block_size() / kWarp - 1; warp >= 0; --warp) {
    if (warp == warp_index()) behind = *carry;
    *carry = apply(warps[warp], *carry);
  }
  sync_block();  // the next tile writes there
  return lane_index() + 1 < kWarp ? apply(later, behind) : behind;
}

template <class A>
__global__ void __launch_bounds__(kThreads) gae_kernel(const GaeArgs a) {
  Segment<A>* warps = reinterpret_cast<Segment<A>*>(shared_memory());
  const A gamma = A(a.gamma), gamma_lambda = A(a.gamma_lambda);
  const int64_t tile = int64_t(block_size()) * kSteps;
  for (int64_t row = block_index(); row < a.sequences; row += block_count()) {
    int64_t begin = row * a.length, end = begin + a.length;
    if (a.offsets) {  // offsets that are wrong read and write nothing outside
      begin = a.offsets[row] < 0 ? 0 : a.offsets[row];
      end = a.offsets[row + 1] < a.total ? a.offsets[row + 1] : a.total;
    }
    const A *rewards = static_cast<const A*>(a.rewards), *values = static_cast<const A*>(a.values);
    A *advantages = static_cast<A*>(a.advantages), *returns = static_cast<A*>(a.returns);
    const bool aligned =
        (skew_of(rewards + begin) | skew_of(values + begin) | skew_of(advantages + begin) |
         skew_of(returns + begin) | (a.mask ? skew_of(a.mask + begin) % 4 : 0)) == 0;
    Carry<A> carry{0, a.last_value ? static_cast<const A*>(a.last_value)[row] : A(0)};
    const int64_t tiles = begin < end ? (end - begin + tile - 1) / tile : 0;
    for (int64_t t = tiles - 1; t >= 0; --t) {
      const int64_t at = begin + t * tile + thread_index() * kSteps, count = end - at;
      const bool whole = aligned && count >= kSteps;
      A reward[kSteps], value[kSteps], advantage[kSteps], target[kSteps];
      load_steps(rewards + at, count, whole, reward);
      load_steps(values + at, count, whole, value);
      const int valid = valid_steps(a.mask ? a.mask + at : nullptr, count, whole);
      Segment<A> own;
#pragma unroll
      for (int i = kSteps - 1; i >= 0; --i)
        if (valid >> i & 1)
          own = chain(Segment<A>{reward[i] - value[i], gamma_lambda, gamma, value[i], 1}, own);
      Carry<A> next = scan_block(own, warps, &carry);
#pragma unroll
      for (int i = kSteps - 1; i >= 0; --i) {
        const bool here = valid >> i & 1;
        const A delta = gae_delta(reward[i], value[i], next.value, gamma);
        const Carry<A> step{gae_advantage(delta, next.advantage, gamma_lambda), value[i]};
        if (here) next = step;
        advantage[i] = here ? step.advantage : A(0);
        target[i] = here ? step.advantage + step.value : A(0);
      }
      store_steps(advantages + at, count, whole, advantage);
      store_steps(returns + at, count, whole, target);
    }
  }
}

// ---- launcher
// --------------------------------------------------------------------------------------

static std::tuple<Tensor, Tensor> gae(const Tensor& rewards_in, const Tensor& values_in,
                                      const std::optional<Tensor>& mask_in,
                                      const std::optional<Tensor>& cu_seqlens,
                                      const std::optional<Tensor>& last_value_in, double gamma,
                                      double lam) {
  const OnDevice on(values_in);
  const ScalarType type =
      accumulation_type(rewards_in, values_in, last_value_in.value_or(values_in));
  const int64_t dims = values_in.dim();
  const Tensor rewards = dense(rewards_in, type), values = dense(values_in, type);
  const auto mask = dense(mask_in, ScalarType::Bool), last_value = dense(last_value_in, type);
  const auto offsets = dense(cu_seqlens, ScalarType::Long);
  if (offsets && checking()) checked_offsets(on_cpu(*offsets), values.numel(), "cu_seqlens");
  Tensor advantages = device_empty(values, values.sizes().data(), dims, type);
  Tensor returns = device_empty(values, values.sizes().data(), dims, type);
  GaeArgs a{};
  a.rewards = rewards.const_data_ptr();
  a.values = values.const_data_ptr();
  a.last_value = data_or_null(last_value);
  a.mask = static_cast<const bool*>(data_or_null(mask));
  a.offsets = static_cast<const int64_t*>(data_or_null(offsets));
  a.sequences = offsets ? offsets->numel() - 1 : values.size(0);
  a.length = offsets ? 0 : values.size(1);
  a.total = values.numel();
  a.gamma = gamma;
  a.gamma_lambda = gamma * lam;
  a.advantages = advantages.mutable_data_ptr();
  a.returns = returns.mutable_data_ptr();
  // By the length alone; packed sequences may have any.
  const int64_t warps = offsets ? kThreads / kWarp : ceil_div(a.length, kSteps * kWarp);
  const int threads = kWarp * static_cast<int>(warps < 1 ? 1 : warps < 8 ? warps : 8);
  const Grid grid{a.total == 0 ? 0 : blocks_for(a.sequences, threads), threads,
                  kThreads / kWarp * static_cast<int>(sizeof(Segment<double>))};
  launch("gae", type == ScalarType::Double ? gae_kernel<double> : gae_kernel<float>, grid,
         on.stream, a);
  return {advantages, returns};
}

RK_REGISTER(m) { m.impl("gae", TORCH_BOX(&gae)); }

}  // namespace rlhf_kernels
