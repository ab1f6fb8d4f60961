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
#include "embed_tokens.h"

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
  return std::is_same_v<T, float>  ? Format::FLOAT32
         : std::is_same_v<T, Half> ? Format::FLOAT16
                                   : Format::BFLOAT16;
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
  AddLayerNorm common{
      format_of<X>(),
      format_of<T>(),
      rows,
      width,
      x.get(),
      stride,
      residual.get(),
      stride,
      weight.get(),
      biased ? input_bias.get() : nullptr,
      {}};
  if (drops) common.dropout = {6554, 1.111f, 13, key.get(), row_keys.get()};
  check(add_layer_norm_cuda({common, bias.get(), 1e-5f, out.get(), mean.get(), rstd.get()}, nullptr));
  const int64_t parts = rows;
  Buffer<float> partials(parts * kNormSums * width);
  const bool one = !drops && std::is_same_v<X, T>;
  check(add_layer_norm_backward_cuda(
      {common,
       grad.get(),
       stride,
       mean.get(),
       rstd.get(),
       dx.get(),
       one ? nullptr : dresidual.get(),
       partials.get(),
       parts,
       {dweight.get(), dbias.get(), biased ? dinput_bias.get() : nullptr}},
      nullptr));
}

template <class T, class B>
void bias_gelu_case(int64_t rows, int64_t width, int64_t gap, bool biased) {
  const int64_t stride = width + gap, size = (rows - 1) * stride + width;
  Buffer<T> x(size), grad(size), out(rows * width), dx(rows * width);
  Buffer<B> bias(width), dbias(width);
  BiasGelu common{
      format_of<T>(), format_of<B>(), rows, width, x.get(), stride, biased ? bias.get() : nullptr};
  check(bias_gelu_cuda({common, out.get()}, nullptr));
  const int64_t parts = rows;
  Buffer<float> partials(parts * width);
  check(bias_gelu_backward_cuda(
      {common, grad.get(), stride, dx.get(), biased ? dbias.get() : nullptr, partials.get(), parts},
      nullptr));
}

template <class T>
void embed_tokens_case(
    int64_t query_rows, int64_t text_rows, int64_t width, int64_t gap, bool drops, bool embedded) {
  const int64_t rows = query_rows + text_rows, stride = width + gap, table = text_rows + 1;
  Buffer<T> queries(query_rows * width), words(text_rows * stride + width), positions(table * width);
  Buffer<T> weight(width), bias(width), out(rows * width), grad(rows * width);
  Buffer<T> dqueries(query_rows * width), dwords(table * width), dpositions(table * width);
  Buffer<T> dweight(width), dbias(width);
  Buffer<float> mean(rows), rstd(rows), dhidden(rows * width), partials(rows * kEmbedSums * width);
  Buffer<int64_t> key(1), ids(text_rows), places(text_rows), order(text_rows);
  Buffer<int32_t> row_keys(rows), errors(1);
  for (int64_t i = 0; i < text_rows; ++i) {
    ids.get()[i] = text_rows - draw(0, 1) * i;  // sorted from behind
    places.get()[i] = i;
  }
  std::sort(ids.get(), ids.get() + text_rows);
  for (int64_t i = 0; i < text_rows; ++i) order.get()[i] = i;
  EmbedTokens common{
      format_of<T>(),
      rows,
      width,
      query_rows,
      {queries.get(), width, query_rows},
      {words.get(), stride, table},
      {positions.get(), width, table},
      ids.get(),
      places.get(),
      weight.get(),
      {}};
  if (embedded) common.positions = {nullptr, 0, 0}, common.token_ids = common.position_ids = nullptr;
  if (drops) common.dropout = {6554, 1.111f, 13, key.get(), row_keys.get()};
  check(embed_tokens_forward_cuda(
      {common, bias.get(), 1e-5f, out.get(), mean.get(), rstd.get(), errors.get()}, nullptr));
  const float* text = dhidden.get() + query_rows * width;
  RowLists for_queries{dhidden.get(), query_rows, width, nullptr, nullptr, -1, query_rows, dqueries.get()};
  RowLists for_words{text, text_rows, width, ids.get(), order.get(), 0, table, dwords.get()};
  RowLists for_positions{text, text_rows, width, places.get(), order.get(), -1, table, dpositions.get()};
  if (embedded) {
    for_words = {text, text_rows, width, nullptr, nullptr, -1, text_rows, dwords.get()};
    for_positions.out = nullptr;
  }
  check(embed_tokens_backward_cuda(
      {common,
       grad.get(),
       width,
       mean.get(),
       rstd.get(),
       dhidden.get(),
       partials.get(),
       rows,
       {dweight.get(), dbias.get()},
       for_queries,
       for_words,
       for_positions},
      nullptr));
}

template <class X, class T>
void one_case(int64_t rows, int64_t width) {
  const int64_t gap = draw(0, 2) * 4;
  const bool drops = draw(0, 1), biased = draw(0, 1);
  printf("rows %d, width %d, gap %d, dropout %d, bias %d\n", int(rows), int(width), int(gap), drops, biased);
  fflush(stdout);
  add_layer_norm_case<X, T>(rows, width, gap, drops, biased);
  bias_gelu_case<X, T>(rows, width, gap, biased);
  embed_tokens_case<T>(1, rows, width, gap, drops, !biased);
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
