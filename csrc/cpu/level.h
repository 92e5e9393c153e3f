// Which SIMD level runs: the best that the processor has, or the one RLHF_KERNELS_SIMD names
// (tests).
#pragma once
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace rlhf_kernels {

enum class Level { baseline, avx2, avx512 };

inline const char* level_name(Level level) {
  return level == Level::avx512 ? "avx512" : level == Level::avx2 ? "avx2" : "baseline";
}

inline Level detect_level() {
  const char* wanted = std::getenv("RLHF_KERNELS_SIMD");
  const auto names = [&](Level level) {
    return wanted != nullptr && std::strcmp(wanted, level_name(level)) == 0;
  };
  if (wanted && !names(Level::baseline) && !names(Level::avx2) && !names(Level::avx512))
    throw std::runtime_error("RLHF_KERNELS_SIMD: expected baseline, avx2 or avx512, got " +
                             std::string(wanted));
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // A level that the processor lacks is never taken: the next lower one is.
  if (avx2 && avx512 && (!wanted || names(Level::avx512))) return Level::avx512;
  if (avx2 && !names(Level::baseline)) return Level::avx2;
#endif
  return Level::baseline;
}

inline Level level() {
  static const Level chosen = detect_level();
  return chosen;
}

}  // namespace rlhf_kernels

// RK_KERNEL(f): the function f of the namespace of the level in use.
#if defined(__x86_64__)
#define RK_KERNEL(f)                                                    \
  (::rlhf_kernels::level() == ::rlhf_kernels::Level::avx512 ? avx512::f \
   : ::rlhf_kernels::level() == ::rlhf_kernels::Level::avx2 ? avx2::f   \
                                                            : baseline::f)
#else
#define RK_KERNEL(f) (baseline::f)
#endif
