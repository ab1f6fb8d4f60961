// The operator bias_gelu: what it refuses, what it returns, and which launcher runs it.
#include "bias_gelu.h"

#include <tuple>

#include "launch.h"
#include "library.h"

namespace blip2_kernels {
namespace {

// The inputs with adjacent channels, kept until the operator returns.
struct Inputs {
  Tensor x;
  Optional bias;

  Inputs(const Tensor& given_x, const Optional& given_bias) {
    check_rows("x", given_x, INT32_MAX);
    if (given_bias) {
      const bool floats = given_bias->scalar_type() == ScalarType::Float;
      const ScalarType dtype = floats ? ScalarType::Float : given_x.scalar_type();
      check_tensor("bias", *given_bias, dtype, {given_x.size(1)}, given_x);
    }
    x = with_adjacent_channels(given_x);
    bias = with_adjacent_channels(given_bias);
  }

  void fill(BiasGelu& arguments) const {
    arguments.format = format_of(x);
    arguments.bias_format = bias ? format_of(*bias) : arguments.format;
    arguments.rows = x.size(0);
    arguments.width = x.size(1);
    arguments.x = x.const_data_ptr();
    arguments.x_stride = x.stride(0);
    arguments.bias = bias ? bias->const_data_ptr() : nullptr;
  }
};

Tensor forward(const Tensor& x, const Optional& bias) {
  const Inputs inputs(x, bias);
  BiasGeluForward arguments;
  inputs.fill(arguments);
  Tensor out = new_rows(x, arguments.rows, arguments.width);
  arguments.out = out.mutable_data_ptr();
  if (arguments.rows) BLIP2_KERNELS_LAUNCH(x, bias_gelu, arguments);
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Optional& bias) {
  const Inputs inputs(x, bias);
  BiasGeluBackward arguments;
  inputs.fill(arguments);
  check_tensor("grad", grad, x.scalar_type(), {arguments.rows, arguments.width}, x);
  const Tensor adjacent_grad = with_adjacent_channels(grad);
  Tensor dx = new_rows(x, arguments.rows, arguments.width);
  Tensor dbias = new_vector(bias ? *bias : x, bias ? arguments.width : 0);
  arguments.parts = parts_of(arguments.rows, gelu_parts(arguments.width), x);
  Tensor partials = new_floats(x, bias ? arguments.parts * arguments.width : 0);
  arguments.grad = adjacent_grad.const_data_ptr();
  arguments.grad_stride = adjacent_grad.stride(0);
  arguments.dx = dx.mutable_data_ptr();
  arguments.dbias = bias ? dbias.mutable_data_ptr() : nullptr;
  arguments.partials = static_cast<float*>(partials.mutable_data_ptr());
  BLIP2_KERNELS_LAUNCH(x, bias_gelu_backward, arguments);
  return {dx, dbias};
}

}  // namespace
}  // namespace blip2_kernels

BLIP2_KERNELS_IMPLEMENT("bias_gelu", blip2_kernels::forward)
BLIP2_KERNELS_IMPLEMENT("bias_gelu_backward", blip2_kernels::backward)
