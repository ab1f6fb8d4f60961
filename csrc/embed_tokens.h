// out = dropout(LayerNorm(rows)), forward and backward, where the rows are the query tokens of every sample
// and behind them the text: a word and a position embedding each. Arguments, arithmetic, launchers.
#pragma once

#include "layer_norm.h"
#include "philox.h"
#include "row_sums.h"

namespace blip2_kernels {

constexpr int kEmbedSums = 2;  // gradients that are sums over all rows: weight, bias

// [rows, width]: rows lie apart, channels are adjacent.
struct Table {
  const void* data;  // null for none
  int64_t stride;
  int64_t rows;
};

// Row r < query_rows is query r % queries.rows; row query_rows + i is word token_ids[i] plus position
// position_ids[i].
struct EmbedTokens {
  Format format;  // of everything that is not float
  int64_t rows;
  int64_t width;
  int64_t query_rows;
  Table queries, words, positions;
  const int64_t* token_ids;     // null: text row i is row i of words
  const int64_t* position_ids;  // null without positions
  const void* weight;
  DropoutArguments dropout;
};

struct EmbedTokensForward : EmbedTokens {
  const void* bias;
  float eps;
  void* out;    // adjacent rows
  float* mean;  // [rows]
  float* rstd;
  int32_t* errors;  // [1], set where an id is out of range; null where that was asked before
};

struct EmbedTokensBackward : EmbedTokens {
  const void* grad;
  int64_t grad_stride;
  const float* mean;
  const float* rstd;
  float* dhidden;   // [rows, width]: gradient of what was normalised
  float* partials;  // [parts, kEmbedSums, width]: the sums of consecutive rows
  int64_t parts;
  void* sums[kEmbedSums];                 // dweight, dbias
  RowLists dqueries, dwords, dpositions;  // without a destination where nobody asks
};

// What a row is the sum of.
template <class T>
struct Summands {
  const T* first;
  const T* second;   // null for none
  bool is_in_range;  // ids that are not stand for the nearest that are
};

HOST_DEVICE int64_t nearest(int64_t id, int64_t rows) { return id < 0 ? 0 : id < rows ? id : rows - 1; }

template <class T>
HOST_DEVICE Summands<T> summands_of(const EmbedTokens& a, int64_t row) {
  if (row < a.query_rows)
    return {static_cast<const T*>(a.queries.data) + row % a.queries.rows * a.queries.stride, nullptr, true};
  const int64_t text_row = row - a.query_rows;
  const int64_t id = a.token_ids ? a.token_ids[text_row] : text_row, word = nearest(id, a.words.rows);
  Summands<T> out = {static_cast<const T*>(a.words.data) + word * a.words.stride, nullptr, word == id};
  if (a.position_ids) {
    const int64_t place = a.position_ids[text_row], position = nearest(place, a.positions.rows);
    out.second = static_cast<const T*>(a.positions.data) + position * a.positions.stride;
    out.is_in_range = out.is_in_range && position == place;
  }
  return out;
}

void embed_tokens_forward_cpu(const EmbedTokensForward& arguments);
void embed_tokens_backward_cpu(const EmbedTokensBackward& arguments);

// On a stream; null, or why a kernel was not launched.
const char* embed_tokens_forward_cuda(const EmbedTokensForward& arguments, void* stream);
const char* embed_tokens_backward_cuda(const EmbedTokensBackward& arguments, void* stream);

}  // namespace blip2_kernels
