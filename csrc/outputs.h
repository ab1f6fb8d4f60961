// New tensors for results, and inputs in the form that kernels read.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace blip2_kernels {

inline Tensor new_rows(const Tensor& like, int64_t rows, int64_t width) {
  return torch::stable::new_empty(like, {rows, width});
}

// Rows of zeros, for an operator that writes some of them.
inline Tensor new_zero_rows(const Tensor& like, int64_t rows, int64_t width) {
  return torch::stable::new_zeros(like, {rows, width});
}

inline Tensor new_vector(const Tensor& like, int64_t size) { return torch::stable::new_empty(like, {size}); }

inline Tensor new_floats(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Float);
}

// Rows may lie apart; a row's channels, and a vector's, must be adjacent.
inline Tensor with_adjacent_channels(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool adjacent = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return adjacent ? tensor : torch::stable::contiguous(tensor);
}

inline Optional with_adjacent_channels(const Optional& tensor) {
  return tensor ? Optional(with_adjacent_channels(*tensor)) : Optional();
}

}  // namespace blip2_kernels
