// The schemas of the compiled operators; their shapes for tracing and their gradients are registered in
// Python.
#include <torch/csrc/stable/library.h>

#include "library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(BLIP2_KERNELS_NAMESPACE, library) {
  library.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? input_bias, float eps, "
      "float dropout, Tensor? dropout_key, Tensor? row_keys, int place) -> (Tensor out, Tensor mean, Tensor "
      "rstd)");
  library.def(
      "add_layer_norm_backward(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor? input_bias, "
      "Tensor mean, Tensor rstd, float dropout, Tensor? dropout_key, Tensor? row_keys, int place) -> "
      "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dinput_bias)");
  library.def(
      "embed_tokens_forward(Tensor? queries, Tensor? words, Tensor? positions, Tensor? token_ids, "
      "Tensor? position_ids, int query_rows, Tensor weight, Tensor bias, float eps, float dropout, "
      "Tensor? dropout_key, Tensor? row_keys, int place, Tensor(a!)? errors) -> "
      "(Tensor out, Tensor mean, Tensor rstd)");
  library.def(
      "embed_tokens_backward(Tensor grad, Tensor? queries, Tensor? words, Tensor? positions, Tensor? "
      "token_ids, "
      "Tensor? position_ids, int query_rows, Tensor? token_order, Tensor? position_order, int padding_idx, "
      "Tensor weight, Tensor mean, Tensor rstd, float dropout, Tensor? dropout_key, Tensor? row_keys, int "
      "place) -> "
      "(Tensor dqueries, Tensor dwords, Tensor dpositions, Tensor dweight, Tensor dbias)");
  library.def("bias_gelu(Tensor x, Tensor? bias) -> Tensor");
  library.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor? bias) -> (Tensor dx, Tensor dbias)");
  library.def(
      "packed_attention(Tensor q, Tensor k, Tensor v, Tensor spans, Tensor parts, Tensor visible, int pairs, "
      "float scale, float dropout, Tensor? dropout_key, Tensor? q_row_keys, Tensor? kv_row_keys, int place) "
      "-> "
      "Tensor");
  library.def(
      "packed_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor spans, Tensor parts, "
      "Tensor visible, int pairs, float scale, float dropout, Tensor? dropout_key, Tensor? q_row_keys, "
      "Tensor? "
      "kv_row_keys, int place) -> (Tensor dq, Tensor dk, Tensor dv)");
}
