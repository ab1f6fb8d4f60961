// Runs the kernels of csrc/ on random arguments, in memory of exactly their size, for a sanitizer to watch.
//
//   cases COUNT SEED [WIDTH]
//
// Values do not matter here beyond being finite: the tests of the operators compare them.
#include <stdio.h>
#include <stdlib.h>

#include <random>
#include <type_traits>

#include "add_layer_norm.h"
#include "bias_gelu.h"
#include "cuda_on_host.h"

using namespace blip2_kernels;

namespace {

std::mt19937 random_numbers;

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_numbers); }

// Memory that a sanitizer sees the ends of.
template <class T>
struct Buffer {
  std::unique_ptr<T[]> data;

  explicit Buffer(int64_t size) : data(new T[size_t(size)]) {
    for (int64_t i = 0; i < size; ++i) {
      if constexpr (std::is_integral_v<T>)
        data[i] = T(random_numbers());
      else
        data[i] = from_float<T>(float(draw(-1000, 1000)) / 500);
    }
  }
  T* get() const { return data.get(); }
};

template <class T>
constexpr Format format_of() {
  return std::is_same_v<T, float> ? Format::FLOAT32 : std::is_same_v<T, Half> ? Format::FLOAT16 : Format::BFLOAT16;
}

void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

template <class X, class T>
void add_layer_norm_case(int64_t rows, int64_t width, int64_t gap, bool drops, bool biased) {
  const int64_t stride = width + gap, size = (rows - 1) * stride + width;
  Buffer<X> x(size), dx(rows * width);
  Buffer<T> residual(size), grad(size), weight(width), bias(width), input_bias(width), out(rows * width);
  Buffer<T> dresidual(rows * width), dweight(width), dbias(width), dinput_bias(width);
  Buffer<float> mean(rows), rstd(rows);
  Buffer<int64_t> key(1);
  Buffer<int32_t> row_keys(rows);
  AddLayerNorm common{format_of<X>(), format_of<T>(), rows, width, x.get(), stride, residual.get(), stride,
                      weight.get(), biased ? input_bias.get() : nullptr, {}};
  if (drops) common.dropout = {6554, 1.111f, 13, key.get(), row_keys.get()};
  check(add_layer_norm_cuda({common, bias.get(), 1e-5f, out.get(), mean.get(), rstd.get()}, nullptr));
  const int64_t parts = rows;
  Buffer<float> partials(parts * kNormSums * width);
  const bool one = !drops && std::is_same_v<X, T>;
  check(add_layer_norm_backward_cuda(
      {common, grad.get(), stride, mean.get(), rstd.get(), dx.get(), one ? nullptr : dresidual.get(), partials.get(),
       parts, {dweight.get(), dbias.get(), biased ? dinput_bias.get() : nullptr}},
      nullptr));
}

template <class T, class B>
void bias_gelu_case(int64_t rows, int64_t width, int64_t gap, bool biased) {
  const int64_t stride = width + gap, size = (rows - 1) * stride + width;
  Buffer<T> x(size), grad(size), out(rows * width), dx(rows * width);
  Buffer<B> bias(width), dbias(width);
  BiasGelu common{format_of<T>(), format_of<B>(), rows, width, x.get(), stride, biased ? bias.get() : nullptr};
  check(bias_gelu_cuda({common, out.get()}, nullptr));
  const int64_t parts = rows;
  Buffer<float> partials(parts * width);
  check(bias_gelu_backward_cuda(
      {common, grad.get(), stride, dx.get(), biased ? dbias.get() : nullptr, partials.get(), parts}, nullptr));
}

template <class X, class T>
void one_case(int64_t rows, int64_t width) {
  const int64_t gap = draw(0, 2) * 4;
  const bool drops = draw(0, 1), biased = draw(0, 1);
  printf("rows %d, width %d, gap %d, dropout %d, bias %d\n", int(rows), int(width), int(gap), drops, biased);
  fflush(stdout);
  add_layer_norm_case<X, T>(rows, width, gap, drops, biased);
  bias_gelu_case<X, T>(rows, width, gap, biased);
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = atoi(arguments[1]);
  random_numbers.seed(unsigned(atoi(arguments[2])));
  const int widths[] = {1, 7, 8, 33, 256, 384, 768, 1000, 1024, 1408, 2056, 3072, 4095, 4096};
  for (int i = 0; i < cases; ++i) {
    const int rows = draw(1, 2);
    const int width = count > 3 ? atoi(arguments[3]) : widths[draw(0, 13)];
    switch (draw(0, 4)) {
      case 0: one_case<float, float>(rows, width); break;
      case 1: one_case<Half, Half>(rows, width); break;
      case 2: one_case<BFloat16, BFloat16>(rows, width); break;
      case 3: one_case<Half, float>(rows, width); break;
      default: one_case<BFloat16, float>(rows, width);
    }
  }
  printf("%d cases\n", cases);
}
