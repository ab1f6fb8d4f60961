"""Attention masks of the plain Q-Former: the paper's three spelled out, and those that callers pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2_kernels.checks import check_binary, check_device, check_int, check_tensor, describe
from blip2_kernels.layout import MASK_DTYPES
from blip2_kernels.mask import MaskMode


def dense_attention_mask(
    mode: MaskMode, num_queries: int, past: int, length: int, device: torch.device | str | None = None
) -> Tensor:
    """One of the paper's three self-attention masks (figure 2), spelled out.

    Args:
        mode: which.
        num_queries: query rows at the front, cached ones included.
        past: cached rows.
        length: rows of this pass.
        device: where to make it.

    Returns:
        bool [1, 1, length, past + length], True where the row may attend.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.
    """
    if not isinstance(mode, MaskMode):
        raise TypeError(f"mode: expected a MaskMode, got {describe(mode)}")
    for name, number in (("num_queries", num_queries), ("past", past), ("length", length)):
        check_int(name, number, 0)
    if device is not None:
        device = check_device("device", device)
    to = torch.arange(past + length, device=device)[None, :]
    row = torch.arange(past, past + length, device=device)[:, None]
    from_text, to_text = row >= num_queries, to >= num_queries
    if mode == MaskMode.UNIMODAL:
        allowed = from_text == to_text
    elif mode == MaskMode.MULTIMODAL_CAUSAL:
        allowed = ~to_text | (from_text & (to <= row))
    else:
        allowed = (to >= 0) & (row >= 0)
    return allowed[None, None]


def check_attention_mask(mask: Tensor | None, batch: int, heads: int, rows: int, keys: int) -> Tensor | None:
    """Check an attention mask of two to four dimensions; return it as bool."""
    if mask is None:
        return None
    shapes = {
        2: [batch, keys],
        3: [batch, rows, keys],
        4: [batch, mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 4 else heads, rows, keys],
    }
    dims = mask.dim() if isinstance(mask, Tensor) else 2
    check_tensor("attention_mask", mask, shapes.get(dims, shapes[2]), MASK_DTYPES)
    if dims == 4 and mask.shape[1] not in (1, heads):
        raise ValueError(
            f"attention_mask: expected [{batch}, 1 or {heads}, {rows}, {keys}], got {list(mask.shape)}"
        )
    check_binary("attention_mask", mask)
    return mask != 0


def to_four_dimensions(mask: Tensor) -> Tensor:
    return {2: lambda m: m[:, None, None, :], 3: lambda m: m[:, None], 4: lambda m: m}[mask.dim()](mask)


def text_rows_mask(
    mask: Tensor | None, batch: int, num_queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """Which text rows are real, bool [B, keys - num_queries]; None without text."""
    if keys == num_queries:
        return None
    if mask is not None and mask.dim() == 2:
        return mask[:, num_queries:]
    return torch.ones(batch, keys - num_queries, dtype=torch.bool, device=device)


def with_visible_queries(
    text_mask: Tensor, attention_mask: Tensor | None, batch: int, num_queries: int, keys: int
) -> Tensor:
    """Check a mask of the text rows alone, 0/1 [batch, keys - num_queries]; return that of all, bool [batch,
    keys]."""
    if attention_mask is not None:
        raise ValueError(f"attention_mask: expected None beside text_mask, got {describe(attention_mask)}")
    check_tensor("text_mask", text_mask, [batch, keys - num_queries], MASK_DTYPES)
    check_binary("text_mask", text_mask)
    return F.pad(text_mask != 0, (num_queries, 0), value=True)


def hides_text_only(mask: Tensor | None, num_queries: int) -> bool:
    """Whether the mask is one a layout can express: two dimensions, no query hidden."""
    if mask is None:
        return True
    return mask.dim() == 2 and (num_queries == 0 or bool(mask[:, :num_queries].all()))
