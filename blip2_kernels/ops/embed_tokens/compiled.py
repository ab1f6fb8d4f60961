"""Backend `csrc`: the compiled operator, its shapes for tracing, and its gradient.

Callers see an operator that is defined here, `embed_tokens`; it hands the extension's `embed_tokens_forward`
the device's flag for ids out of range, which the schema of an operator with a gradient may not mention.
"""

from typing import Any

import torch
from torch import Tensor

from ... import extension
from ...device_errors import error_flag
from ..library import Gradient, complete, define
from ..philox import Site, place


def supports(weight: Tensor) -> str | None:
    """None where the compiled operator can serve rows that a LayerNorm of this weight normalises, else the
    reason."""
    return extension.rows_reason(weight.dtype, weight.device.type, weight.shape[0])


def embed_tokens_compiled(
    queries: Tensor | None,
    words: Tensor | None,
    positions: Tensor | None,
    token_ids: Tensor | None,
    position_ids: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    query_rows: int,
    padding_idx: int | None,
    eps: float,
    dropout: float,
    dropout_key: Tensor | None,
    row_keys: Tensor | None,
    layer: int,
    site: Site,
) -> Tensor:
    """See `embed_tokens`; arguments as `embed_tokens_reference`."""
    if dropout == 0:
        dropout_key = row_keys = None
    left_out = -1 if padding_idx is None else padding_idx
    tables = (queries, words, positions, token_ids, position_ids, query_rows, left_out)
    drop = (dropout, dropout_key, row_keys, place(layer, site))
    return _forward(*tables, weight, bias, eps, *drop)[0]


_INPUTS = (
    "Tensor? queries, Tensor? words, Tensor? positions, Tensor? token_ids, Tensor? position_ids,"
    " int query_rows, int padding_idx, Tensor weight, Tensor bias, float eps, float dropout,"
    " Tensor? dropout_key, Tensor? row_keys, int place"
)


def _run_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight = arguments[7]
    errors = error_flag(weight.device) if weight.device.type == "cuda" else None
    with torch._C._AutoDispatchBelowAutograd():
        operator = torch.ops.blip2_kernels.embed_tokens_forward.default
        return operator(*arguments[:6], *arguments[7:], errors)  # who is left out is the gradient's affair


def _fake_forward(
    queries: Tensor | None,
    words: Tensor | None,
    positions: Tensor | None,
    token_ids: Tensor | None,
    position_ids: Tensor | None,
    query_rows: int,
    padding_idx: int,
    weight: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    text = words if token_ids is None else token_ids
    rows = query_rows + (0 if text is None else text.shape[0])
    mean, rstd = (weight.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return weight.new_empty(rows, weight.shape[0]), mean, rstd


def _fake_backward(
    grad: Tensor,
    queries: Tensor | None,
    words: Tensor | None,
    positions: Tensor | None,
    token_ids: Tensor | None,
    position_ids: Tensor | None,
    query_rows: int,
    token_order: Tensor | None,
    position_order: Tensor | None,
    padding_idx: int,
    weight: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    if token_ids is not None and token_order is None:
        words = None
    if position_order is None:
        positions = None
    width = weight.shape[0]
    tables = [weight.new_empty(0 if t is None else t.shape[0], width) for t in (queries, words, positions)]
    return *tables, weight.new_empty(width), weight.new_empty(width)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tables, query_rows, padding_idx, weight, _, _, dropout, dropout_key, row_keys, place = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*tables, weight, mean, rstd, dropout_key, row_keys)
    ctx.query_rows, ctx.padding_idx, ctx.dropout, ctx.place = query_rows, padding_idx, dropout, place


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 14
    *tables, weight, mean, rstd, dropout_key, row_keys = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    # Rows of one word, or one position, side by side in their order: each gradient is one owner's sum.
    orders = [
        ids.argsort(stable=True) if wants and ids is not None else None
        for wants, ids in zip(wanted[1:], tables[3:], strict=True)
    ]
    found = _backward(
        grad,
        *tables,
        ctx.query_rows,
        *orders,
        ctx.padding_idx,
        weight,
        mean,
        rstd,
        ctx.dropout,
        dropout_key,
        row_keys,
        ctx.place,
    )
    of_tables = [gradient if wants else None for wants, gradient in zip(wanted, found[:3], strict=True)]
    return *of_tables, *(None,) * 4, *found[3:], *(None,) * 5


if extension.reason() is None:
    _backward = complete("embed_tokens_backward", _fake_backward)
    _forward = define(
        f"embed_tokens({_INPUTS}) -> (Tensor out, Tensor mean, Tensor rstd)",
        _run_forward,
        _fake_forward,
        Gradient(_differentiate, _save),
    )
