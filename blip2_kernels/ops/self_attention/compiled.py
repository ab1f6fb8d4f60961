"""Backend `csrc`: the compiled operator on a CPU, its shapes for tracing, and its gradient."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import extension
from ...layout import TokenLayout
from ...mask import AttentionMask, MaskMode, rectangles
from ..library import Gradient, complete
from ..philox import Site, place
from .kept import Kept, segment_sizes

MAX_HEAD_DIM = 256
MAX_KEYS = 1024
"""Of a sample: what a head has for each lies in a core's second-level cache."""


def supports(q: Tensor, kv_layout: TokenLayout) -> str | None:
    """None where the compiled operator can serve, else the reason."""
    if q.device.type != "cpu":
        return f"the compiled self-attention runs on CPU tensors, not on {q.device.type}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the compiled self-attention takes heads of up to {MAX_HEAD_DIM} channels, got {q.shape[-1]}"
    keys = sum(segment_sizes(kv_layout))
    if keys > MAX_KEYS:
        return f"the compiled self-attention takes samples of up to {MAX_KEYS} rows, got {keys}"
    return extension.rows_reason(q.dtype, q.device.type)


def self_attention_compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: TokenLayout,
    kv_layout: TokenLayout,
    mask: AttentionMask,
    *,
    dropout: float,
    dropout_key: Tensor | None,
    layer: int,
    scale: float,
) -> Tensor:
    """See `self_attention`."""
    table = TABLES.of(q_layout, kv_layout, mask)
    drop = (dropout_key, q_layout.row_keys, kv_layout.row_keys) if dropout > 0 else (None, None, None)
    return _forward(q, k, v, *table, scale, dropout, *drop, place(layer, Site.SELF_ATTENTION))


class _Table(NamedTuple):
    """Who attends to whom, as the operator takes it.

    The keys of a sample are one list, so ordered that every row attends to neighbours in it: the text of a
    unimodal segment beside a causal one, the queries, the other text.

    Attributes:
        spans: int32 [S, spans, 2], first row and number of rows of each piece of that list.
        parts: int32 [S, parts, 3], of the queries and of each text: their first row, their number, and the
            place in the list from which they attend.
        visible: int32 [rows], how many keys each row attends to from there on.
        pairs: of a row and a key, masked ones too, all samples as long as the longest.
    """

    spans: Tensor
    parts: Tensor
    visible: Tensor
    pairs: int

    @classmethod
    def of(cls, q_layout: TokenLayout, kv_layout: TokenLayout, mask: AttentionMask) -> "_Table":
        q_rows, kv_rows = rectangles(q_layout, kv_layout)
        allowed = mask.between(q_rows, kv_rows).sum(-1, dtype=torch.int32)
        keys, lengths = _queries(kv_layout), [text.lengths for text in kv_layout.texts]
        spans = [keys, *(_pair(_begins(kv_layout, i), length) for i, length in enumerate(lengths))]
        queries = texts = torch.zeros_like(keys[:, :1])
        if len(lengths) == 2:
            spans[:2] = spans[1::-1]
            queries = lengths[0][:, None]
        starts = [queries, *(texts if i == 0 else queries for i in range(len(lengths)))]
        if mask.modes == (MaskMode.UNIMODAL,):
            starts[1] = keys[:, 1:]
        rows = [_queries(q_layout)]
        rows += [_pair(_begins(q_layout, i), text.offsets.diff()) for i, text in enumerate(q_layout.texts)]
        parts = [torch.cat([part, start], 1) for part, start in zip(rows, starts, strict=True)]
        pairs = q_layout.samples * _pairs(segment_sizes(q_layout), segment_sizes(kv_layout), mask)
        return cls(torch.stack(spans, 1), torch.stack(parts, 1), q_rows.collect(allowed), pairs)


def _pairs(rows: list[int], keys: list[int], mask: AttentionMask) -> int:
    """Rows times keys of a sample, part by part."""
    pairs = rows[0] * (sum(keys) if mask.joins_queries_and_text else keys[0])
    for mode, text_rows, text_keys in zip(mask.modes, rows[1:], keys[1:], strict=True):
        pairs += text_rows * (text_keys + (0 if mode == MaskMode.UNIMODAL else keys[0]))
    return pairs


def _queries(layout: TokenLayout) -> Tensor:
    """int32 [S, 2], first row and number of the queries of each sample."""
    counts = torch.full((layout.samples,), layout.num_queries, dtype=torch.int32, device=layout.device)
    return _pair(torch.arange(layout.samples, device=layout.device) * layout.num_queries, counts)


def _begins(layout: TokenLayout, text: int) -> Tensor:
    """[S], first row of a text of each sample."""
    return layout.texts[text].offsets[:-1] + layout.text_start(text)


def _pair(first: Tensor, count: Tensor) -> Tensor:
    return torch.stack([first.to(torch.int32), count.to(torch.int32)], 1)


TABLES = Kept(_Table.of)


def _fake_forward(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, pairs, scale, dropout, key, q_row_keys, kv_row_keys, where = inputs
    ctx.save_for_backward(*tensors, key, q_row_keys, kv_row_keys)
    ctx.options = (pairs, scale, dropout, where)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, key, q_row_keys, kv_row_keys = ctx.saved_tensors
    *options, where = ctx.options
    grads = _backward(grad, *tensors, *options, key, q_row_keys, kv_row_keys, where)
    return (*grads, *(None,) * 10)


if extension.reason() is None:
    _forward = complete("packed_attention", _fake_forward, Gradient(_differentiate, _save))
    _backward = complete("packed_attention_backward", _fake_backward)
