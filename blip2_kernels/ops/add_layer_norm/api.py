"""`add_layer_norm`: what it means, what it refuses, which backend runs it."""

from functools import partial

import torch
from torch import Tensor

from ...checks import check_int, check_probability, check_tensor, describe
from ..backends import choose_backend
from ..dense_attention import DTYPES, no_autocast
from ..philox import Site
from .compiled import add_layer_norm_compiled, supports
from .reference import add_layer_norm_reference

HALF = (torch.float16, torch.bfloat16)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    input_bias: Tensor | None = None,
    eps: float = 1e-12,
    dropout: float = 0.0,
    dropout_key: Tensor | None = None,
    row_keys: Tensor | None = None,
    layer: int = 0,
    site: Site = Site.SELF_OUTPUT,
    backend: str = "auto",
) -> Tensor:
    """What ends each third of a layer (BERT's output block): bias, dropout, residual, LayerNorm in one pass.

        out = LayerNorm(residual + dropout(x + input_bias)) * weight + bias

    Args:
        x: [rows, width], fp16, bf16, fp32 or fp64; what a linear layer gave, with or without its bias.
        residual: [rows, width], x's dtype, or fp32 beside an x in half precision (under autocast the residual
            stream stays fp32).
        weight, bias: [width] of the LayerNorm, residual's dtype.
        input_bias: [width], residual's dtype; the linear layer's bias where x comes without.
        eps: added to the variance, >= 0; default 1e-12, BERT's.
        dropout: probability in [0, 1) of dropping an element of x, by the Philox contract of
            `blip2_kernels.ops.philox`.
        dropout_key: int64 [] from `draw_key`; needed where dropout > 0.
        row_keys: int32 [rows], the names of the rows; needed where dropout > 0.
        layer, site: part of the dropout counter.
        backend: "auto" (the first of `csrc`, `reference` that can serve), or one of them; a named backend
            that cannot serve raises.

    Returns:
        [rows, width] in residual's dtype. Backend `csrc` computes in fp32 throughout and rounds once; its
        gradients are the same in every run, whatever the number of threads.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message, before
            anything is computed.
    """
    check_tensor("residual", residual, ["rows", "width"], DTYPES)
    rows, width = residual.shape
    if width == 0:
        raise ValueError(f"residual: expected at least one channel, got {describe(residual)}")
    dtypes = (residual.dtype, *HALF) if residual.dtype == torch.float32 else (residual.dtype,)
    check_tensor("x", x, [rows, width], dtypes, residual.device)
    for name, vector in (("weight", weight), ("bias", bias), ("input_bias", input_bias)):
        if vector is not None or name != "input_bias":
            check_tensor(name, vector, [width], [residual.dtype], residual.device)
    check_eps(eps)
    check_row_dropout(dropout, dropout_key, row_keys, layer, site, residual)
    candidates = {"csrc": partial(supports, x, residual), "reference": lambda: None}
    chosen = choose_backend(backend, candidates)
    function = add_layer_norm_compiled if chosen == "csrc" else add_layer_norm_reference
    with no_autocast(residual.device):
        return function(
            x,
            residual,
            weight,
            bias,
            input_bias=input_bias,
            eps=float(eps),
            dropout=float(dropout),
            dropout_key=dropout_key,
            row_keys=row_keys,
            layer=layer,
            site=site,
        )


def check_eps(eps: object) -> None:
    """Check the number that a LayerNorm adds to the variance; raises TypeError or ValueError."""
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps: expected a finite number >= 0, got {describe(eps)}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: expected a finite number >= 0, got {eps}")


def check_row_dropout(
    dropout: object, dropout_key: object, row_keys: object, layer: object, site: object, beside: Tensor
) -> None:
    """Check the dropout arguments of an op on rows like `beside`; raises TypeError or ValueError."""
    p = check_probability("dropout", dropout)
    check_int("layer", layer, 0, (1 << 29) - 1)
    if not isinstance(site, Site):
        raise TypeError(f"site: expected a Site, got {describe(site)}")
    if p > 0 or dropout_key is not None:
        check_tensor("dropout_key", dropout_key, [], [torch.int64], beside.device)
    if p > 0 or row_keys is not None:
        check_tensor("row_keys", row_keys, [beside.shape[0]], [torch.int32], beside.device)
