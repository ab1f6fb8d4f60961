// The operator embed_tokens: what it refuses, what it returns, and which launcher runs it. The operator that
// callers see is defined in Python (blip2_kernels/ops/embed_tokens/compiled.py): its forward hands this one
// the device's flag for ids that are out of range, which no schema with a gradient may mention.
#include "embed_tokens.h"

#include <tuple>

#include "launch.h"
#include "library.h"

namespace blip2_kernels {
namespace {

int64_t rows_of(const Optional& tensor) { return tensor ? tensor->size(0) : 0; }

std::string describe_optional(const Optional& tensor) { return tensor ? describe(*tensor) : "None"; }

// A table [any number of rows, width] beside weight.
void check_table(const char* name, const Optional& table, const Tensor& weight) {
  if (!table) return;
  const std::string expected =
      describe(weight.scalar_type()) + " [rows, " + std::to_string(weight.size(0)) + "]";
  if (table->dim() != 2) refuse(name, expected, describe(*table));
  check_tensor(name, *table, weight.scalar_type(), {table->size(0), weight.size(0)}, weight);
}

// Numbers of rows of a table: one for each of `rows` text rows.
void check_ids(
    const char* name, const Optional& ids, int64_t rows, int64_t table_rows, const Tensor& weight) {
  check_tensor(name, *ids, ScalarType::Long, {rows}, weight);
  if (rows > 0 && table_rows == 0) refuse(name, "int64 [0] where the table has no rows", describe(*ids));
}

// Where looking costs nothing. On CUDA kernels take the nearest that is in range.
void check_values(const char* name, const Optional& tensor, int64_t limit) {
  if (!tensor || !tensor->is_cpu() || kCudaOnHost) return;
  const int64_t* values = static_cast<const int64_t*>(tensor->const_data_ptr());
  for (int64_t i = 0; i < tensor->size(0); ++i)
    if (values[i] < 0 || values[i] >= limit)
      refuse(name, "values in [0, " + std::to_string(limit) + ")", std::to_string(values[i]));
}

// An operator's inputs as kernels read them, kept until it returns.
struct Inputs {
  Optional queries, words, positions, token_ids, position_ids;
  Tensor weight;
  int64_t query_rows, text_rows;

  int64_t rows() const { return query_rows + text_rows; }
  int64_t width() const { return weight.size(0); }
};

Inputs check(
    const Optional& queries, const Optional& words, const Optional& positions, const Optional& token_ids,
    const Optional& position_ids, int64_t query_rows, const Tensor& weight) {
  check_leader("weight", weight, "[width]", 1, kMaxNormWidth);
  check_table("queries", queries, weight);
  check_table("words", words, weight);
  check_table("positions", positions, weight);

  const int64_t each = rows_of(queries);
  if (query_rows < 0 || (each ? query_rows % each : query_rows) != 0)
    refuse(
        "query_rows", "a multiple of the " + std::to_string(each) + " rows of queries",
        std::to_string(query_rows));
  if (token_ids && token_ids->dim() != 1) refuse("token_ids", "int64 [text rows]", describe(*token_ids));
  if (token_ids && !words) refuse("words", "a table beside token_ids", "None");
  if (positions && !words) refuse("words", "a table beside positions", "None");
  const int64_t text_rows = rows_of(token_ids ? token_ids : words);
  if (query_rows > kMaxRows || text_rows > kMaxRows - query_rows)
    refuse(
        text_rows ? token_ids ? "token_ids" : "words" : "query_rows",
        "at most 2^31 - 8 rows with those of the queries",
        std::to_string(query_rows) + " and " + describe_optional(token_ids ? token_ids : words));
  if (token_ids) check_ids("token_ids", token_ids, text_rows, rows_of(words), weight);
  if (positions && !position_ids) refuse("position_ids", "int64 [text rows] beside positions", "None");
  if (position_ids && !positions) refuse("positions", "a table beside position_ids", "None");
  if (position_ids) check_ids("position_ids", position_ids, text_rows, rows_of(positions), weight);

  Inputs inputs{
      with_adjacent_channels(queries),
      with_adjacent_channels(words),
      with_adjacent_channels(positions),
      with_adjacent_channels(token_ids),
      with_adjacent_channels(position_ids),
      with_adjacent_channels(weight),
      query_rows,
      text_rows};
  check_values("token_ids", inputs.token_ids, rows_of(words));
  check_values("position_ids", inputs.position_ids, rows_of(positions));
  return inputs;
}

Table table_of(const Optional& tensor) {
  if (!tensor) return {nullptr, 0, 0};
  return {tensor->const_data_ptr(), tensor->stride(0), tensor->size(0)};
}

const int64_t* ids_of(const Optional& tensor) {
  return tensor ? static_cast<const int64_t*>(tensor->const_data_ptr()) : nullptr;
}

void fill(EmbedTokens& arguments, const Inputs& inputs, const DropoutArguments& dropout) {
  arguments.format = format_of(inputs.weight);
  arguments.rows = inputs.rows();
  arguments.width = inputs.width();
  arguments.query_rows = inputs.query_rows;
  arguments.queries = table_of(inputs.queries);
  arguments.words = table_of(inputs.words);
  arguments.positions = table_of(inputs.positions);
  arguments.token_ids = ids_of(inputs.token_ids);
  arguments.position_ids = ids_of(inputs.position_ids);
  arguments.weight = inputs.weight.const_data_ptr();
  arguments.dropout = dropout;
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Optional& queries, const Optional& words, const Optional& positions, const Optional& token_ids,
    const Optional& position_ids, int64_t query_rows, const Tensor& weight, const Tensor& bias, double eps,
    double dropout, const Optional& dropout_key, const Optional& row_keys, int64_t place,
    const Optional& errors) {
  const Inputs inputs = check(queries, words, positions, token_ids, position_ids, query_rows, weight);
  check_tensor("bias", bias, weight.scalar_type(), {inputs.width()}, weight);
  check_eps(eps);
  if (errors) check_tensor("errors", *errors, ScalarType::Int, {1}, weight);
  EmbedTokensForward arguments;
  fill(arguments, inputs, check_dropout(dropout, dropout_key, row_keys, place, inputs.rows(), weight));

  const Tensor adjacent_bias = with_adjacent_channels(bias);
  Tensor out = new_rows(weight, arguments.rows, arguments.width);
  Tensor mean = new_floats(weight, arguments.rows), rstd = new_floats(weight, arguments.rows);
  arguments.bias = adjacent_bias.const_data_ptr();
  arguments.eps = float(eps);
  arguments.out = out.mutable_data_ptr();
  arguments.mean = static_cast<float*>(mean.mutable_data_ptr());
  arguments.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  arguments.errors = errors ? static_cast<int32_t*>(errors->mutable_data_ptr()) : nullptr;
  if (arguments.rows) BLIP2_KERNELS_LAUNCH(weight, embed_tokens_forward, arguments);
  return {out, mean, rstd};
}

// The gradient of a table, and which rows of dhidden it is the sum of. Without ids all of it is written.
struct TableGradient {
  Tensor out;
  Optional ids, order;

  TableGradient(
      const char* order_name, const Optional& table, const Optional& given_ids, const Optional& given_order,
      bool has_ids, const Inputs& inputs)
      : ids(given_ids), order(with_adjacent_channels(given_order)) {
    if (order) {
      if (!ids) refuse(order_name, "None where there are no ids", describe(*order));
      check_tensor(order_name, *order, ScalarType::Long, {inputs.text_rows}, inputs.weight);
      check_values(order_name, order, inputs.text_rows);
    }
    const bool wanted = table && (!has_ids || order);
    out = has_ids ? new_zero_rows(inputs.weight, wanted ? table->size(0) : 0, inputs.width())
                  : new_rows(inputs.weight, wanted ? table->size(0) : 0, inputs.width());
  }

  RowLists lists(const float* rows, int64_t count, int64_t left_out) {
    RowLists lists{rows, count, out.size(1), nullptr, nullptr, left_out, out.size(0), nullptr};
    if (order) lists.keys = ids_of(ids), lists.order = ids_of(order);
    if (lists.destinations) lists.out = out.mutable_data_ptr();
    return lists;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Optional& queries, const Optional& words, const Optional& positions,
    const Optional& token_ids, const Optional& position_ids, int64_t query_rows, const Optional& token_order,
    const Optional& position_order, int64_t padding_idx, const Tensor& weight, const Tensor& mean,
    const Tensor& rstd, double dropout, const Optional& dropout_key, const Optional& row_keys,
    int64_t place) {
  const Inputs inputs = check(queries, words, positions, token_ids, position_ids, query_rows, weight);
  const int64_t rows = inputs.rows(), width = inputs.width();
  check_tensor("grad", grad, weight.scalar_type(), {rows, width}, weight);
  check_tensor("mean", mean, ScalarType::Float, {rows}, weight);
  check_tensor("rstd", rstd, ScalarType::Float, {rows}, weight);
  EmbedTokensBackward arguments;
  fill(arguments, inputs, check_dropout(dropout, dropout_key, row_keys, place, rows, weight));
  TableGradient dqueries("queries", queries, {}, {}, false, inputs);
  TableGradient dwords("token_order", words, inputs.token_ids, token_order, token_ids.has_value(), inputs);
  TableGradient dpositions("position_order", positions, inputs.position_ids, position_order, true, inputs);

  const Tensor adjacent_grad = with_adjacent_channels(grad);
  const Tensor adjacent_mean = with_adjacent_channels(mean), adjacent_rstd = with_adjacent_channels(rstd);
  Tensor dweight = new_vector(weight, width), dbias = new_vector(weight, width);
  const int64_t parts = parts_of(rows, kNormParts, weight);
  Tensor partials = new_floats(weight, parts * kEmbedSums * width),
         dhidden = new_floats(weight, rows * width);
  arguments.grad = adjacent_grad.const_data_ptr();
  arguments.grad_stride = adjacent_grad.stride(0);
  arguments.mean = static_cast<const float*>(adjacent_mean.const_data_ptr());
  arguments.rstd = static_cast<const float*>(adjacent_rstd.const_data_ptr());
  arguments.dhidden = static_cast<float*>(dhidden.mutable_data_ptr());
  arguments.partials = static_cast<float*>(partials.mutable_data_ptr());
  arguments.parts = parts;
  arguments.sums[0] = dweight.mutable_data_ptr();
  arguments.sums[1] = dbias.mutable_data_ptr();
  const float* text = arguments.dhidden + query_rows * width;
  arguments.dqueries = dqueries.lists(arguments.dhidden, query_rows, -1);
  arguments.dwords = dwords.lists(text, inputs.text_rows, padding_idx);
  arguments.dpositions = dpositions.lists(text, inputs.text_rows, -1);
  BLIP2_KERNELS_LAUNCH(weight, embed_tokens_backward, arguments);
  return {dqueries.out, dwords.out, dpositions.out, dweight, dbias};
}

}  // namespace
}  // namespace blip2_kernels

BLIP2_KERNELS_IMPLEMENT("embed_tokens_forward", blip2_kernels::forward)
BLIP2_KERNELS_IMPLEMENT("embed_tokens_backward", blip2_kernels::backward)
