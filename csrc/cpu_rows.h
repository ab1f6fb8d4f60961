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

template <class T>
void store_sum(const float* partials, int64_t parts, int64_t stride, int64_t width, void* sums) {
  T* out = static_cast<T*>(sums);
  in_parallel(width, parts, [&](int64_t first, int64_t last) {
    run_for_this_processor([&]() __attribute__((always_inline)) {
      for (int64_t c = first; c < last; ++c) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += partials[part * stride + c];
        out[c] = from_float<T>(float(sum));
      }
    });
  });
}

}  // namespace blip2_kernels
