// out = LayerNorm(residual + dropout(x + input_bias)), forward and backward: arguments, arithmetic, launchers.
#pragma once

#include "number.h"
#include "philox.h"

namespace blip2_kernels {

constexpr int64_t kMaxNormWidth = 4096;
constexpr int kNormSums = 3;  // gradients that are sums over rows: weight, bias, input_bias
// Blocks of the backward on CUDA, a part each: four on each of the 132 multiprocessors of an H100 or H200.
constexpr int64_t kNormParts = 4 * 132;

// Tensors are [rows, width]; vectors [width]; strides count elements; channels are adjacent everywhere.
struct AddLayerNorm {
  Format x_format;  // of x and dx
  Format format;    // of everything else that is not float
  int64_t rows;
  int64_t width;
  const void* x;
  int64_t x_stride;
  const void* residual;
  int64_t residual_stride;
  const void* weight;
  const void* input_bias;  // null for none
  DropoutArguments dropout;
};

struct AddLayerNormForward : AddLayerNorm {
  const void* bias;
  float eps;
  void* out;    // adjacent rows
  float* mean;  // [rows]
  float* rstd;
};

struct AddLayerNormBackward : AddLayerNorm {
  const void* grad;
  int64_t grad_stride;
  const float* mean;
  const float* rstd;
  void* dx;         // adjacent rows
  void* dresidual;  // null where dx is the same
  float* partials;  // [parts, kNormSums, width]: the sums of consecutive rows
  int64_t parts;
  void* sums[kNormSums];  // dweight, dbias, dinput_bias; the last may be null
};

HOST_DEVICE float normalized(float hidden, float mean, float rstd) { return (hidden - mean) * rstd; }

// Gradient of what was normalised, from that of a row's result times the weight and two means over the row:
// of that gradient, and of its product with the normalised row.
HOST_DEVICE float hidden_gradient(float weighted, float mean_weighted, float normal, float mean_product, float rstd) {
  return rstd * (weighted - mean_weighted - normal * mean_product);
}

// Calls run.operator()<X, T>(): x has the format of everything else, or is in half precision beside floats.
template <class Run>
void with_norm_formats(const AddLayerNorm& a, const Run& run) {
  with_format(a.x_format, [&]<class X>() {
    a.x_format == a.format ? run.template operator()<X, X>() : run.template operator()<X, float>();
  });
}

void add_layer_norm_cpu(const AddLayerNormForward& arguments);
void add_layer_norm_backward_cpu(const AddLayerNormBackward& arguments);

// On a stream; null, or why a kernel was not launched.
const char* add_layer_norm_cuda(const AddLayerNormForward& arguments, void* stream);
const char* add_layer_norm_backward_cuda(const AddLayerNormBackward& arguments, void* stream);

}  // namespace blip2_kernels
