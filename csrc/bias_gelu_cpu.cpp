// bias_gelu on the CPU: one pass over the rows.
#include "bias_gelu.h"

#include "cpu_rows.h"

namespace blip2_kernels {
namespace {

template <bool kBias, class T, class B>
HOST_DEVICE void forward_rows(const BiasGeluForward& a, int64_t first, int64_t last) {
  const B* __restrict bias = static_cast<const B*>(a.bias);
  for (int64_t row = first; row < last; ++row) {
    const T* __restrict x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* __restrict out = static_cast<T*>(a.out) + row * a.width;
#pragma omp simd
    for (int64_t c = 0; c < a.width; ++c)
      out[c] = from_float<T>(gelu(to_float(x[c]) + (kBias ? to_float(bias[c]) : 0.0f)));
  }
}

template <bool kBias, class T, class B>
HOST_DEVICE void backward_part(const BiasGeluBackward& a, int64_t part) {
  const B* __restrict bias = static_cast<const B*>(a.bias);
  float* __restrict sums = a.partials + part * a.width;
  if (kBias)
    for (int64_t c = 0; c < a.width; ++c) sums[c] = 0;
  const int64_t last = first_row_of_part(part + 1, a.parts, a.rows);
  for (int64_t row = first_row_of_part(part, a.parts, a.rows); row < last; ++row) {
    const T* __restrict x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* __restrict grad = static_cast<const T*>(a.grad) + row * a.grad_stride;
    T* __restrict dx = static_cast<T*>(a.dx) + row * a.width;
#pragma omp simd
    for (int64_t c = 0; c < a.width; ++c) {
      const float d = to_float(grad[c]) * gelu_gradient(to_float(x[c]) + (kBias ? to_float(bias[c]) : 0.0f));
      dx[c] = from_float<T>(d);
      if (kBias) sums[c] += d;
    }
  }
}

template <bool kBias, class T, class B>
void forward(const BiasGeluForward& a) {
  in_parallel(a.rows, a.width, [&](int64_t first, int64_t last) {
    run_for_this_processor([&]() ALWAYS_INLINE { forward_rows<kBias, T, B>(a, first, last); });
  });
}

template <bool kBias, class T, class B>
void backward(const BiasGeluBackward& a) {
  in_parallel_parts(a.parts, a.rows, a.width, [&](int64_t first, int64_t last) {
    run_for_this_processor([&]() ALWAYS_INLINE {
      for (int64_t part = first; part < last; ++part) backward_part<kBias, T, B>(a, part);
    });
  });
  if (kBias) store_sum<B>(a.partials, a.parts, a.width, a.width, a.dbias);
}

}  // namespace

void bias_gelu_cpu(const BiasGeluForward& a) {
  with_gelu_formats(
      a, [&]<class T, class B>() { a.bias ? forward<true, T, B>(a) : forward<false, T, B>(a); });
}

void bias_gelu_backward_cpu(const BiasGeluBackward& a) {
  with_gelu_formats(
      a, [&]<class T, class B>() { a.bias ? backward<true, T, B>(a) : backward<false, T, B>(a); });
}

}  // namespace blip2_kernels
