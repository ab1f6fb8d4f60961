"""softmax(q kᵀ · scale) v over dense tensors as a textbook writes it: what both references are made of."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_int, check_probability, check_tensor, describe

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    scale: float,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Dense masked attention.

    Args:
        q: [S, H, Lq, D].
        k, v: [S, H, Lk, D].
        allowed: bool, broadcastable to [S, H, Lq, Lk]; a row that may attend to nothing gives 0.
        scale: factor of the scores.
        dropout: applied to the probabilities.

    Returns:
        [S, H, Lq, D] in q's dtype. Scores and sums are fp32 (fp64 for fp64 inputs), probabilities have q's
        dtype.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    # A finite floor, not -inf: a fully masked row then has a softmax with a defined (zeroed) gradient.
    probs = scores.masked_fill(~allowed, torch.finfo(wide).min).softmax(-1).to(q.dtype)
    probs = probs * allowed.any(-1, keepdim=True)
    if dropout is not None:
        probs = dropout(probs)
    # A matrix product of half precision sums in fp32 and rounds once.
    return probs @ v


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    """Constant to the compiler, which cannot trace the question itself before torch 2.12."""
    return torch.amp.is_autocast_available(device_type)


def autocasts(device: torch.device) -> bool:
    """Whether matrix products on a device run in autocast's dtype here."""
    kind = device.type
    return (kind in ("cpu", "cuda") or _has_autocast(kind)) and torch.is_autocast_enabled(kind)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """A region in which tensors keep the dtype they came in: an op's arithmetic is its own business."""
    return torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext()


def attend_torch(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """`attend` without dropout, as plain torch does it best; `allowed` is None where nothing is hidden."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if (
        half
        and q.device.type == "cpu"
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in (q, k, v))
    ):
        # The backward of the CPU's fused SDPA is five times slower than these few matrix products in bf16
        # (96 x 12 x 29 x 32: 103 ms against 22 ms on one AVX-512 core).
        everything = torch.ones((1, 1), dtype=torch.bool)
        return attend(q, k, v, everything if allowed is None else allowed, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


def check_projections(
    q: object, k: object, v: object, lead: list[str | int], kv_lead: list[str | int]
) -> None:
    """Check q [*lead, heads, head_dim] and k, v [*kv_lead, heads, head_dim]: one dtype, device, head count
    and dim.

    Raises:
        TypeError: not tensors, not floating point, or mixed dtypes.
        ValueError: ranks, sizes or devices that do not fit.
    """
    check_tensor("q", q, [*lead, "heads", "head_dim"], DTYPES)
    heads, head_dim = q.shape[-2:]
    if heads == 0 or head_dim == 0:
        raise ValueError(f"q: expected at least one head and one channel, got {describe(q)}")
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(name, tensor, [*kv_lead, heads, head_dim], [q.dtype], q.device)
    check_tensor("v", v, [*k.shape])


def check_scale(scale: object, head_dim: int) -> float:
    """The factor of the scores: `scale`, head_dim ** -0.5 for None; raises unless it is a finite number."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a finite number or None, got {describe(scale)}")
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale: expected a finite number or None, got {scale}")
    return float(scale)


def check_dropout(dropout: float, dropout_key: object, layer: object) -> None:
    """Check the three dropout arguments of an attention; raises TypeError or ValueError."""
    check_probability("dropout", dropout)
    check_int("layer", layer, 0, (1 << 29) - 1)
    if dropout > 0 and dropout_key is None:
        raise ValueError(
            "dropout_key: expected an int64 [] tensor from draw_key() where dropout > 0, got None"
        )
    if dropout_key is not None:
        check_tensor("dropout_key", dropout_key, [], [torch.int64])
