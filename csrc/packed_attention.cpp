// The operator packed_attention: what it refuses, what it returns, and which launcher runs it.
#include "packed_attention.h"

#include <algorithm>
#include <tuple>

#include "library.h"
#include "outputs.h"

namespace blip2_kernels {
namespace {

PackedRows rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// Rows [first, first + count) of so many.
void check_range(const char* name, int64_t first, int64_t count, int64_t rows) {
  if (first < 0 || count < 0 || first + count > rows)
    refuse(
        name, "rows from 0 to " + std::to_string(rows),
        std::to_string(count) + " from " + std::to_string(first) + " on");
}

void check_table(const char* name, const Tensor& table, int64_t samples, int64_t columns, const Tensor& q) {
  const bool is_table = table.dim() == 3 && table.is_contiguous();
  if (!is_table) refuse(name, "a contiguous int32 table of three dimensions", describe(table));
  check_tensor(name, table, ScalarType::Int, {samples, table.size(1), columns}, q);
}

// The inputs with adjacent channels, kept until the operator returns, and what was read of them.
struct Inputs {
  Tensor q, k, v;
  PackedAttention arguments;
  int64_t rows_of_parts = 0, rows_of_spans = 0;

  Inputs(
      const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, const Tensor& spans,
      const Tensor& parts, const Tensor& visible, int64_t pairs, double scale, double dropout,
      const Optional& dropout_key, const Optional& q_row_keys, const Optional& kv_row_keys, int64_t place) {
    check_leader("q", given_q, "[rows, heads, head_dim]", 3, kMaxHeadDim);
    const int64_t rows = given_q.size(0), heads = given_q.size(1), head_dim = given_q.size(2);
    if (rows > kMaxRows) refuse("q", "at most 2^31 - 8 rows", describe(given_q));
    check_tensor("k", given_k, given_q.scalar_type(), {given_k.size(0), heads, head_dim}, given_q);
    check_tensor("v", given_v, given_q.scalar_type(), {given_k.size(0), heads, head_dim}, given_q);
    check_table("spans", spans, spans.size(0), 2, given_q);
    check_table("parts", parts, spans.size(0), 3, given_q);
    check_tensor("visible", visible, ScalarType::Int, {rows}, given_q);
    if (!visible.is_contiguous()) refuse("visible", "adjacent values", describe(visible));
    q = with_adjacent_channels(given_q);
    k = with_adjacent_channels(given_k);
    v = with_adjacent_channels(given_v);

    PackedAttention& a = arguments;
    a.format = format_of(q);
    a.samples = spans.size(0);
    a.heads = heads;
    a.head_dim = head_dim;
    a.q_rows = rows;
    a.q = rows_of(q);
    a.k = rows_of(k);
    a.v = rows_of(v);
    a.spans = static_cast<const KeySpan*>(spans.const_data_ptr());
    a.spans_each = spans.size(1);
    a.parts = static_cast<const RowPart*>(parts.const_data_ptr());
    a.parts_each = parts.size(1);
    a.visible = static_cast<const int32_t*>(visible.const_data_ptr());
    if (pairs < 0) refuse("pairs", "a number of rows times keys", std::to_string(pairs));
    a.pairs = pairs;
    a.scale = float(scale);
    a.dropout = check_dropout(dropout, dropout_key, q_row_keys, place, rows, q);
    a.kv_row_keys = nullptr;
    if (a.dropout.level) {
      if (!kv_row_keys) refuse("kv_row_keys", "int32 [rows] where dropout > 0", "None");
      check_tensor("kv_row_keys", *kv_row_keys, ScalarType::Int, {k.size(0)}, q);
      if (!kv_row_keys->is_contiguous()) refuse("kv_row_keys", "adjacent values", describe(*kv_row_keys));
      a.kv_row_keys = static_cast<const int32_t*>(kv_row_keys->const_data_ptr());
    }
    check_places();
  }

 private:
  // What the tables say is within the tensors: the loops look at it no more.
  void check_places() {
    PackedAttention& a = arguments;
    a.most_keys = 0;
    for (int64_t sample = 0; sample < a.samples; ++sample) {
      int64_t keys = 0;
      for (int64_t i = 0; i < a.spans_each; ++i) {
        const KeySpan span = a.spans_of(sample)[i];
        check_range("spans", span.first, span.count, k.size(0));
        keys += span.count;
        rows_of_spans += span.count;
      }
      a.most_keys = std::max(a.most_keys, keys);
      for (int64_t i = 0; i < a.parts_each; ++i) {
        const RowPart part = a.parts_of(sample)[i];
        check_range("parts", part.first, part.count, a.q_rows);
        check_range("parts", part.first_key, 0, keys);
        rows_of_parts += part.count;
        for (int64_t row = part.first; row < part.first + part.count; ++row)
          check_range("visible", part.first_key, a.visible[row], keys);
      }
    }
  }
};

// New rows, of which so many will be written; the others are 0.
Tensor new_rows_of(const Tensor& like, int64_t written) {
  const std::initializer_list<int64_t> sizes = {like.size(0), like.size(1), like.size(2)};
  return written == like.size(0) ? torch::stable::new_empty(like, sizes)
                                 : torch::stable::new_zeros(like, sizes);
}

Tensor forward(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& spans, const Tensor& parts,
    const Tensor& visible, int64_t pairs, double scale, double dropout, const Optional& dropout_key,
    const Optional& q_row_keys, const Optional& kv_row_keys, int64_t place) {
  const Inputs inputs(
      q, k, v, spans, parts, visible, pairs, scale, dropout, dropout_key, q_row_keys, kv_row_keys, place);
  Tensor out = new_rows_of(q, inputs.rows_of_parts);
  PackedAttentionForward arguments{inputs.arguments};
  arguments.out = out.mutable_data_ptr();
  packed_attention_cpu(arguments);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& spans,
    const Tensor& parts, const Tensor& visible, int64_t pairs, double scale, double dropout,
    const Optional& dropout_key, const Optional& q_row_keys, const Optional& kv_row_keys, int64_t place) {
  const Inputs inputs(
      q, k, v, spans, parts, visible, pairs, scale, dropout, dropout_key, q_row_keys, kv_row_keys, place);
  check_tensor("grad", grad, q.scalar_type(), {q.size(0), q.size(1), q.size(2)}, q);
  const Tensor adjacent_grad = with_adjacent_channels(grad);
  Tensor dq = new_rows_of(q, inputs.rows_of_parts);
  Tensor dk = new_rows_of(k, inputs.rows_of_spans);
  Tensor dv = new_rows_of(v, inputs.rows_of_spans);
  PackedAttentionBackward arguments{inputs.arguments};
  arguments.grad = rows_of(adjacent_grad);
  arguments.dq = dq.mutable_data_ptr();
  arguments.dk = dk.mutable_data_ptr();
  arguments.dv = dv.mutable_data_ptr();
  packed_attention_backward_cpu(arguments);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace blip2_kernels

BLIP2_KERNELS_IMPLEMENT_ON(CPU, "packed_attention", blip2_kernels::forward)
BLIP2_KERNELS_IMPLEMENT_ON(CPU, "packed_attention_backward", blip2_kernels::backward)
