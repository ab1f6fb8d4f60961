// Attention of packed rows to packed rows, sample by sample: arguments and launchers. CPU only.
#pragma once

#include "number.h"
#include "philox.h"

namespace blip2_kernels {

constexpr int64_t kMaxHeadDim = 256;

// Keys of a sample: consecutive rows of k and v. A sample's spans follow one another in one list of keys.
struct KeySpan {
  int32_t first;
  int32_t count;
};

// Consecutive rows of q that attend to that list of their sample from the same key on; how far, each row
// knows for itself.
struct RowPart {
  int32_t first;
  int32_t count;
  int32_t first_key;
};

// Tensors are [rows, heads, head_dim] with adjacent channels; strides count elements.
struct PackedRows {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
};

struct PackedAttention {
  Format format;  // of all rows
  int64_t samples, heads, head_dim;
  int64_t q_rows;
  int64_t most_keys;  // of a sample
  PackedRows q, k, v;
  const KeySpan* spans;  // [samples, spans_each]
  int64_t spans_each;
  const RowPart* parts;  // [samples, parts_each]
  int64_t parts_each;
  const int32_t* visible;  // [q rows]: keys that a row attends to
  int64_t pairs;           // of a row and a key, about: how much work there is
  float scale;
  DropoutArguments dropout;    // row_keys are those of q
  const int32_t* kv_row_keys;  // where there is dropout

  const KeySpan* spans_of(int64_t sample) const { return spans + sample * spans_each; }
  const RowPart* parts_of(int64_t sample) const { return parts + sample * parts_each; }
};

struct PackedAttentionForward : PackedAttention {
  void* out;  // adjacent rows
};

struct PackedAttentionBackward : PackedAttention {
  PackedRows grad;
  void* dq;  // adjacent rows
  void* dk;  // adjacent rows; those that no span holds are left as they are
  void* dv;
};

void packed_attention_cpu(const PackedAttentionForward& arguments);
void packed_attention_backward_cpu(const PackedAttentionBackward& arguments);

}  // namespace blip2_kernels
