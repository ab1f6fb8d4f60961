// Loops over rows on the CPU: in parallel, for this processor, and their sums.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "cpu_target.h"
#include "row_sums.h"

namespace blip2_kernels {

constexpr int64_t kElementsPerTask = 1 << 15;  // less is not worth waking a thread for

// Calls body(first, last) for ranges that cover [0, count); an item has this many elements.
template <class Body>
void in_parallel(int64_t count, int64_t elements, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(elements, 1));
  torch::stable::parallel_for(0, count, grain, body);
}

// Calls body(first, last) for ranges of the parts that rows of this width fall into.
template <class Body>
void in_parallel_parts(int64_t parts, int64_t rows, int64_t width, const Body& body) {
  in_parallel(parts, width * rows / std::max<int64_t>(parts, 1), body);
}

// Adds up the parts of each column in their order; of several columns at a time, which lie side by side.
template <class T>
void store_sum(const float* partials, int64_t parts, int64_t stride, int64_t width, void* sums) {
  constexpr int kColumns = 64;
  T* out = static_cast<T*>(sums);
  in_parallel(width, parts, [&](int64_t first, int64_t last) {
    run_for_this_processor([&]() ALWAYS_INLINE {
      for (int64_t column = first; column < last; column += kColumns) {
        const int count = int(std::min<int64_t>(kColumns, last - column));
        double total[kColumns] = {};
        for (int64_t part = 0; part < parts; ++part) {
          const float* __restrict row = partials + part * stride + column;
#pragma omp simd
          for (int c = 0; c < count; ++c) total[c] += row[c];
        }
        for (int c = 0; c < count; ++c) out[column + c] = from_float<T>(float(total[c]));
      }
    });
  });
}

// Adds up a destination's rows in their order; `sums` is room for a row.
template <class T>
HOST_DEVICE void store_list(const RowLists& a, int64_t entry, int64_t destination, double* __restrict sums) {
  const int width = int(a.width);
  T* __restrict out = static_cast<T*>(a.out) + destination * a.width;
  if (!a.belongs(entry, destination)) {
    for (int c = 0; c < width; ++c) out[c] = T(0);
    return;
  }
  const float* __restrict first = a.rows + a.row_of(entry) * a.width;
  const int64_t step = a.step();
  if (!a.belongs(entry + step, destination)) {  // as of most words, there is one row
#pragma omp simd
    for (int c = 0; c < width; ++c) out[c] = from_float<T>(first[c]);
    return;
  }
#pragma omp simd
  for (int c = 0; c < width; ++c) sums[c] = first[c];
  for (entry += step; a.belongs(entry, destination); entry += step) {
    const float* __restrict row = a.rows + a.row_of(entry) * a.width;
#pragma omp simd
    for (int c = 0; c < width; ++c) sums[c] += row[c];
  }
#pragma omp simd
  for (int c = 0; c < width; ++c) out[c] = from_float<T>(float(sums[c]));
}

template <class T, int64_t kMaxWidth>
void store_lists(const RowLists& a) {
  const int64_t owners = a.owners(), rows_each = a.count / std::max<int64_t>(owners, 1);
  in_parallel(owners, a.width * std::max<int64_t>(rows_each, 1), [&](int64_t first, int64_t last) {
    double sums[kMaxWidth];
    run_for_this_processor([&]() ALWAYS_INLINE {
      for (int64_t entry = first; entry < last; ++entry) {
        const int64_t destination = a.owned(entry);
        if (destination >= 0) store_list<T>(a, entry, destination, sums);
      }
    });
  });
}

}  // namespace blip2_kernels
