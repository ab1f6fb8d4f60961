// add_layer_norm on the CPU: a row at a time, in buffers that stay in the first-level cache.
#include "add_layer_norm.h"

#include "cpu_norm.h"

namespace blip2_kernels {
namespace {

// What is normalised of a row, channel by channel.
template <bool kDrops, class X, class T>
struct Row {
  const X* __restrict x;
  const T* __restrict residual;
  const T* __restrict input_bias;
  const Dropout& dropout;
  const uint16_t* lanes;

  HOST_DEVICE Row(const AddLayerNorm& a, const Dropout& dropout, RowBuffers& buffers, int64_t row)
      : x(static_cast<const X*>(a.x) + row * a.x_stride),
        residual(static_cast<const T*>(a.residual) + row * a.residual_stride),
        input_bias(a.input_bias ? static_cast<const T*>(a.input_bias) : kZeros<T>),
        dropout(dropout),
        lanes(buffers.lanes()) {
    if constexpr (kDrops) buffers.draw(dropout, a.dropout.row_keys[row], int(a.width));
  }

  HOST_DEVICE float hidden(int c) const {
    const float value = to_float(x[c]) + to_float(input_bias[c]);
    return to_float(residual[c]) + dropped<kDrops>(dropout, lanes, c, value);
  }
};

template <bool kDrops, class X, class T>
HOST_DEVICE void forward_rows(
    const AddLayerNormForward& a, RowBuffers& buffers, int64_t first, int64_t last) {
  const Dropout dropout = Dropout::of(a.dropout);
  const int width = int(a.width);
  const T* __restrict weight = static_cast<const T*>(a.weight);
  const T* __restrict bias = static_cast<const T*>(a.bias);
  float* __restrict hidden = buffers.hidden;
  for (int64_t row = first; row < last; ++row) {
    const Row<kDrops, X, T> given(a, dropout, buffers, row);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < width; ++c) {
      hidden[c] = given.hidden(c);
      sum += hidden[c];
    }
    const float mean = sum / width;
    const float rstd = reciprocal_deviation(hidden, width, mean, a.eps);
    T* __restrict out = static_cast<T*>(a.out) + row * a.width;
#pragma omp simd
    for (int c = 0; c < width; ++c) {
      const float normal = normalized(hidden[c], mean, rstd);
      out[c] = from_float<T>(normal * to_float(weight[c]) + to_float(bias[c]));
    }
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

template <bool kDrops, class X, class T>
HOST_DEVICE void backward_row(
    const AddLayerNormBackward& a, const Dropout& dropout, RowBuffers& buffers, int64_t row, float* sums) {
  const Row<kDrops, X, T> given(a, dropout, buffers, row);
  const int width = int(a.width);
  const T* __restrict grad = static_cast<const T*>(a.grad) + row * a.grad_stride;
  const T* __restrict weight = static_cast<const T*>(a.weight);
  float* __restrict normal = buffers.hidden;
  float* __restrict weighted = buffers.weighted;
  float* __restrict dweight = sums;
  float* __restrict dbias = sums + width;
  float* __restrict dinput_bias = sums + 2 * width;
  const float mean = a.mean[row], rstd = a.rstd[row];
  float sum_weighted = 0, sum_product = 0;
#pragma omp simd reduction(+ : sum_weighted, sum_product)
  for (int c = 0; c < width; ++c) {
    const float g = to_float(grad[c]);
    normal[c] = normalized(given.hidden(c), mean, rstd);
    weighted[c] = g * to_float(weight[c]);
    sum_weighted += weighted[c];
    sum_product += weighted[c] * normal[c];
    dweight[c] += g * normal[c];
    dbias[c] += g;
  }
  const float mean_weighted = sum_weighted / width, mean_product = sum_product / width;
  X* __restrict dx = static_cast<X*>(a.dx) + row * a.width;
#pragma omp simd
  for (int c = 0; c < width; ++c) {
    const float dhidden = hidden_gradient(weighted[c], mean_weighted, normal[c], mean_product, rstd);
    const float d = dropped<kDrops>(dropout, given.lanes, c, dhidden);
    dx[c] = from_float<X>(d);
    dinput_bias[c] += d;
  }
  if (a.dresidual) {
    T* __restrict dresidual = static_cast<T*>(a.dresidual) + row * a.width;
#pragma omp simd
    for (int c = 0; c < width; ++c)
      dresidual[c] =
          from_float<T>(hidden_gradient(weighted[c], mean_weighted, normal[c], mean_product, rstd));
  }
}

template <bool kDrops, class X, class T>
HOST_DEVICE void backward_part(const AddLayerNormBackward& a, RowBuffers& buffers, int64_t part) {
  const Dropout dropout = Dropout::of(a.dropout);
  float* sums = a.partials + part * kNormSums * a.width;
  for (int64_t i = 0; i < kNormSums * a.width; ++i) sums[i] = 0;
  const int64_t last = first_row_of_part(part + 1, a.parts, a.rows);
  for (int64_t row = first_row_of_part(part, a.parts, a.rows); row < last; ++row)
    backward_row<kDrops, X, T>(a, dropout, buffers, row, sums);
}

template <bool kDrops, class X, class T>
void forward(const AddLayerNormForward& a) {
  in_parallel(a.rows, a.width, [&](int64_t first, int64_t last) {
    RowBuffers buffers;
    run_for_this_processor([&]() ALWAYS_INLINE { forward_rows<kDrops, X, T>(a, buffers, first, last); });
  });
}

template <bool kDrops, class X, class T>
void backward(const AddLayerNormBackward& a) {
  in_parallel_parts(a.parts, a.rows, a.width, [&](int64_t first, int64_t last) {
    RowBuffers buffers;
    run_for_this_processor([&]() ALWAYS_INLINE {
      for (int64_t part = first; part < last; ++part) backward_part<kDrops, X, T>(a, buffers, part);
    });
  });
  for (int i = 0; i < kNormSums; ++i)
    if (a.sums[i]) store_sum<T>(a.partials + i * a.width, a.parts, kNormSums * a.width, a.width, a.sums[i]);
}

// Calls run.operator()<kDrops, X, T>() for the formats of the arguments.
template <class Run>
void with_formats(const AddLayerNorm& a, const Run& run) {
  const auto with_dropout = [&]<class X, class T>() {
    a.dropout.level ? run.template operator()<true, X, T>() : run.template operator()<false, X, T>();
  };
  with_norm_formats(a, with_dropout);
}

}  // namespace

void add_layer_norm_cpu(const AddLayerNormForward& arguments) {
  with_formats(arguments, [&]<bool kDrops, class X, class T>() { forward<kDrops, X, T>(arguments); });
}

void add_layer_norm_backward_cpu(const AddLayerNormBackward& arguments) {
  with_formats(arguments, [&]<bool kDrops, class X, class T>() { backward<kDrops, X, T>(arguments); });
}

}  // namespace blip2_kernels
