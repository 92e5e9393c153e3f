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

template <class T>
struct Scratch {
  static constexpr int kSteps = 512;  // in the first-level cache at a time
  static constexpr int kLanes = lanes<typename Compute<T>::V>;
  T delta[kSteps + kLanes], value[kSteps + 1];
  T power[kLanes];  // c^(lanes - k), c = gamma lambda
  double decay;     // c^lanes

  explicit Scratch(double c) : decay(1) {
    for (int k = kLanes - 1; k >= 0; --k) power[k] = T(decay *= c);
  }
};

// The valid steps [begin, end), last first.
template <class T>
static void scan_run(const GaeArgs& a, int64_t begin, int64_t end, Scratch<T>& s, Carry* next) {
  using V = typename Compute<T>::V;
  const T *rewards = static_cast<const T*>(a.rewards), *values = static_cast<const T*>(a.values);
  T *advantages = static_cast<T*>(a.advantages), *returns = static_cast<T*>(a.returns);
  const V gamma = splat<V>(a.gamma);
  while (end - begin >= lanes<V>) {
    const int64_t left = (end - begin) / lanes<V> * lanes<V>, n = left < s.kSteps ? left : s.kSteps;
    const int64_t first = end - n;
    std::memcpy(s.value, values + first, n * sizeof(T));
    s.value[n] = T(next->value);
    store(s.delta + n, V{});
    for (int64_t i = 0; i < n; i += lanes<V>) {
      const V value = load(s.value + i), next_value = load(s.value + i + 1);
      store(s.delta + i, gae_delta(load(rewards + first + i), value, next_value, gamma));
    }
    double c = a.gamma_lambda;
    for (int step = 1; step < lanes<V>; step *= 2, c *= c)
      for (int64_t i = 0; i < n; i += lanes<V>) {
        const V later = select(first_lanes(lanes<V> - step, V{}), load(s.delta + i + step), V{});
        store(s.delta + i, gae_advantage(load(s.delta + i), later, splat<V>(c)));
      }
    for (int64_t i = n - lanes<V>; i >= 0; i -= lanes<V>) {
      const V later = splat<V>(next->advantage);
      const V advantage = gae_advantage(load(s.delta + i), later, load(s.power));
      store(advantages + first + i, advantage);
      store(returns + first + i, advantage + load(s.value + i));
      next->advantage = gae_advantage(double(s.delta[i]), next->advantage, s.decay);
    }
    next->value = s.value[0];
    end = first;
  }
  while (end-- > begin) {  // less than a vector
    const double d = gae_delta(double(rewards[end]), double(values[end]), next->value, a.gamma);
    *next = {gae_advantage(d, next->advantage, a.gamma_lambda), double(values[end])};
    advantages[end] = T(next->advantage);
    returns[end] = T(next->advantage + next->value);
  }
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
  Scratch<T> scratch(a.gamma_lambda);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t start = a.offsets ? a.offsets[row] : row * a.length;
    int64_t stop = a.offsets ? a.offsets[row + 1] : start + a.length;
    Carry next{0, last_value ? double(last_value[row]) : 0};
    while (stop > start) {
      const int64_t first = a.mask ? run_begin(a.mask, start, stop) : start;
      if (!a.mask || a.mask[first]) {
        scan_run(a, first, stop, scratch, &next);
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
  const int64_t grain = 2 * rows_per_thread(sequences > 0 ? total / sequences : 0);
  torch::stable::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    RK_KERNEL(gae_kernel)(a, begin, end);
  });
  return {advantages, returns};
}

STABLE_TORCH_LIBRARY_IMPL(rlhf_kernels, CPU, m) { m.impl("gae", TORCH_BOX(&gae)); }

}  // namespace rlhf_kernels
#endif
