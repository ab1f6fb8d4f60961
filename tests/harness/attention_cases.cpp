// Runs packed_attention on random tables, in memory of exactly its size, for a sanitizer to watch.
//
//   attention_cases COUNT SEED
//
// Values do not matter here beyond being finite: the tests of the operator compare them.
#include <stdio.h>
#include <stdlib.h>

#include <random>
#include <vector>

#include "packed_attention.h"

using namespace blip2_kernels;

namespace {

std::mt19937 random_numbers;

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_numbers); }

template <class T>
std::vector<T> draw_rows(int64_t size) {
  std::vector<T> rows(size);
  for (T& value : rows) value = from_float<T>(float(draw(-1000, 1000)) / 500);
  return rows;
}

template <class T>
void run(Format format) {
  PackedAttention a{};
  a.format = format;
  a.samples = draw(0, 4);
  a.heads = draw(1, 3);
  a.head_dim = draw(1, 40);
  a.spans_each = draw(1, 3);
  a.parts_each = draw(1, 2);
  a.scale = 0.125f;

  std::vector<KeySpan> spans;
  std::vector<RowPart> parts;
  std::vector<int32_t> visible;
  int keys = 0;
  for (int sample = 0; sample < a.samples; ++sample) {
    int its_keys = 0;
    for (int i = 0; i < a.spans_each; ++i) {
      spans.push_back({keys, draw(0, 2) ? draw(0, 60) : 0});
      keys += spans.back().count;
      its_keys += spans.back().count;
    }
    a.most_keys = std::max<int64_t>(a.most_keys, its_keys);
    for (int i = 0; i < a.parts_each; ++i) {
      parts.push_back({int32_t(a.q_rows), draw(0, 50), draw(0, its_keys)});
      a.q_rows += parts.back().count;
      for (int row = 0; row < parts.back().count; ++row)
        visible.push_back(draw(0, its_keys - parts.back().first_key));
    }
  }
  a.pairs = a.q_rows * a.most_keys;
  a.spans = spans.data();
  a.parts = parts.data();
  a.visible = visible.data();

  const int64_t width = a.heads * a.head_dim;
  const auto q = draw_rows<T>(a.q_rows * width), grad = draw_rows<T>(a.q_rows * width);
  const auto k = draw_rows<T>(keys * width), v = draw_rows<T>(keys * width);
  const auto rows_of = [&](const std::vector<T>& rows) { return PackedRows{rows.data(), width, a.head_dim}; };
  a.q = rows_of(q), a.k = rows_of(k), a.v = rows_of(v);

  const int64_t key = random_numbers();
  std::vector<int32_t> names(a.q_rows), key_names(keys);
  for (int32_t& name : names) name = draw(0, 1 << 20);
  for (size_t i = 0; i < key_names.size(); ++i)
    key_names[i] = i && draw(0, 4) ? key_names[i - 1] + 1 : draw(0, 1 << 20);
  if (draw(0, 1)) {
    a.dropout = {20000, 1.5f, 3, &key, names.data()};
    a.kv_row_keys = key_names.data();
  }

  std::vector<T> out(q.size()), dq(q.size()), dk(k.size()), dv(v.size());
  PackedAttentionForward forward{a};
  forward.out = out.data();
  packed_attention_cpu(forward);
  PackedAttentionBackward backward{a};
  backward.grad = rows_of(grad);
  backward.dq = dq.data(), backward.dk = dk.data(), backward.dv = dv.data();
  packed_attention_backward_cpu(backward);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  random_numbers.seed(unsigned(atoi(arguments[2])));
  const int cases = atoi(arguments[1]);
  for (int i = 0; i < cases; ++i) {
    run<float>(Format::FLOAT32);
    run<Half>(Format::FLOAT16);
    run<BFloat16>(Format::BFLOAT16);
  }
  printf("%d cases\n", cases);
}
