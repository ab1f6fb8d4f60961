"""Backend `csrc`: the compiled operator, its shapes for tracing, and its gradient."""

from typing import Any

import torch
from torch import Tensor

from ... import extension
from ..library import Gradient, complete
from ..philox import Site, place


def supports(x: Tensor, residual: Tensor) -> str | None:
    """None where the compiled operator can serve, else the reason."""
    return extension.rows_reason(residual.dtype, x.device.type, residual.shape[1])


def add_layer_norm_compiled(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    input_bias: Tensor | None,
    eps: float,
    dropout: float = 0.0,
    dropout_key: Tensor | None = None,
    row_keys: Tensor | None = None,
    layer: int = 0,
    site: Site = Site.SELF_OUTPUT,
) -> Tensor:
    """See `add_layer_norm`."""
    if dropout == 0:
        dropout_key = row_keys = None
    drop = (dropout, dropout_key, row_keys, place(layer, site))
    return _forward(x, residual, weight, bias, input_bias, eps, *drop)[0]


def _fake_forward(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = residual.shape[0]
    mean, rstd = (residual.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return residual.new_empty(residual.shape), mean, rstd


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    input_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    *_: Any,
) -> tuple[Tensor, ...]:
    rows, width = residual.shape
    one_gradient = dropout == 0 and x.dtype == residual.dtype
    vectors = [weight.new_empty(size) for size in (width, width, 0 if input_bias is None else width)]
    return x.new_empty(x.shape), residual.new_empty(0 if one_gradient else rows, width), *vectors


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, input_bias, _, dropout, dropout_key, row_keys, place = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, residual, weight, input_bias, mean, rstd, dropout_key, row_keys)
    ctx.dropout, ctx.place = dropout, place


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    x, residual, weight, input_bias, mean, rstd, dropout_key, row_keys = ctx.saved_tensors
    rows = (grad, x, residual, weight, input_bias, mean, rstd)
    dx, dresidual, dweight, dbias, dinput_bias = _backward(
        *rows, ctx.dropout, dropout_key, row_keys, ctx.place
    )
    if dresidual.shape != residual.shape:  # without dropout, and in one dtype, both inputs have the same
        dresidual = dx
    return dx, dresidual, dweight, dbias, None if input_bias is None else dinput_bias, *(None,) * 5


if extension.reason() is None:
    _forward = complete("add_layer_norm", _fake_forward, Gradient(_differentiate, _save))
    _backward = complete("add_layer_norm_backward", _fake_backward)
