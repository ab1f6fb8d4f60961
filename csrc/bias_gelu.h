// out = GELU(x + bias), forward and backward: arguments and launchers; the arithmetic is gelu.h.
#pragma once

#include "gelu.h"
#include "number.h"

namespace blip2_kernels {

// Tensors are [rows, width]; strides count elements; channels are adjacent everywhere.
struct BiasGelu {
  Format format;       // of x, out, grad and dx
  Format bias_format;  // the same, or float
  int64_t rows;
  int64_t width;
  const void* x;
  int64_t x_stride;
  const void* bias;  // [width], null for none
};

struct BiasGeluForward : BiasGelu {
  void* out;  // adjacent rows
};

struct BiasGeluBackward : BiasGelu {
  const void* grad;
  int64_t grad_stride;
  void* dx;         // adjacent rows
  void* dbias;      // null where bias is
  float* partials;  // [parts, width]: the sums of consecutive rows
  int64_t parts;
};

// Parts that keep a GPU busy in the backward, where each takes a warp for every 256 channels: 32 warps on
// each of the 132 multiprocessors of an H100 or H200.
inline int64_t gelu_parts(int64_t width) {
  const int64_t parts = 32 * 132 / ((width + 255) / 256);
  return parts < 1 ? 1 : parts < 1024 ? parts : 1024;
}

// Calls run.operator()<T, B>() with the types of x and of the bias.
template <class Run>
void with_gelu_formats(const BiasGelu& a, const Run& run) {
  with_format(a.format, [&]<class T>() {
    a.bias_format == a.format ? run.template operator()<T, T>() : run.template operator()<T, float>();
  });
}

void bias_gelu_cpu(const BiasGeluForward& arguments);
void bias_gelu_backward_cpu(const BiasGeluBackward& arguments);

// On a stream; null, or why a kernel was not launched.
const char* bias_gelu_cuda(const BiasGeluForward& arguments, void* stream);
const char* bias_gelu_backward_cuda(const BiasGeluBackward& arguments, void* stream);

}  // namespace blip2_kernels
