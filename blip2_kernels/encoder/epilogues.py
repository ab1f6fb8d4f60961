"""What follows the matrix products of a layer: bias, dropout, residual and LayerNorm, or bias and GELU.

Where the modules are as they were built, one compiled operator does it, which checks what it is given itself;
else they are called as they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from .. import extension
from ..ops.add_layer_norm.compiled import add_layer_norm_compiled
from ..ops.bias_gelu.compiled import bias_gelu_compiled
from ..ops.linear import linear
from ..ops.philox import Site, dropout_hidden
from .modules import affine_reason, call_linear, plain_reason


@dataclass(frozen=True)
class HiddenDropout:
    """A dropout of hidden elements.

    Attributes:
        p: probability.
        key: int64 [], the step's.
        names: int32 [rows], row keys.
        layer, site: where it stands.
    """

    p: float
    key: Tensor
    names: Tensor
    layer: int
    site: Site

    def __call__(self, x: Tensor) -> Tensor:
        """Drop elements of x [rows, C]."""
        return dropout_hidden(x, self.p, self.key, self.names, layer=self.layer, site=self.site)

    def options(self) -> dict[str, Any]:
        """The same as arguments of an op."""
        names = {"dropout_key": self.key, "row_keys": self.names}
        return {"dropout": self.p, "layer": self.layer, "site": self.site} | names


def dense_add_norm(
    dense: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor, drop: HiddenDropout | None
) -> Tensor:
    """norm(residual + dropout(dense(x))).

    Args:
        dense, norm: a linear layer and a LayerNorm, whatever hangs on them.
        x: [rows, its inputs].
        residual: [rows, hidden].
        drop: None for no dropout.
    """
    if _norm_is_fused(norm, residual):
        y, input_bias = _without_bias(dense, x, residual)
        if y.dtype == residual.dtype or (residual.dtype == torch.float32 and y.itemsize == 2):
            options = {} if drop is None else drop.options()
            return add_layer_norm_compiled(
                y, residual, norm.weight, norm.bias, input_bias=input_bias, eps=norm.eps, **options
            )
        y = y if input_bias is None else y + input_bias
    else:
        y = call_linear(dense, x)
    if drop is not None:
        y = drop(y)
    return norm(residual + y)


def dense_gelu(dense: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """activation(dense(x)), [rows, intermediate]."""
    if not _is_exact_gelu(activation, x):
        return activation(call_linear(dense, x))
    y, bias = _without_bias(dense, x, None)
    # Without a bias there is nothing to fuse: the activation alone is one pass already.
    return activation(y) if bias is None else bias_gelu_compiled(y, bias)


def _norm_is_fused(norm: nn.Module, residual: Tensor) -> bool:
    """Whether the compiled operator computes what this norm would."""
    return (
        extension.rows_reason(residual.dtype, residual.device.type, residual.shape[1]) is None
        and norm_reason(norm) is None
        and norm.weight.dtype == residual.dtype
        and residual.shape[1:] == norm.normalized_shape
    )


def norm_reason(norm: nn.Module) -> str | None:
    """None where a LayerNorm may be computed by a compiled operator, else why not."""
    reason = affine_reason(norm)
    if reason is None and norm.weight.dtype == torch.float64:
        reason = "is in float64"
    return reason


def _is_exact_gelu(activation: nn.Module, x: Tensor) -> bool:
    exact = plain_reason(activation, GELUActivation) is None and activation.act is F.gelu
    return exact and extension.rows_reason(x.dtype, x.device.type) is None


def _without_bias(dense: nn.Module, x: Tensor, beside: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The linear layer's product, and its bias where that was left out for the operator that follows."""
    bias = getattr(dense, "bias", None) if plain_reason(dense, nn.Linear) is None else None
    if bias is None or (beside is not None and bias.dtype != beside.dtype):
        return call_linear(dense, x), None
    return linear(x, dense.weight), bias
