// The operator add_layer_norm: what it refuses, what it returns, and which launcher runs it.
#include "add_layer_norm.h"

#include <tuple>

#include "launch.h"
#include "library.h"

namespace blip2_kernels {
namespace {

// An operator's inputs with adjacent channels, kept until it returns.
struct Inputs {
  Tensor x, residual, weight;
  Optional input_bias;
};

Inputs check(const Tensor& x, const Tensor& residual, const Tensor& weight, const Optional& input_bias) {
  check_rows("residual", residual, kMaxNormWidth);
  const ScalarType dtype = residual.scalar_type();
  const int64_t rows = residual.size(0), width = residual.size(1);
  const bool half_beside_float = dtype == ScalarType::Float && x.scalar_type() != ScalarType::Double;
  check_tensor("x", x, half_beside_float ? x.scalar_type() : dtype, {rows, width}, residual);
  check_rows("x", x, kMaxNormWidth);
  check_tensor("weight", weight, dtype, {width}, residual);
  if (input_bias) check_tensor("input_bias", *input_bias, dtype, {width}, residual);
  return {
      with_adjacent_channels(x), with_adjacent_channels(residual), with_adjacent_channels(weight),
      with_adjacent_channels(input_bias)};
}

void fill(AddLayerNorm& arguments, const Inputs& inputs, const DropoutArguments& dropout) {
  arguments.x_format = format_of(inputs.x);
  arguments.format = format_of(inputs.residual);
  arguments.rows = inputs.x.size(0);
  arguments.width = inputs.x.size(1);
  arguments.x = inputs.x.const_data_ptr();
  arguments.x_stride = inputs.x.stride(0);
  arguments.residual = inputs.residual.const_data_ptr();
  arguments.residual_stride = inputs.residual.stride(0);
  arguments.weight = inputs.weight.const_data_ptr();
  arguments.input_bias = inputs.input_bias ? inputs.input_bias->const_data_ptr() : nullptr;
  arguments.dropout = dropout;
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias,
    const Optional& input_bias, double eps, double dropout, const Optional& dropout_key,
    const Optional& row_keys, int64_t place) {
  const Inputs inputs = check(x, residual, weight, input_bias);
  check_tensor("bias", bias, residual.scalar_type(), {residual.size(1)}, residual);
  check_eps(eps);
  AddLayerNormForward arguments;
  fill(arguments, inputs, check_dropout(dropout, dropout_key, row_keys, place, residual.size(0), residual));

  const Tensor adjacent_bias = with_adjacent_channels(bias);
  Tensor out = new_rows(residual, arguments.rows, arguments.width);
  Tensor mean = new_floats(residual, arguments.rows), rstd = new_floats(residual, arguments.rows);
  arguments.bias = adjacent_bias.const_data_ptr();
  arguments.eps = float(eps);
  arguments.out = out.mutable_data_ptr();
  arguments.mean = static_cast<float*>(mean.mutable_data_ptr());
  arguments.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  if (arguments.rows) BLIP2_KERNELS_LAUNCH(x, add_layer_norm, arguments);
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& x, const Tensor& residual, const Tensor& weight,
    const Optional& input_bias, const Tensor& mean, const Tensor& rstd, double dropout,
    const Optional& dropout_key, const Optional& row_keys, int64_t place) {
  const Inputs inputs = check(x, residual, weight, input_bias);
  const int64_t rows = residual.size(0), width = residual.size(1);
  check_tensor("grad", grad, residual.scalar_type(), {rows, width}, residual);
  check_tensor("mean", mean, ScalarType::Float, {rows}, residual);
  check_tensor("rstd", rstd, ScalarType::Float, {rows}, residual);
  AddLayerNormBackward arguments;
  fill(arguments, inputs, check_dropout(dropout, dropout_key, row_keys, place, rows, residual));

  const Tensor adjacent_grad = with_adjacent_channels(grad);
  const Tensor adjacent_mean = with_adjacent_channels(mean), adjacent_rstd = with_adjacent_channels(rstd);
  const bool one_gradient = dropout == 0 && x.scalar_type() == residual.scalar_type();
  Tensor dx = new_rows(x, rows, width), dresidual = new_rows(residual, one_gradient ? 0 : rows, width);
  Tensor dweight = new_vector(residual, width), dbias = new_vector(residual, width);
  Tensor dinput_bias = new_vector(residual, input_bias ? width : 0);
  const int64_t parts = parts_of(rows, kNormParts, x);
  Tensor partials = new_floats(residual, parts * kNormSums * width);
  arguments.grad = adjacent_grad.const_data_ptr();
  arguments.grad_stride = adjacent_grad.stride(0);
  arguments.mean = static_cast<const float*>(adjacent_mean.const_data_ptr());
  arguments.rstd = static_cast<const float*>(adjacent_rstd.const_data_ptr());
  arguments.dx = dx.mutable_data_ptr();
  arguments.dresidual = one_gradient ? nullptr : dresidual.mutable_data_ptr();
  arguments.partials = static_cast<float*>(partials.mutable_data_ptr());
  arguments.parts = parts;
  arguments.sums[0] = dweight.mutable_data_ptr();
  arguments.sums[1] = dbias.mutable_data_ptr();
  arguments.sums[2] = input_bias ? dinput_bias.mutable_data_ptr() : nullptr;
  BLIP2_KERNELS_LAUNCH(x, add_layer_norm_backward, arguments);
  return {dx, dresidual, dweight, dbias, dinput_bias};
}

}  // namespace
}  // namespace blip2_kernels

BLIP2_KERNELS_IMPLEMENT("add_layer_norm", blip2_kernels::forward)
BLIP2_KERNELS_IMPLEMENT("add_layer_norm_backward", blip2_kernels::backward)
