// embed_tokens on the CPU: a row at a time, in buffers that stay in the first-level cache.
#include "embed_tokens.h"

#include "cpu_norm.h"

namespace blip2_kernels {
namespace {

constexpr int kRowsAhead = 16;

// Calls body(row, summands) for rows first … last - 1. Where they lie is asked for some rows ahead: beside
// the question whether a row is text, the compiler splits the loop in two, and vectorises only one of both
// copies of its body.
template <class T, class Body>
HOST_DEVICE void for_rows(const EmbedTokens& a, int64_t first, int64_t last, const Body& body) {
  Summands<T> ahead[kRowsAhead];
  for (; first < last; first += kRowsAhead) {
    const int count = int(std::min<int64_t>(kRowsAhead, last - first));
    for (int i = 0; i < count; ++i) {
      ahead[i] = summands_of<T>(a, first + i);
      if (!ahead[i].second) ahead[i].second = kZeros<T>;
    }
    for (int i = 0; i < count; ++i) body(first + i, ahead[i]);
  }
}

// Fills `hidden` with a row before its LayerNorm, and returns its sum.
template <class T>
HOST_DEVICE float gather(const Summands<T>& summands, int width, float* __restrict hidden) {
  const T* __restrict first = summands.first;
  const T* __restrict second = summands.second;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int c = 0; c < width; ++c) {
    hidden[c] = to_float(first[c]) + to_float(second[c]);
    sum += hidden[c];
  }
  return sum;
}

template <bool kDrops, class T>
HOST_DEVICE void forward_rows(const EmbedTokensForward& a, RowBuffers& buffers, int64_t first, int64_t last) {
  const Dropout dropout = Dropout::of(a.dropout);
  const int width = int(a.width);
  const T* __restrict weight = static_cast<const T*>(a.weight);
  const T* __restrict bias = static_cast<const T*>(a.bias);
  const float* __restrict hidden = buffers.hidden;
  const uint16_t* lanes = buffers.lanes();
  for_rows<T>(a, first, last, [&](int64_t row, const Summands<T>& summands) ALWAYS_INLINE {
    if constexpr (kDrops) buffers.draw(dropout, a.dropout.row_keys[row], width);
    const float mean = gather(summands, width, buffers.hidden) / width;
    const float rstd = reciprocal_deviation(hidden, width, mean, a.eps);
    T* __restrict out = static_cast<T*>(a.out) + row * a.width;
#pragma omp simd
    for (int c = 0; c < width; ++c) {
      const float value = normalized(hidden[c], mean, rstd) * to_float(weight[c]) + to_float(bias[c]);
      out[c] = from_float<T>(dropped<kDrops>(dropout, lanes, c, value));
    }
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  });
}

template <bool kDrops, class T>
HOST_DEVICE void backward_row(
    const EmbedTokensBackward& a, const Dropout& dropout, RowBuffers& buffers, int64_t row,
    const Summands<T>& summands, float* sums) {
  const int width = int(a.width);
  const T* __restrict grad = static_cast<const T*>(a.grad) + row * a.grad_stride;
  const T* __restrict weight = static_cast<const T*>(a.weight);
  float* __restrict normal = buffers.hidden;
  float* __restrict weighted = buffers.weighted;
  float* __restrict dweight = sums;
  float* __restrict dbias = sums + width;
  const uint16_t* lanes = buffers.lanes();
  const float mean = a.mean[row], rstd = a.rstd[row];
  if constexpr (kDrops) buffers.draw(dropout, a.dropout.row_keys[row], width);
  gather(summands, width, normal);
  float sum_weighted = 0, sum_product = 0;
  for (int first = 0; first < width; first += kPiece) {
    const int last = std::min(first + kPiece, width);
    float piece_weighted = 0, piece_product = 0;
#pragma omp simd reduction(+ : piece_weighted, piece_product)
    for (int c = first; c < last; ++c) {
      const float g = dropped<kDrops>(dropout, lanes, c, to_float(grad[c]));
      normal[c] = normalized(normal[c], mean, rstd);
      weighted[c] = g * to_float(weight[c]);
      piece_weighted += weighted[c];
      piece_product += weighted[c] * normal[c];
      dweight[c] += g * normal[c];
      dbias[c] += g;
    }
    sum_weighted += piece_weighted;
    sum_product += piece_product;
  }
  const float mean_weighted = sum_weighted / width, mean_product = sum_product / width;
  float* __restrict dhidden = a.dhidden + row * a.width;
#pragma omp simd
  for (int c = 0; c < width; ++c)
    dhidden[c] = hidden_gradient(weighted[c], mean_weighted, normal[c], mean_product, rstd);
}

template <bool kDrops, class T>
HOST_DEVICE void backward_part(const EmbedTokensBackward& a, RowBuffers& buffers, int64_t part) {
  const Dropout dropout = Dropout::of(a.dropout);
  float* sums = a.partials + part * kEmbedSums * a.width;
  for (int64_t i = 0; i < kEmbedSums * a.width; ++i) sums[i] = 0;
  const int64_t last = first_row_of_part(part + 1, a.parts, a.rows);
  const int64_t first = first_row_of_part(part, a.parts, a.rows);
  for_rows<T>(a, first, last, [&](int64_t row, const Summands<T>& summands) ALWAYS_INLINE {
    backward_row<kDrops, T>(a, dropout, buffers, row, summands, sums);
  });
}

template <bool kDrops, class T>
void forward(const EmbedTokensForward& a) {
  in_parallel(a.rows, a.width, [&](int64_t first, int64_t last) {
    RowBuffers buffers;
    run_for_this_processor([&]() ALWAYS_INLINE { forward_rows<kDrops, T>(a, buffers, first, last); });
  });
}

template <bool kDrops, class T>
void backward(const EmbedTokensBackward& a) {
  in_parallel_parts(a.parts, a.rows, a.width, [&](int64_t first, int64_t last) {
    RowBuffers buffers;
    run_for_this_processor([&]() ALWAYS_INLINE {
      for (int64_t part = first; part < last; ++part) backward_part<kDrops, T>(a, buffers, part);
    });
  });
  for (int i = 0; i < kEmbedSums; ++i)
    store_sum<T>(a.partials + i * a.width, a.parts, kEmbedSums * a.width, a.width, a.sums[i]);
  for (const RowLists* lists : {&a.dqueries, &a.dwords, &a.dpositions})
    if (lists->out) store_lists<T, kMaxNormWidth>(*lists);
}

// Calls run.operator()<kDrops, T>() for the format of the arguments.
template <class Run>
void with_formats(const EmbedTokens& a, const Run& run) {
  with_format(a.format, [&]<class T>() {
    a.dropout.level ? run.template operator()<true, T>() : run.template operator()<false, T>();
  });
}

}  // namespace

void embed_tokens_forward_cpu(const EmbedTokensForward& arguments) {
  with_formats(arguments, [&]<bool kDrops, class T>() { forward<kDrops, T>(arguments); });
}

void embed_tokens_backward_cpu(const EmbedTokensBackward& arguments) {
  with_formats(arguments, [&]<bool kDrops, class T>() { backward<kDrops, T>(arguments); });
}

}  // namespace blip2_kernels
