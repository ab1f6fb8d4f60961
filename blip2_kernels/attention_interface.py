"""The attentions alone, for any model of transformers: `attn_implementation="blip2_kernels"`."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from .ops import cross_attention
from .ops.philox import draw_key

__all__ = ["NAME", "register_attention"]

NAME = "blip2_kernels"


def register_attention() -> str:
    """Make the attention kernels known to transformers, with the mask they need.

    It serves attention in which all rows of a sample may read the same keys: both attentions of a Q-Former
    and those of image encoders. Any other (causal, grouped, biased) goes to transformers' SDPA. Padded images
    beside text work, which they do not in transformers' own implementations. `fuse` is faster: it knows the
    whole Q-Former.

    Returns:
        The name to choose it by: `model.set_attn_implementation("blip2_kernels")`.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    return NAME


def attention_mask(**options: Any) -> Tensor | None:
    """transformers' mask for SDPA; with one row for all, [B, 1, 1, keys], where all rows are alike."""
    mask = sdpa_mask(**options)
    if mask is not None and options.get("mask_function") is bidirectional_mask_function:
        return mask[:, :, :1]
    return mask


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: whose attention it is.
        query: [B, heads, rows, head_dim].
        key, value: [B, heads, keys, head_dim].
        attention_mask: bool [B, 1, 1, keys], True for what may be read, or None.
        dropout: probability of dropping an attention probability, by Philox counters.
        scaling: of the scores; default head_dim ** -0.5.
        options: for transformers' SDPA, which serves what this one does not.

    Returns:
        [B, rows, heads, head_dim], and None for the probabilities.
    """
    if not _serves(module, query, key, value, attention_mask, options):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    # Keys of several rows, one mask for all rows: what a kernel for images does.
    out = cross_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        image_mask=None if attention_mask is None else attention_mask[:, 0, 0].expand(len(key), -1),
        dropout=dropout,
        dropout_key=draw_key(query.device) if dropout else None,
        scale=scaling,
    )
    return out, None


def _serves(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
) -> bool:
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if causal and mask is None and query.shape[2] > 1:
        return False
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1)):
        return False
    biased = any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux", "cache"))
    same = query.shape[:2] == key.shape[:2] and query.shape[-1] == value.shape[-1]
    return same and not biased and query.dtype == key.dtype == value.dtype
