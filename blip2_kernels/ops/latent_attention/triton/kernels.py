"""The kernels of latent attention: scores, softmax, output.

Rows are too wide (1408 channels) for one program to hold scores and output of a tile at once, so three
kernels run one after the other. The first and the last are products whose every tile is a program of its own:
one image alone fills a GPU.
"""

import triton
import triton.language as tl

from ...triton_primitives import LENGTHS, MASK


@triton.jit
def _image_of(sample, index_ptr, images, INDEXED: tl.constexpr):
    """The image a sample looks at, the nearest where there is no such image; and whether there is none."""
    image, wrong = sample, False
    if INDEXED:
        index = tl.load(index_ptr + sample)
        image = tl.minimum(tl.maximum(index, 0), images - 1)
        wrong = index != image
    return image.to(tl.int64), wrong


@triton.jit
def _end_of(image, tokens, visible_ptr, VISIBLE: tl.constexpr):
    """Behind the last token that may be visible."""
    end = tokens
    if VISIBLE == LENGTHS:
        end = tl.minimum(end, tl.load(visible_ptr + image))
    return end


@triton.jit
def _visible_at(n, end, image, tokens, visible_ptr, VISIBLE: tl.constexpr):
    """Whether each token exists and may be attended to."""
    visible = n < end
    if VISIBLE == MASK:
        visible = tl.load(visible_ptr + image * tokens + n, mask=visible, other=0) != 0
    return visible


@triton.jit(do_not_specialize=["images", "tokens", "rows"])
def scores_kernel(
    q_ptr, features_ptr, scores_ptr, index_ptr, visible_ptr, error_ptr,
    images, tokens, rows, columns, width, q_sample, q_row, image_stride, token_stride, scale_log2,
    INDEXED: tl.constexpr, VISIBLE: tl.constexpr, EVEN_WIDTH: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """q features^T * scale_log2, fp32; -inf where a token is hidden or does not exist.

    Grid: (samples * row tiles * token tiles,). A program owns scores [BLOCK_R, BLOCK_N] of one sample and
    reads those rows of q and, unless all are hidden, those tokens of its image. The first program of a sample
    with a wrong image_index counts it.
    """
    row_tiles, token_tiles = tl.cdiv(rows, BLOCK_R), tl.cdiv(columns, BLOCK_N)
    sample = tl.program_id(0) // (row_tiles * token_tiles)
    tile = tl.program_id(0) % (row_tiles * token_tiles)
    image, wrong = _image_of(sample, index_ptr, images, INDEXED)
    if INDEXED:
        if wrong & (tile == 0):
            tl.atomic_add(error_ptr, 1)
    r = tile // token_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tile % token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    end = _end_of(image, tokens, visible_ptr, VISIBLE)
    visible = _visible_at(n, end, image, tokens, visible_ptr, VISIBLE)
    place = r.to(tl.int64) if WIDE else r
    q_rows = q_ptr + sample.to(tl.int64) * q_sample + (place * q_row)[:, None]
    token_columns = (
        features_ptr + image * image_stride + ((n.to(tl.int64) if WIDE else n) * token_stride)[None, :]
    )

    scores = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    channels = tl.where(tl.max(visible.to(tl.int32), 0) > 0, width, 0)
    for channel in range(0, channels, BLOCK_K):
        # What a hidden token holds does not matter here: its column is dropped.
        q_mask, token_mask = (r < rows)[:, None], (n < end)[None, :]
        if not EVEN_WIDTH:
            exists = channel + k < width
            q_mask, token_mask = q_mask & exists[None, :], token_mask & exists[:, None]
        q = tl.load(q_rows + (channel + k)[None, :], mask=q_mask, other=0.0)  # [R, K]
        token = tl.load(token_columns + (channel + k)[:, None], mask=token_mask, other=0.0)  # [K, N]
        scores = tl.dot(q, token, scores, input_precision=PRECISION)  # [R, N]

    scores = tl.where(visible[None, :], scores * scale_log2, float("-inf"))
    out = scores_ptr + sample.to(tl.int64) * rows * columns + (place * columns)[:, None] + n[None, :]
    tl.store(out, scores, mask=(r < rows)[:, None] & (n < columns)[None, :])


@triton.jit(do_not_specialize=["rows"])
def softmax_kernel(scores_ptr, probs_ptr, rows, columns, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Probabilities from scores in units of log 2, rounded to the pointer's dtype; 0 in a row of -inf alone.

    Grid: (tiles of BLOCK_R rows,), the rows of all samples. A program owns its rows of probs and reads those
    of scores twice, BLOCK_N columns at a time.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    n = tl.arange(0, BLOCK_N)
    place = (r.to(tl.int64) * columns)[:, None] + n[None, :]
    there = (r < rows)[:, None]
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    base = tl.zeros((BLOCK_R,), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        mask = there & (start + n < columns)[None, :]
        scores = tl.load(scores_ptr + place + start, mask=mask, other=float("-inf"))  # [R, N]
        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        peak = higher
    total = tl.where(total == 0, 1.0, total)
    for start in range(0, columns, BLOCK_N):
        mask = there & (start + n < columns)[None, :]
        scores = tl.load(scores_ptr + place + start, mask=mask, other=float("-inf"))
        probs = tl.exp2(scores - base[:, None]) / total[:, None]
        tl.store(probs_ptr + place + start, probs.to(probs_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images", "tokens", "rows"])
def output_kernel(
    probs_ptr, features_ptr, out_ptr, index_ptr, visible_ptr,
    images, tokens, rows, columns, width, image_stride, token_stride,
    INDEXED: tl.constexpr, VISIBLE: tl.constexpr, EVEN_WIDTH: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """probs features, summed in fp32.

    Grid: (samples * row tiles * channel tiles,). A program owns out [BLOCK_R, BLOCK_W] of one sample and
    reads those rows of probs, and those channels of its image's visible tokens.
    """
    row_tiles, channel_tiles = tl.cdiv(rows, BLOCK_R), tl.cdiv(width, BLOCK_W)
    sample = tl.program_id(0) // (row_tiles * channel_tiles)
    tile = tl.program_id(0) % (row_tiles * channel_tiles)
    image, _ = _image_of(sample, index_ptr, images, INDEXED)
    r = tile // channel_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    w = tile % channel_tiles * BLOCK_W + tl.arange(0, BLOCK_W)
    place = r.to(tl.int64) if WIDE else r
    probs_rows = probs_ptr + sample.to(tl.int64) * rows * columns + (place * columns)[:, None]
    token_rows = features_ptr + image * image_stride

    out = tl.zeros((BLOCK_R, BLOCK_W), tl.float32)
    end = _end_of(image, tokens, visible_ptr, VISIBLE)
    for start in range(0, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        # 0 * NaN would leak out of hidden tokens, so they are not read. Columns behind the last one are 0.
        mask = _visible_at(n, end, image, tokens, visible_ptr, VISIBLE)[:, None]
        if not EVEN_WIDTH:
            mask = mask & (w < width)[None, :]
        probs = tl.load(probs_rows + n[None, :], mask=(r < rows)[:, None], other=0.0)  # [R, N]
        offsets = ((n.to(tl.int64) if WIDE else n) * token_stride)[:, None] + w[None, :]
        token = tl.load(token_rows + offsets, mask=mask, other=0.0)  # [N, W]
        out = tl.dot(probs, token, out, input_precision=PRECISION)  # [R, W]

    store = out_ptr + sample.to(tl.int64) * rows * width + (place * width)[:, None] + w[None, :]
    tl.store(store, out.to(out_ptr.dtype.element_ty), mask=(r < rows)[:, None] & (w < width)[None, :])
