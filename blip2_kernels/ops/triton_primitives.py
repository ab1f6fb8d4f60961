"""What the Triton kernels share: dropout by Philox, means, products of a tile that is not rounded."""

import triton
import triton.language as tl
from triton.language.random import philox_impl

from . import image_arguments

LOG2_E = tl.constexpr(1.4426950408889634)
"""exp(x) = exp2(LOG2_E * x): folded into the scale of the scores."""

LENGTHS, MASK = tl.constexpr(image_arguments.LENGTHS), tl.constexpr(image_arguments.MASK)


GATHER_FROM = tl.constexpr(256)
"""Bytes of a tile from which on `keep_tile` gathers them. A broadcast lets the compiler compute Philox again
for every element, in the layout of the scores: three times the products, and 30 registers more in a tile of
64 x 64. Triton 3.6 cannot gather from a tile of fewer elements than a program has threads, 256 at most."""


@triton.jit
def keep_bits(key_ptr, rows, groups, head, place, level):
    """Which of eight neighbouring elements survive, as the bits of a byte: the contract of `ops.philox`.

    Args:
        key_ptr: int64 Philox key.
        rows: int32 [M, 1], row keys of the attending rows.
        groups: int32 [1, G], name >> 3 of the attended rows or image tokens.
        head: int32 number of the head.
        place: layer * 8 + site.
        level: 16-bit threshold below which an element is dropped.

    Returns:
        int32 [M, G]; bit l says that lane l is kept.
    """
    key = tl.load(key_ptr)
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1 = tl.broadcast(rows.to(tl.uint32), groups.to(tl.uint32))
    zero = c0 ^ c0
    w0, w1, w2, w3 = philox_impl(c0, c1, zero + head.to(tl.uint32), zero + place.to(tl.uint32), low, high, 10)
    limit = level.to(tl.uint32)
    return (_two_bits(w0, limit) | (_two_bits(w1, limit) << 2) | (_two_bits(w2, limit) << 4)) | (
        _two_bits(w3, limit) << 6
    )


@triton.jit
def _two_bits(word, limit):
    low = ((word & 0xFFFF) >= limit).to(tl.int32)
    return low | (((word >> 16) >= limit).to(tl.int32) << 1)


@triton.jit
def keep_tile(bits, COLUMNS: tl.constexpr):
    """Spread bytes [M, COLUMNS // 8] of `keep_bits` to booleans [M, COLUMNS], eight neighbours a byte."""
    ROWS: tl.constexpr = bits.shape[0]
    GROUPS: tl.constexpr = COLUMNS // 8
    column = tl.arange(0, COLUMNS)
    if ROWS * GROUPS >= GATHER_FROM:
        group = tl.broadcast_to((column >> 3)[None, :], (ROWS, COLUMNS))
        spread = tl.gather(bits, group, 1)
    else:
        spread = tl.broadcast_to(bits[:, :, None], (ROWS, GROUPS, 8)).reshape(ROWS, COLUMNS)
    return ((spread >> (column & 7)[None, :]) & 1) != 0


@triton.jit
def mean_of(weighted, total):
    """weighted / total, 0 where total is 0: what probabilities that were computed from a log-sum-exp weigh.

    Its rounding scales all of a row's probabilities alike, by up to a millionth in fp32. A mean does not have
    that error, a plain weighted sum does, and is then subtracted from numbers of its own size.
    """
    return weighted / tl.where(total > 0, total, 1.0)


@triton.jit
def split(tile, DTYPE: tl.constexpr):
    """A float32 tile as two of DTYPE, what rounding gives and what it leaves: 16 bits or more of it.

    The gradient of the scores is what needs this. Plain PyTorch computes and multiplies it in fp32; rounded
    to bf16 it puts gradients of q and k past twice plain PyTorch's error in one random case of a hundred.
    """
    high = tile.to(DTYPE)
    return high, (tile - high.to(tl.float32)).to(DTYPE)


@triton.jit
def split_dot(high, low, other, total, PRECISION: tl.constexpr):
    """total + (high + low) @ other, of a `split` tile: two products where it is of half precision."""
    if high.dtype != tl.float32:
        total = tl.dot(low, other, total, input_precision=PRECISION)
    return tl.dot(high, other, total, input_precision=PRECISION)
