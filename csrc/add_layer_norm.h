// out = LayerNorm(residual + dropout(x + input_bias)), forward and backward: arguments, arithmetic,
// launchers.
#pragma once

#include "layer_norm.h"
#include "philox.h"

namespace blip2_kernels {

constexpr int kNormSums = 3;  // gradients that are sums over rows: weight, bias, input_bias

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
