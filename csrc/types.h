// Element types and row addressing, for the CPU and the GPU: no torch, no SIMD here.
#pragma once
#include <cstdint>

#include "math/scalar.h"

namespace rlhf_kernels {

enum class DType : int { f32, f64, bf16, f16 };
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Where row i of a (..., V) tensor starts, in elements: leading dimensions may have any strides.
struct RowStrides {
  static constexpr int kMaxDims = 16;
  int dims;
  int64_t sizes[kMaxDims], strides[kMaxDims];
};
RK_HD int64_t row_offset(const RowStrides& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.dims - 1; d > 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return rows.dims > 0 ? offset + row * rows.strides[0] : 0;
}

RK_HD float to_float(float x) { return x; }
RK_HD double to_float(double x) { return x; }
RK_HD float to_float(bf16 x) { return __builtin_bit_cast(float, uint32_t(x.bits) << 16); }
RK_HD float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  // The exponent field moves from 5 to 8 bits; the product scales it, subnormals included.
  float y = __builtin_bit_cast(float, rest << 13) * 0x1p112f;
  if (rest >= 0x7c00u) y = __builtin_bit_cast(float, 0x7f800000u | (rest << 13));
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, y) | sign);
}

RK_HD void from_float(float* p, float x) { *p = x; }
RK_HD void from_float(double* p, double x) { *p = x; }
RK_HD void from_float(bf16* p, float x) {  // to nearest even
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  p->bits = x != x ? 0x7fc0u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
RK_HD void from_float(f16* p, float x) {  // to nearest even, by letting float32 addition round
  const uint32_t u = __builtin_bit_cast(uint32_t, x), sign = u & 0x80000000u;
  const float a = __builtin_bit_cast(float, u ^ sign);
  uint32_t h;
  if (!(a < 65520.0f)) {
    h = a != a ? 0x7e00u : 0x7c00u;
  } else if (a < 0x1p-14f) {  // subnormal: the unit is 2^-24, the last place of 0.5
    h = __builtin_bit_cast(uint32_t, a + 0.5f) - __builtin_bit_cast(uint32_t, 0.5f);
  } else {
    const uint32_t v = __builtin_bit_cast(uint32_t, a);
    h = (v + 0xfffu + ((v >> 13) & 1u) - 0x38000000u) >> 13;
  }
  p->bits = h | (sign >> 16);
}

}  // namespace rlhf_kernels

// function<T>(args...) for the stored type T that `dtype` names
#define RK_SWITCH(dtype, function, ...)     \
  switch (dtype) {                          \
    case DType::f32:                        \
      return function<float>(__VA_ARGS__);  \
    case DType::f64:                        \
      return function<double>(__VA_ARGS__); \
    case DType::bf16:                       \
      return function<bf16>(__VA_ARGS__);   \
    case DType::f16:                        \
      return function<f16>(__VA_ARGS__);    \
  }
