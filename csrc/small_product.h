// Products of small fp32 matrices that lie in a core's caches, on the CPU.
#pragma once

#include <cstdint>

#include "cpu_target.h"
#include "platform.h"

namespace blip2_kernels {

constexpr int kTileRows = 6;      // with two registers of AVX2 a row, all sums stay in registers
constexpr int kTileColumns = 16;  // matrices on the right have room for so many beyond their last column

// A matrix in memory: element (i, j) is data[i * row + j * column].
struct Strided {
  const float* data;
  int64_t row;
  int64_t column = 1;

  HOST_DEVICE Strided transposed() const { return {data, column, row}; }
};

template <int kRows, bool kAdd>
HOST_DEVICE void product_tile(
    const Strided& left, const float* __restrict right, int64_t right_row, int inner, float* __restrict out,
    int64_t out_row) {
  float sums[kRows][kTileColumns];
#if defined(__GNUC__)
#pragma GCC unroll 8
#endif
  for (int r = 0; r < kRows; ++r)
#pragma omp simd
    for (int c = 0; c < kTileColumns; ++c) sums[r][c] = kAdd ? out[r * out_row + c] : 0.0f;
  for (int i = 0; i < inner; ++i) {
    const float* __restrict from = right + i * right_row;
#if defined(__GNUC__)
#pragma GCC unroll 8
#endif
    for (int r = 0; r < kRows; ++r) {
      const float factor = left.data[r * left.row + i * left.column];
#pragma omp simd
      for (int c = 0; c < kTileColumns; ++c) sums[r][c] += factor * from[c];
    }
  }
#if defined(__GNUC__)
#pragma GCC unroll 8
#endif
  for (int r = 0; r < kRows; ++r)
#pragma omp simd
    for (int c = 0; c < kTileColumns; ++c) out[r * out_row + c] = sums[r][c];
}

// out [rows, columns] = left [rows, inner] right [inner, columns], added to what is there with kAdd. The rows
// of `right` and `out` have adjacent elements, and whole tiles of columns are read and written.
template <bool kAdd>
HOST_DEVICE void product(
    const Strided& left, const float* __restrict right, int64_t right_row, int rows, int inner, int columns,
    float* __restrict out, int64_t out_row) {
  for (int c = 0; c < columns; c += kTileColumns) {
    int row = 0;
    const auto tiles = [&]<int kRows>() ALWAYS_INLINE {
      for (; row + kRows <= rows; row += kRows)
        product_tile<kRows, kAdd>(
            {left.data + row * left.row, left.row, left.column}, right + c, right_row, inner,
            out + row * out_row + c, out_row);
    };
    tiles.template operator()<kTileRows>();
    tiles.template operator()<2>();
    tiles.template operator()<1>();
  }
}

}  // namespace blip2_kernels
