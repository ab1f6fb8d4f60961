// What the operators with a LayerNorm share: its arithmetic, and how rows fall into parts for its gradients.
#pragma once

#include "number.h"

namespace blip2_kernels {

constexpr int64_t kMaxNormWidth = 4096;
// Blocks of the backward on CUDA, a part each: four on each of the 132 multiprocessors of an H100 or H200.
constexpr int64_t kNormParts = 4 * 132;

HOST_DEVICE float normalized(float hidden, float mean, float rstd) { return (hidden - mean) * rstd; }

// Gradient of what was normalised, from that of a row's result times the weight and two means over the row:
// of that gradient, and of its product with the normalised row.
HOST_DEVICE float hidden_gradient(
    float weighted, float mean_weighted, float normal, float mean_product, float rstd) {
  return rstd * (weighted - mean_weighted - normal * mean_product);
}

}  // namespace blip2_kernels
