"""Tiles of stacked query rows, and the image tokens they look at."""

import triton
import triton.language as tl

from ...triton_primitives import LENGTHS, MASK, keep_bits, keep_tile
from .group import first_tile


@triton.jit
def tile_of(
    tile, start_ptr, tile_image_ptr, GROUPED: tl.constexpr, NUM_QUERIES: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The image of a tile (-1 for none), the first of its stacked rows here, and how many the image has."""
    if GROUPED:
        image = tl.load(tile_image_ptr + tile)
        # A tile without an image leaves right after this; until then it reads those of image 0.
        before = tl.load(start_ptr + tl.maximum(image, 0))
        rows = (tl.load(start_ptr + tl.maximum(image, 0) + 1) - before) * NUM_QUERIES
        first = (tile - first_tile(image, before, NUM_QUERIES, BLOCK_M)) * BLOCK_M
    else:
        tiles: tl.constexpr = (NUM_QUERIES + BLOCK_M - 1) // BLOCK_M
        image = tile // tiles
        rows = NUM_QUERIES
        first = (tile % tiles) * BLOCK_M
    return image, first, rows


@triton.jit
def sample_rows(
    first, rows, image, order_ptr, start_ptr,
    GROUPED: tl.constexpr, NUM_QUERIES: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sample and query (int64 if WIDE) of BLOCK_M stacked rows from `first` on, and whether there is one."""
    row = first + tl.arange(0, BLOCK_M)
    there = row < rows
    if GROUPED:
        place = tl.load(start_ptr + image) + row // NUM_QUERIES
        sample = tl.load(order_ptr + place, mask=there, other=0)
    else:
        sample = tl.zeros((BLOCK_M,), tl.int32) + image
    query = row % NUM_QUERIES
    if WIDE:
        sample, query = sample.to(tl.int64), query.to(tl.int64)
    return sample, query, there


@triton.jit
def tokens_at(
    start, image, tokens, visible_ptr, VISIBLE: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The tokens from `start` on (int64 if WIDE), and whether each exists and may be attended to."""
    n = start + tl.arange(0, BLOCK_N)
    visible = n < tokens
    if VISIBLE == LENGTHS:
        visible = visible & (n < tl.load(visible_ptr + image))
    if VISIBLE == MASK:
        mask_ptr = visible_ptr + image.to(tl.int64) * tokens
        visible = tl.load(mask_ptr + n, mask=visible, other=0) != 0
    if WIDE:
        n = n.to(tl.int64)
    return n, visible


@triton.jit
def keep_at(
    start, m_key, head, dropout_key_ptr, level, place, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Which probabilities of the tokens from `start` (a multiple of 8) on survive dropout, [M, BLOCK_N]."""
    groups = (start >> 3) + tl.arange(0, BLOCK_N // 8)
    return keep_tile(keep_bits(dropout_key_ptr, m_key[:, None], groups[None, :], head, place, level), BLOCK_N)


@triton.jit
def load_tile(ptr, offsets, there, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of HEAD_DIM neighbours at offsets, [rows, BLOCK_D]; 0 where there is none."""
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(ptr + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, tile, offsets, there, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_tile`, rounded to the pointer's dtype."""
    d = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    tl.store(ptr + offsets[:, None] + d[None, :], tile.to(ptr.dtype.element_ty), mask=mask)
