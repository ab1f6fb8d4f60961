"""Forward kernel: dot products of a tile of texts and queries, and at once their maximum over the queries."""

import triton
import triton.language as tl

NUMBER = tl.constexpr(1 << 30)
"""Added to the rank of a query whose score is a number: a NaN comes before every one of them."""

NOT_BEST = tl.constexpr((1 << 31) - 1)


@triton.jit
def _tile_of(program, images, texts, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr):
    """The image tile and text tile of a program: GROUP image tiles walk along the texts side by side."""
    image_tiles = tl.cdiv(images, BLOCK_I)
    per_group = GROUP * tl.cdiv(texts, BLOCK_T)
    first = program // per_group * GROUP
    side_by_side = tl.minimum(image_tiles - first, GROUP)
    place = program % per_group
    return first + place % side_by_side, place // side_by_side


@triton.jit(do_not_specialize=["images", "texts"])
def forward_kernel(
    image_ptr, text_ptr, out_ptr, index_ptr,
    images, texts, channels, image_stride, query_stride, text_stride,
    QUERIES: tl.constexpr, EVEN_CHANNELS: tl.constexpr, KEEP_INDEX: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Similarity of images and texts, forward.

    Grid: (image tiles * text tiles,). A program owns out and index of BLOCK_I images and BLOCK_T texts. It
    reads all queries of its images, BLOCK_Q at a time, and its texts once for each such block; what it writes
    is the best score and, with KEEP_INDEX, the first of the queries that have it.
    """
    image_tile, text_tile = _tile_of(tl.program_id(0), images, texts, BLOCK_I, BLOCK_T, GROUP)
    row = tl.arange(0, BLOCK_I * BLOCK_Q)  # BLOCK_Q queries of the first image, then of the next …
    b = image_tile * BLOCK_I + row // BLOCK_Q
    t = text_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    text_rows = (t.to(tl.int64) if WIDE else t) * text_stride

    best = tl.full((BLOCK_T, BLOCK_I), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK_T, BLOCK_I), tl.int32)
    for start in range(0, QUERIES, BLOCK_Q):
        q = start + row % BLOCK_Q
        image_rows = (b.to(tl.int64) if WIDE else b) * image_stride
        image_rows += (q.to(tl.int64) if WIDE else q) * query_stride
        there = (b < images) & (q < QUERIES)
        scores = tl.zeros((BLOCK_T, BLOCK_I * BLOCK_Q), tl.float32)
        for channel in range(0, channels, BLOCK_E):
            text_mask, image_mask = (t < texts)[:, None], there[None, :]
            if not EVEN_CHANNELS:
                exists = channel + e < channels
                text_mask, image_mask = text_mask & exists[None, :], image_mask & exists[:, None]
            text = tl.load(text_ptr + text_rows[:, None] + (channel + e)[None, :], mask=text_mask, other=0.0)
            image = tl.load(
                image_ptr + image_rows[None, :] + (channel + e)[:, None], mask=image_mask, other=0.0
            )
            scores = tl.dot(text, image, scores, input_precision=PRECISION)  # [T, I * Q]
        if QUERIES % BLOCK_Q != 0:
            scores = tl.where((q < QUERIES)[None, :], scores, float("-inf"))

        by_query = tl.reshape(scores, (BLOCK_T, BLOCK_I, BLOCK_Q))
        peak = tl.max(by_query, 2)  # [T, I]; of numbers only
        ordinal = (start + tl.arange(0, BLOCK_Q))[None, None, :]
        rank = tl.where(by_query == peak[:, :, None], ordinal + NUMBER, NOT_BEST)
        rank = tl.min(tl.where(by_query != by_query, ordinal, rank), 2)
        peak = tl.where(rank < NUMBER, float("nan"), peak)
        better = (peak > best) | ((peak != peak) & (best == best))
        best = tl.where(better, peak, best)
        index = tl.where(better, rank & (NUMBER - 1), index)

    images_out = image_tile * BLOCK_I + tl.arange(0, BLOCK_I)
    place = images_out.to(tl.int64)[None, :] * texts + t[:, None]
    mask = (t < texts)[:, None] & (images_out < images)[None, :]
    tl.store(out_ptr + place, best.to(out_ptr.dtype.element_ty), mask=mask)
    if KEEP_INDEX:
        tl.store(index_ptr + place, index, mask=mask)
