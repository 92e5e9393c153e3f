// A row in memory, read and written in 16-byte vectors from any column on: which columns a thread
// gets depends on the column alone, never on where the row starts.
#pragma once
#include "device.h"

namespace rlhf_kernels {

template <class T>
struct Compute {
  using Scalar = float;
};
template <>
struct Compute<double> {
  using Scalar = double;
};

template <class T>
inline constexpr int kLanes = 16 / static_cast<int>(sizeof(T));  // elements of a 16-byte vector

// How far p stands behind a 16-byte boundary, in bytes.
RK_D int skew_of(const void* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15); }

// The 16 bytes that begin `skew` bytes (even, below 16) into the 32 bytes (low, high).
RK_D Bytes16 join(Bytes16 low, Bytes16 high, int skew) {
  uint32_t w[8] = {low.word[0],  low.word[1],  low.word[2],  low.word[3],
                   high.word[0], high.word[1], high.word[2], high.word[3]};
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = skew & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = skew & 4 ? w[i + 1] : w[i];
  Bytes16 out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.word[i] = funnel_shift(w[i], w[i + 1], skew % 4 * 8);
  return out;
}

template <class T>
struct Row {
  T* at;
  int64_t size;
};

// Do the aligned 16-byte words that hold columns [first, last) lie inside the row?
template <class T>
RK_D bool holds(const Row<T>& row, int64_t first, int64_t last) {
  const int skew = skew_of(row.at + first);
  const int64_t lead = skew / static_cast<int>(sizeof(T));
  return first >= lead && last - lead + (skew ? kLanes<T> : 0) <= row.size;
}

// Columns [first, first + kLanes); -inf outside of the row.
template <class T>
RK_D void load_columns(const Row<const T>& row, int64_t first,
                       typename Compute<T>::Scalar (&out)[kLanes<T>]) {
  const T* p = row.at + first;
  const int skew = skew_of(p);
  if (holds(row, first, first + kLanes<T>)) {
    const unsigned char* word = reinterpret_cast<const unsigned char*>(p) - skew;
    unpack(skew ? join(load16(word), load16(word + 16), skew) : load16(word), p, out);
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i)
      out[i] = first + i >= 0 && first + i < row.size ? to_float(p[i]) : -INFINITY;
  }
}

// kHeld vectors, the first at column `first`, the next ones `step` columns on; [tile, tile_end) are
// the columns of the whole block. Away from the ends of the row all loads are under way at once.
template <class T, int kHeld>
RK_D void load_tile(const Row<const T>& row, int64_t first, int step, int64_t tile,
                    int64_t tile_end, typename Compute<T>::Scalar (&out)[kHeld][kLanes<T>]) {
  const unsigned char* p = reinterpret_cast<const unsigned char*>(row.at + first);
  const int skew = skew_of(p);
  if (!holds(row, tile, tile_end)) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) load_columns(row, first + j * step, out[j]);
    return;
  }
  Bytes16 low[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) low[j] = load16(p - skew + int64_t(j) * step * sizeof(T));
  if (skew) {
    Bytes16 high[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) high[j] = load16(p - skew + 16 + int64_t(j) * step * sizeof(T));
#pragma unroll
    for (int j = 0; j < kHeld; ++j) low[j] = join(low[j], high[j], skew);
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) unpack(low[j], row.at, out[j]);
}

// Columns [first, first + kLanes) where row.at + first is aligned; outside of the row nothing.
template <class T>
RK_D void store_columns(const Row<T>& row, int64_t first,
                        const typename Compute<T>::Scalar (&x)[kLanes<T>]) {
  T* p = row.at + first;
  if (first >= 0 && first + kLanes<T> <= row.size) {
    store16(p, pack(x, p));
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i)
      if (first + i >= 0 && first + i < row.size) from_float(p + i, x[i]);
  }
}

}  // namespace rlhf_kernels
