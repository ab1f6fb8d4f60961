"""Backend `torch`: the mask's structure as one, two or three calls of scaled_dot_product_attention."""

import itertools

import torch
from torch import Tensor

from ...checks import values_are_free
from ...layout import TokenLayout
from ...mask import AttentionMask, MaskMode
from ..dense_attention import attend_torch

QUERIES = -1


def supports(dropout: float) -> str | None:
    """None where SDPA can serve, else the reason."""
    if dropout > 0:
        return "scaled_dot_product_attention cannot take the Philox dropout mask"
    return None


def attention_blocks(mask: AttentionMask) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Which parts of the rows attend to which keys: (rows, keys), -1 for queries, i for text i."""
    if mask.modes == (MaskMode.BIDIRECTIONAL,):
        return [((QUERIES, 0), (QUERIES, 0))]
    blocks: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((QUERIES,), (QUERIES,))]
    for i, mode in enumerate(mask.modes):
        blocks.append(((i,), (i,) if mode == MaskMode.UNIMODAL else (QUERIES, i)))
    return blocks


def self_attention_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: TokenLayout,
    kv_layout: TokenLayout,
    mask: AttentionMask,
    *,
    scale: float,
) -> Tensor:
    """See `self_attention`; dropout is not served."""
    if not kv_layout.texts and not q_layout.texts:
        query = q_layout.unpack_queries(q).transpose(1, 2)
        key, value = (kv_layout.unpack_queries(t).transpose(1, 2) for t in (k, v))
        return attend_torch(query, key, value, None, scale).transpose(1, 2).flatten(0, 1)

    q_rows, kv_rows = q_layout.dense(), kv_layout.dense()
    query, key, value = q_rows.spread(q), kv_rows.spread(k), kv_rows.spread(v)
    if kv_layout.padded:
        padding = ~kv_rows.real[:, :, None, None]
        key, value = key.masked_fill(padding, 0), value.masked_fill(padding, 0)
    allowed = mask.dense(q_layout, kv_layout)[:, None]
    outputs = []
    for rows, keys in attention_blocks(mask):
        row_part, key_part = _columns(q_layout, rows), _columns(kv_layout, keys)
        block = _take(_take(allowed, row_part, 2), key_part, 3)
        queries = _take(query, row_part, 1).transpose(1, 2)
        keyed, valued = (_take(t, key_part, 1).transpose(1, 2) for t in (key, value))
        outputs.append(_attend(queries, keyed, valued, block, scale).transpose(1, 2))
    return q_rows.collect(torch.cat(outputs, dim=1))


def _attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    # Looking at the values is free on the CPU only; a mask that hides nothing would cost the fast kernel.
    full = values_are_free(allowed.device) and bool(allowed.all())
    return attend_torch(query, key, value, None if full else allowed, scale)


def _columns(layout: TokenLayout, parts: tuple[int, ...]) -> list[tuple[int, int]]:
    """(start, size) of each part among the rectangle's columns."""
    sizes = [layout.num_queries, *(text.max_length for text in layout.texts)]
    return [(sum(sizes[: part + 1]), sizes[part + 1]) for part in parts]


def _take(t: Tensor, parts: list[tuple[int, int]], dim: int) -> Tensor:
    """The columns of the parts, as a view where they are neighbours."""
    if all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(parts)):
        return t.narrow(dim, parts[0][0], sum(size for _, size in parts))
    return torch.cat([t.narrow(dim, start, size) for start, size in parts], dim)
