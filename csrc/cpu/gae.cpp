// gae on the CPU: a reverse scan per sequence, vectorised along the sequence. With c = gamma
// lambda, delta_t + c delta_{t+1} + ... is summed up within each vector by doubling; what comes
// after the vector is added as c^k A, where A goes from vector to vector in float64. Vectors are
// counted from the end of each run of valid steps, so what a sequence gets does not depend on the
// others.
#include "simd.h"
#include "math/gae.h"
#include "step.h"

namespace rlhf_kernels {

struct GaeArgs {
  bool wide;                                  // float64, else float32
  const void *rewards, *values, *last_value;  // last_value (S) may be null
  const bool* mask;                           // may be null
  const int64_t* offsets;                     // (S + 1), or null: sequences of `length` steps
  int64_t length;
  double gamma, gamma_lambda;
  void *advantages, *returns;
};

namespace RK_SIMD {

struct Carry {  // of the next valid step; after the last one 0 and the bootstrap value
  double advantage, value;
};

// x without its first lane, and then y.
RK_HD double shift_in(double, double y) { return y; }
RK_HD vfloat shift_in(vfloat x, double y) { return later_lanes<1>(x, splat<vfloat>(y)); }
RK_HD void set_lane(double& x, int, double to) { x = to; }
RK_HD void set_lane(vfloat& x, int k, double to) { x[k] = static_cast<float>(to); }
RK_HD double first_lane(double x) { return x; }
RK_HD double first_lane(vfloat x) { return x[0]; }

// The powers of c = gamma lambda that a vector of steps is summed with.
template <class V>
struct Powers {
  V doubling[4];  // c, c^2, c^4, c^8
  V after;        // lane k: c^(lanes - k)
  double all;     // c^lanes

  explicit Powers(double c) : all(1) {
    for (int k = lanes<V> - 1; k >= 0; --k) set_lane(after, k, all *= c);
    for (V& x : doubling) x = splat<V>(c), c *= c;
  }
};

// Lane i gets x_i + c x_{i+1} + c^2 x_{i+2} + ... up to the end of the vector.
RK_HD double sum_after(double x, const Powers<double>&) { return x; }
RK_HD vfloat sum_after(vfloat x, const Powers<vfloat>& c) {
  x = gae_advantage(x, later_lanes<1>(x, vfloat{}), c.doubling[0]);
  x = gae_advantage(x, later_lanes<2>(x, vfloat{}), c.doubling[1]);
  if constexpr (kLanes > 4) x = gae_advantage(x, later_lanes<4>(x, vfloat{}), c.doubling[2]);
  if constexpr (kLanes > 8) x = gae_advantage(x, later_lanes<8>(x, vfloat{}), c.doubling[3]);
  return x;
}

// The valid steps [begin, end), last first.
template <class T>
static void scan_run(const GaeArgs& a, int64_t begin, int64_t end,
                     const Powers<typename Compute<T>::V>& c, Carry* after) {
  using V = typename Compute<T>::V;
  const T *rewards = static_cast<const T*>(a.rewards), *values = static_cast<const T*>(a.values);
  T *advantages = static_cast<T*>(a.advantages), *returns = static_cast<T*>(a.returns);
  const V gamma = splat<V>(a.gamma);
  Carry next = *after;  // in registers: stores to the outputs could alias *after
  for (; end - begin >= lanes<V>; end -= lanes<V>) {
    const int64_t i = end - lanes<V>;
    const V value = load(values + i), next_value = shift_in(value, next.value);
    const V sum = sum_after(gae_delta(load(rewards + i), value, next_value, gamma), c);
    const V advantage = gae_advantage(sum, splat<V>(next.advantage), c.after);
    store(advantages + i, advantage);
    store(returns + i, advantage + value);
    next = {gae_advantage(first_lane(sum), next.advantage, c.all), double(values[i])};
  }
  while (end-- > begin) {  // less than a vector
    const double d = gae_delta(double(rewards[end]), double(values[end]), next.value, a.gamma);
    next = {gae_advantage(d, next.advantage, a.gamma_lambda), double(values[end])};
    advantages[end] = T(next.advantage);
    returns[end] = T(next.advantage + next.value);
  }
  *after = next;
}

// Where the run of equal mask bytes that ends at `end` begins.
static int64_t run_begin(const bool* mask, int64_t begin, int64_t end) {
  const bool valid = mask[end - 1];
  const uint64_t pattern = valid ? 0x0101010101010101u : 0;
  for (uint64_t eight; end - begin >= 8; end -= 8) {
    std::memcpy(&eight, mask + end - 8, 8);
    if (eight != pattern) break;
  }
  while (end > begin && mask[end - 1] == valid) --end;
  return end;
}

template <class T>
static void scan(const GaeArgs& a, int64_t begin, int64_t end) {
  const T* last_value = static_cast<const T*>(a.last_value);
  const Powers<typename Compute<T>::V> powers(a.gamma_lambda);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = a.offsets ? a.offsets[row] : row * a.length;
    int64_t stop = a.offsets ? a.offsets[row + 1] : start + a.length;
    Carry next{0, last_value ? double(last_value[row]) : 0};
    while (stop > start) {
      const int64_t first = a.mask ? run_begin(a.mask, start, stop) : start;
      if (!a.mask || a.mask[first]) {
        scan_run<T>(a, first, stop, powers, &next);
      } else {
        std::memset(static_cast<T*>(a.advantages) + first, 0, (stop - first) * sizeof(T));
        std::memset(static_cast<T*>(a.returns) + first, 0, (stop - first) * sizeof(T));
      }
      stop = first;
    }
  }
}

void gae_kernel(const GaeArgs& a, int64_t begin, int64_t end) {
  a.wide ? scan<double>(a, begin, end) : scan<float>(a, begin, end);
}

}  // namespace RK_SIMD
}  // namespace rlhf_kernels

#ifdef RK_LAUNCHER
#include "common.h"

namespace rlhf_kernels {
RK_DECLARE(gae_kernel, GaeArgs)

static std::tuple<Tensor, Tensor> gae(const Tensor& rewards_in, const Tensor& values_in,
                                      const std::optional<Tensor>& mask_in,
                                      const std::optional<Tensor>& cu_seqlens,
                                      const std::optional<Tensor>& last_value_in, double gamma,
                                      double lam) {
  const ScalarType type =
      accumulation_type(rewards_in, values_in, last_value_in.value_or(values_in));
  const int64_t total = values_in.numel();
  std::optional<Tensor> offsets;
  if (cu_seqlens) offsets = checked_offsets(*cu_seqlens, total, "cu_seqlens");
  const Tensor rewards = dense(rewards_in, type), values = dense(values_in, type);
  const auto mask = dense(mask_in, ScalarType::Bool), last_value = dense(last_value_in, type);
  Tensor advantages = empty_as(values, type), returns = empty_as(values, type);
  GaeArgs a{};
  a.wide = type == ScalarType::Double;
  a.rewards = rewards.const_data_ptr();
  a.values = values.const_data_ptr();
  a.last_value = data_or_null(last_value);
  a.mask = static_cast<const bool*>(data_or_null(mask));
  a.offsets = static_cast<const int64_t*>(data_or_null(offsets));
  a.length = offsets ? 0 : values.size(1);
  a.gamma = gamma;
  a.gamma_lambda = gamma * lam;
  a.advantages = advantages.mutable_data_ptr();
  a.returns = returns.mutable_data_ptr();
  const int64_t sequences = offsets ? offsets->numel() - 1 : values.size(0);
  // 64 K steps take 30 us: below that a second thread costs more than it brings.
  const int64_t grain = rows_per_thread(sequences > 0 ? total / sequences : 0);
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    RK_KERNEL(gae_kernel)(a, begin, end);
  });
  return {advantages, returns};
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { m.impl("gae", TORCH_BOX(&gae)); }

}  // namespace rlhf_kernels
#endif
