"""Backend `csrc`: the compiled operator, its shapes for tracing, and its gradient."""

from typing import Any

from torch import Tensor

from ... import extension
from ..library import Gradient, complete


def supports(x: Tensor, bias: Tensor | None) -> str | None:
    """None where the compiled operator can serve, else the reason."""
    return extension.rows_reason(x.dtype, x.device.type)


def bias_gelu_compiled(x: Tensor, bias: Tensor | None) -> Tensor:
    """See `bias_gelu`."""
    return _forward(x, bias)


def _fake_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    dx, dbias = _backward(grad, x, bias)
    return dx, None if bias is None else dbias


if extension.reason() is None:
    _forward = complete("bias_gelu", _fake_forward, Gradient(_differentiate, _save))
    _backward = complete("bias_gelu_backward", _fake_backward)
