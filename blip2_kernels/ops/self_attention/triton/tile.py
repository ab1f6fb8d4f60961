"""How the rows of one sample become one tile, and who sees whom inside it.

A pass has at most two parts, which never see each other:

- the joint part: the queries, and the text of a bidirectional or causal segment behind them;
- the unimodal part: the text of a unimodal segment alone.

Positions of a part count its queries first; its text begins at the next multiple of eight, so that eight
neighbouring columns share one Philox call. The rows in between do not exist.
"""

import triton
import triton.language as tl

from ...triton_primitives import keep_bits, keep_tile

ORDINAL_MASK = tl.constexpr((1 << 10) - 1)
"""Low bits of a row key: the row's place among its sample's tokens (see `layout.row_keys`)."""


@triton.jit
def text_begin(queries):
    """Position at which a part's text begins."""
    return (queries + 7) // 8 * 8


@triton.jit
def extent(sample, queries, offsets_ptr, TEXT: tl.constexpr):
    """Positions of a part: one past the last row that exists."""
    end = queries
    if TEXT:
        count = tl.load(offsets_ptr + sample + 1) - tl.load(offsets_ptr + sample)
        end = tl.where(count > 0, text_begin(queries) + count, queries)
    return end


@triton.jit
def rows_at(position, sample, queries, text_start, offsets_ptr, TEXT: tl.constexpr, WIDE: tl.constexpr):
    """The row of the buffer at each position (int64 if WIDE), and whether there is one."""
    row = sample * queries + position
    exists = position < queries
    if TEXT:
        first = tl.load(offsets_ptr + sample)
        count = tl.load(offsets_ptr + sample + 1) - first
        ordinal = position - text_begin(queries)
        row = tl.where(ordinal >= 0, text_start + first + ordinal, row)
        exists = exists | ((ordinal >= 0) & (ordinal < count))
    if WIDE:
        row = row.to(tl.int64)
    return row, exists


@triton.jit
def real_at(position, sample, queries, lengths_ptr, TEXT: tl.constexpr):
    """Whether the row at each position is a query or a real token: only these are attended to."""
    real = position < queries
    if TEXT:
        ordinal = position - text_begin(queries)
        real = real | ((ordinal >= 0) & (ordinal < tl.load(lengths_ptr + sample)))
    return real


@triton.jit
def allowed_at(m, n, m_key, n_key, n_real, q_queries, kv_queries, CAUSAL: tl.constexpr):
    """Who may attend to whom, [M, N] or, where all rows see the same, [1, N].

    Args:
        m, n: positions of the attending and the attended rows.
        m_key, n_key: their row keys.
        n_real: whether the attended row is real.
        q_queries, kv_queries: queries a sample on each side.
        CAUSAL: queries see queries; text sees the queries and the text up to itself.
    """
    allowed = n_real[None, :]
    if CAUSAL:
        from_text = (m >= text_begin(q_queries))[:, None]
        before = (n_key & ORDINAL_MASK)[None, :] <= (m_key & ORDINAL_MASK)[:, None]
        allowed = allowed & ((n < kv_queries)[None, :] | (from_text & before))
    return allowed


@triton.jit
def load_tile(ptr, rows, there, row_stride, head_offset, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Head slices of rows, [rows, BLOCK_D]; 0 where there is no row and beyond HEAD_DIM."""
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(ptr + head_offset + (rows * row_stride)[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(
    ptr, tile, rows, there, row_stride, head_offset, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The inverse of `load_tile`, rounded to the pointer's dtype."""
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    place = ptr + head_offset + (rows * row_stride)[:, None] + d[None, :]
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def keep_at(
    start, m_key, sample, head, kv_queries, kv_start, kv_offsets_ptr, kv_keys_ptr,
    dropout_key_ptr, level, place, TEXT: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which probabilities of the columns from `start` on survive dropout, [M, BLOCK_N].

    The ordinals of a part's rows count up from a multiple of eight, so the first of eight columns names the
    group; `supports` refuses layouts of which that is not true.
    """
    n = start + tl.arange(0, BLOCK_N // 8) * 8
    rows, there = rows_at(n, sample, kv_queries, kv_start, kv_offsets_ptr, TEXT, WIDE)
    groups = tl.load(kv_keys_ptr + rows, mask=there, other=0) >> 3
    return keep_tile(keep_bits(dropout_key_ptr, m_key[:, None], groups[None, :], head, place, level), BLOCK_N)
