// What every launcher shares: dtype codes, argument checks, row addressing, allocation.
//
// Launchers are compiled once, against PyTorch's stable ABI. Errors are thrown before anything is
// computed: std::invalid_argument arrives in Python as ValueError, std::out_of_range as IndexError.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "types.h"

namespace rlhf_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Declares the kernel `name(const Args&, begin, end)` of every level; RK_KERNEL(name) picks one.
#if defined(__x86_64__)
#define RK_DECLARE(name, Args)                        \
  namespace avx512 {                                  \
  void name(const Args&, int64_t begin, int64_t end); \
  }                                                   \
  namespace avx2 {                                    \
  void name(const Args&, int64_t begin, int64_t end); \
  }                                                   \
  namespace baseline {                                \
  void name(const Args&, int64_t begin, int64_t end); \
  }
#else
#define RK_DECLARE(name, Args)                        \
  namespace baseline {                                \
  void name(const Args&, int64_t begin, int64_t end); \
  }
#endif

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      throw std::invalid_argument(std::string(name) + ": expected a floating dtype");
  }
}

// Accumulation and outputs: float32, float64 where an input is float64.
template <class... Tensors>
inline ScalarType accumulation_type(const Tensors&... x) {
  return ((x.scalar_type() == ScalarType::Double) || ...) ? ScalarType::Double : ScalarType::Float;
}

inline void check_rows(const Tensor& x, const char* name) {
  const int64_t d = x.dim();
  if (d < 1 || (x.size(d - 1) > 1 && x.stride(d - 1) != 1))
    throw std::invalid_argument(std::string(name) + ": expected stride 1 in the last dimension");
}

// The leading dimensions of x (all but the last); neighbours that step alike are merged.
inline RowStrides row_strides(const Tensor& x, const char* name) {
  RowStrides rows{};
  for (int64_t d = 0; d < x.dim() - 1; ++d) {
    const int64_t size = x.size(d), stride = x.stride(d);
    if (size == 1) continue;
    if (rows.dims > 0 && rows.strides[rows.dims - 1] == stride * size) {
      rows.sizes[rows.dims - 1] *= size;
      rows.strides[rows.dims - 1] = stride;
    } else {
      if (rows.dims == RowStrides::kMaxDims)
        throw std::invalid_argument(std::string(name) + ": expected at most 16 leading dimensions");
      rows.sizes[rows.dims] = size;
      rows.strides[rows.dims++] = stride;
    }
  }
  return rows;
}

// A contiguous, uninitialised tensor, on the CPU unless said otherwise (the short way: no
// dispatcher call).
inline Tensor empty(const int64_t* sizes, int64_t dims, ScalarType type,
                    int32_t device = aoti_torch_device_type_cpu(), int32_t index = 0) {
  std::vector<int64_t> strides(dims);
  int64_t step = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  }
  AtenTensorHandle handle;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides.data(), code, device, index, &handle));
  return Tensor(handle);
}
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), type);
}
inline Tensor empty_as(const Tensor& shape_of, ScalarType type) {
  return empty(shape_of.sizes().data(), shape_of.dim(), type);
}

// A contiguous tensor of the wanted type: for (B, T)-sized tensors only, never a vocabulary-sized
// one.
inline Tensor dense(const Tensor& x, ScalarType type) {
  Tensor y = x.scalar_type() == type ? x : torch::stable::to(x, type);
  return y.is_contiguous() ? y : torch::stable::contiguous(y);
}
inline std::optional<Tensor> dense(const std::optional<Tensor>& x, ScalarType type) {
  return x ? std::optional<Tensor>(dense(*x, type)) : std::nullopt;
}

// Segment offsets (int32 or int64) as int64 that start at 0, never fall and end at `end`.
inline Tensor checked_offsets(const Tensor& x, int64_t end, const char* name) {
  Tensor y = dense(x, ScalarType::Long);
  const int64_t* p = y.const_data_ptr<int64_t>();
  const int64_t n = y.numel();
  bool good = n > 0 && p[0] == 0 && p[n - 1] == end;
  for (int64_t i = 1; i < n && good; ++i) good = p[i] >= p[i - 1];
  if (good) return y;
  std::string got = "[";
  for (int64_t i = 0; i < n; ++i) got += (i ? ", " : "") + std::to_string(p[i]);
  throw std::invalid_argument(std::string(name) +
                              ": expected offsets that start at 0, never fall " + "and end at " +
                              std::to_string(end) + ", got " + got + "]");
}

inline void check_tokens(const Tensor& tokens, int64_t vocab, int64_t ignore_index) {
  const auto* p = static_cast<const int64_t*>(tokens.const_data_ptr());
  for (int64_t i = 0, n = tokens.numel(); i < n; ++i) {
    if ((p[i] >= 0 && p[i] < vocab) || p[i] == ignore_index) continue;
    std::string at;  // the index of element i in the shape of tokens
    int64_t rest = i;
    for (int64_t d = tokens.dim() - 1; d >= 0; rest /= tokens.size(d--))
      at = std::to_string(rest % tokens.size(d)) + (at.empty() ? "" : ", ") + at;
    throw std::out_of_range("tokens: expected a value in [0, " + std::to_string(vocab) +
                            ") or ignore_index, got " + std::to_string(p[i]) + " at position " +
                            (tokens.dim() == 1 ? at : "(" + at + ")"));
  }
}

// Temperatures of rows with a token to be scored: finite and > 0.
inline void check_temperature(const std::optional<Tensor>& temperature, const Tensor& tokens,
                              int64_t ignore_index) {
  if (!temperature || temperature->numel() == 0) return;
  const bool wide = temperature->scalar_type() == ScalarType::Double;
  const void* p = temperature->const_data_ptr();
  const auto* token = static_cast<const int64_t*>(tokens.const_data_ptr());
  const int64_t per_row = tokens.numel() / temperature->numel();
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    const int64_t row = i / per_row;
    const double t = wide ? static_cast<const double*>(p)[row] : static_cast<const float*>(p)[row];
    if (token[i] != ignore_index && !(t > 0 && t < __builtin_inf()))
      throw std::invalid_argument("temperature: expected finite numbers > 0, got " +
                                  std::to_string(t) + " in row " + std::to_string(row));
  }
}

// A number rounded as a tensor argument would be, so that both give the same bits.
inline double number_in(double x, DType dtype) {
  return dtype == DType::f64 ? x : static_cast<double>(static_cast<float>(x));
}

// A thread is worth starting for some 32 K elements.
inline int64_t rows_per_thread(int64_t row_length) {
  return row_length >= 32768 ? 1 : 32768 / (row_length > 0 ? row_length : 1);
}

inline const void* data_or_null(const std::optional<Tensor>& x) {
  return x ? x->const_data_ptr() : nullptr;
}

}  // namespace rlhf_kernels
