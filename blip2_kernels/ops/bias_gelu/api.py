"""`bias_gelu`: what it means, what it refuses, which backend runs it."""

from functools import partial

import torch
from torch import Tensor

from ...checks import check_tensor, describe
from ..backends import choose_backend
from ..dense_attention import DTYPES, no_autocast
from .compiled import bias_gelu_compiled, supports
from .reference import bias_gelu_reference


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Bias and activation of a feed-forward network in one pass.

        out = GELU(x + bias) = (x + bias) * Phi(x + bias), Phi by the error function, not by tanh

    Args:
        x: [rows, width], fp16, bf16, fp32 or fp64; what a linear layer gave, with or without its bias.
        bias: [width], x's dtype or fp32; None for none.
        backend: "auto" (the first of `csrc`, `reference` that can serve), or one of them; a named backend
            that cannot serve raises.

    Returns:
        [rows, width] in x's dtype. Backend `csrc` computes in fp32 and rounds once; its gradients are the
        same in every run, whatever the number of threads.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message, before
            anything is computed.
    """
    check_tensor("x", x, ["rows", "width"], DTYPES)
    if x.shape[1] == 0:
        raise ValueError(f"x: expected at least one channel, got {describe(x)}")
    if bias is not None:
        dtypes = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
        check_tensor("bias", bias, [x.shape[1]], dtypes, x.device)
    candidates = {"csrc": partial(supports, x, bias), "reference": lambda: None}
    chosen = choose_backend(backend, candidates)
    with no_autocast(x.device):
        return (bias_gelu_compiled if chosen == "csrc" else bias_gelu_reference)(x, bias)
