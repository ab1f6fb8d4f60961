// A row's LayerNorm on the CPU: buffers that stay in the first-level cache, and what is computed in them.
#pragma once

#include "cpu_rows.h"
#include "layer_norm.h"
#include "philox.h"

namespace blip2_kernels {

// A summand of rows that have one less than others.
template <class T>
alignas(64) constexpr T kZeros[kMaxNormWidth] = {};

struct alignas(64) RowBuffers {
  float hidden[kMaxNormWidth];
  float weighted[kMaxNormWidth];
  PhiloxWords random[kMaxNormWidth / kLanes];

  // Draws the random numbers of a row's channels.
  HOST_DEVICE void draw(const Dropout& dropout, int32_t row_key, int width) {
    const int groups = (width + kLanes - 1) / kLanes;
#pragma omp simd
    for (int group = 0; group < groups; ++group) random[group] = philox(dropout, uint32_t(row_key), group);
  }

  // The random number of a channel: words lie in memory as their halves do, low half first.
  HOST_DEVICE const uint16_t* lanes() const {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
    return reinterpret_cast<const uint16_t*>(random);
  }
};

// A value of channel c after dropout, if there is one; `lanes` are the random numbers of its row.
template <bool kDrops>
HOST_DEVICE float dropped(const Dropout& dropout, const uint16_t* lanes, int c, float value) {
  return kDrops ? drop(dropout, lanes[c], value) : value;
}

// Channels that are summed up before their sum is added to that of the row: an error grows with what is added
// one after the other.
constexpr int kPiece = 512;

HOST_DEVICE float reciprocal_deviation(const float* __restrict hidden, int width, float mean, float eps) {
  float squares = 0;
  for (int first = 0; first < width; first += kPiece) {
    const int last = std::min(first + kPiece, width);
    float piece = 0;
#pragma omp simd reduction(+ : piece)
    for (int c = first; c < last; ++c) piece += (hidden[c] - mean) * (hidden[c] - mean);
    squares += piece;
  }
  return 1.0f / __builtin_sqrtf(squares / width + eps);
}

}  // namespace blip2_kernels
