"""Backend `torch`: the mask's structure as one, two or three calls of scaled_dot_product_attention."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import values_are_free
from ...layout import DenseRows, TokenLayout
from ...mask import AttentionMask, MaskMode, rectangles
from ..dense_attention import attend_torch
from .kept import Kept, segment_sizes

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

    table = TABLES.of(q_layout, kv_layout, mask)
    query, key, value = table.q_rows.spread(q), table.kv_rows.spread(k), table.kv_rows.spread(v)
    if table.padding is not None:
        key, value = key.masked_fill(table.padding, 0), value.masked_fill(table.padding, 0)
    outputs = []
    for block in table.blocks:
        queries = _take(query, block.rows, 1).transpose(1, 2)
        keyed, valued = (_take(t, block.keys, 1).transpose(1, 2) for t in (key, value))
        outputs.append(attend_torch(queries, keyed, valued, block.allowed, scale).transpose(1, 2))
    return table.q_rows.collect(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1))


Columns = list[tuple[int, int]]
"""Start and size of parts of a rectangle of rows."""


@dataclass(frozen=True)
class _Block:
    """One call of scaled_dot_product_attention.

    Attributes:
        rows, keys: which columns of the query side's rectangle attend to which of the key side's.
        allowed: bool [S, 1, rows, keys], or None where nothing is hidden.
    """

    rows: Columns
    keys: Columns
    allowed: Tensor | None


@dataclass(frozen=True)
class _Table:
    """Who attends to whom between the rectangles of two layouts: the same in every layer of a pass.

    Attributes:
        q_rows, kv_rows: the rectangles.
        padding: bool [S, Lk, 1, 1], True where a key is a padding row; None where none is.
        blocks: of a mask.
    """

    q_rows: DenseRows
    kv_rows: DenseRows
    padding: Tensor | None
    blocks: tuple[_Block, ...]

    @classmethod
    def of(cls, q_layout: TokenLayout, kv_layout: TokenLayout, mask: AttentionMask) -> "_Table":
        # Looking at values is free on the CPU only; a mask that hides nothing would cost the fast kernel.
        free = values_are_free(q_layout.device)
        q_rows, kv_rows = rectangles(q_layout, kv_layout)
        padded = kv_layout.padded and not (free and bool(kv_rows.real.all()))
        padding = ~kv_rows.real[:, :, None, None] if padded else None
        allowed = mask.between(q_rows, kv_rows)[:, None]
        blocks = []
        for rows, keys in attention_blocks(mask):
            row_part, key_part = _columns(q_layout, rows), _columns(kv_layout, keys)
            block = _take(_take(allowed, row_part, 2), key_part, 3)
            blocks.append(_Block(row_part, key_part, None if free and bool(block.all()) else block))
        return cls(q_rows, kv_rows, padding, tuple(blocks))


TABLES = Kept(_Table.of)


def _columns(layout: TokenLayout, parts: tuple[int, ...]) -> Columns:
    """(start, size) of each part among the rectangle's columns."""
    sizes = segment_sizes(layout)
    return [(sum(sizes[: part + 1]), sizes[part + 1]) for part in parts]


def _take(t: Tensor, parts: Columns, dim: int) -> Tensor:
    """The columns of the parts, as a view where they are neighbours."""
    if all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(parts)):
        return t.narrow(dim, parts[0][0], sum(size for _, size in parts))
    return torch.cat([t.narrow(dim, start, size) for start, size in parts], dim)
