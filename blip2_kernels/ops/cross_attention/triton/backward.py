"""Backward kernels of query-to-image cross-attention.

With P the probabilities, M the dropout mask with its scale, and G the gradient of out = (P * M) V:

    dV = (P * M)^T G
    dP = (G V^T) * M
    dS = P * (dP - rowsum(G * out)) * scale
    dQ = dS K,  dK = dS^T Q

Where all rows that look at an image are one tile, one program does all of it in one pass over the image.
Where they are several, each tile's program computes dQ, and dK and dV belong to programs of their own, which
go over the rows in order. An image that nobody looks at has dK = dV = 0. No atomics: every element has one
owner.
"""

import triton
import triton.language as tl

from ...triton_primitives import split, split_dot
from .tile import keep_at, load_tile, sample_rows, store_tile, tile_of, tokens_at


@triton.jit
def _rows(
    q_ptr, grad_ptr, out_ptr, rest_ptr, lse_ptr, row_keys_ptr, sample, query, there, head, heads,
    q_sample, q_query, q_head, grad_sample, grad_query, grad_head,
    NUM_QUERIES: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a tile of stacked rows brings: q, grad, rowsum(grad * out), log2-sum-exp2 and row keys."""
    q = load_tile(q_ptr, sample * q_sample + query * q_query + head * q_head, there, HEAD_DIM, BLOCK_D)
    grad_place = sample * grad_sample + query * grad_query + head * grad_head
    grad = load_tile(grad_ptr, grad_place, there, HEAD_DIM, BLOCK_D)
    place = (sample * NUM_QUERIES + query) * heads + head
    out = load_tile(out_ptr, place * HEAD_DIM, there, HEAD_DIM, BLOCK_D).to(tl.float32)
    if rest_ptr is not None:
        out += load_tile(rest_ptr, place * HEAD_DIM, there, HEAD_DIM, BLOCK_D).to(tl.float32)
    delta = tl.sum(grad.to(tl.float32) * out, 1)
    lse = tl.load(lse_ptr + place, mask=there, other=float("inf"))
    m_key = query
    if DROPOUT:
        m_key = tl.load(row_keys_ptr + sample * NUM_QUERIES + query, mask=there, other=0)
    return q, grad, delta, lse, m_key


@triton.jit
def _scores(
    q, grad, delta, lse, m_key, k, v, visible, start, head, dropout_key_ptr,
    scale, scale_log2, keep_scale, level, place,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dropped probabilities [M, N] in the inputs' dtype, and the gradient of the scores [M, N], split."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    probs = tl.where(visible[None, :], tl.exp2(scores - lse[:, None]), 0.0)
    d_probs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    dropped = probs
    if DROPOUT:
        keep = keep_at(start, m_key, head, dropout_key_ptr, level, place, BLOCK_N)
        dropped = tl.where(keep, probs * keep_scale, 0.0)
        d_probs = tl.where(keep, d_probs * keep_scale, 0.0)
    high, low = split(probs * (d_probs - delta[:, None]) * scale, q.dtype)
    return dropped.to(q.dtype), high, low


@triton.jit(do_not_specialize=["tokens", "level", "place"])
def backward_rows_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, rest_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
    order_ptr, start_ptr, tile_image_ptr, visible_ptr, row_keys_ptr, dropout_key_ptr,
    tokens, heads, q_sample, q_query, q_head,
    k_image, k_token, k_head, v_image, v_token, v_head, grad_sample, grad_query, grad_head,
    scale, scale_log2, keep_scale, level, place,
    NUM_QUERIES: tl.constexpr, GROUPED: tl.constexpr, VISIBLE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cross-attention of stacked query rows to the tokens of their image, backward.

    Grid: (tiles * heads,). A program owns dq of BLOCK_M stacked rows of one image and one head and, where
    these are all the rows that look at the image, dk and dv of the image and head too. It reads its rows of
    q, grad and out once, and the image's keys and values once. dq, dk and dv are contiguous.
    """
    tile = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    if WIDE:
        head = head.to(tl.int64)
    image, first, rows = tile_of(tile, start_ptr, tile_image_ptr, GROUPED, NUM_QUERIES, BLOCK_M)
    if image < 0:
        return
    sample, query, there = sample_rows(
        first, rows, image, order_ptr, start_ptr, GROUPED, NUM_QUERIES, WIDE, BLOCK_M
    )
    q, grad, delta, lse, m_key = _rows(
        q_ptr, grad_ptr, out_ptr, rest_ptr, lse_ptr, row_keys_ptr, sample, query, there, head, heads,
        q_sample, q_query, q_head, grad_sample, grad_query, grad_head,
        NUM_QUERIES, DROPOUT, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    k_ptr += image.to(tl.int64) * k_image + head * k_head
    v_ptr += image.to(tl.int64) * v_image + head * v_head
    dk_ptr += (image.to(tl.int64) * tokens * heads + head) * HEAD_DIM
    dv_ptr += (image.to(tl.int64) * tokens * heads + head) * HEAD_DIM
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        n, visible = tokens_at(start, image, tokens, visible_ptr, VISIBLE, WIDE, BLOCK_N)
        k = load_tile(k_ptr, n * k_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_tile(v_ptr, n * v_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        dropped, high, low = _scores(
            q, grad, delta, lse, m_key, k, v, visible, start, head, dropout_key_ptr,
            scale, scale_log2, keep_scale, level, place, DROPOUT, PRECISION, BLOCK_N,
        )  # fmt: skip
        dq = split_dot(high, low, k, dq, PRECISION)
        if rows <= BLOCK_M:
            dv = tl.dot(tl.trans(dropped), grad, input_precision=PRECISION)  # [N, D]
            store_tile(dv_ptr, dv, n * heads * HEAD_DIM, n < tokens, HEAD_DIM, BLOCK_D)
            dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            dk = split_dot(tl.trans(high), tl.trans(low), q, dk, PRECISION)
            store_tile(dk_ptr, dk, n * heads * HEAD_DIM, n < tokens, HEAD_DIM, BLOCK_D)
    place_of_m = ((sample * NUM_QUERIES + query) * heads + head) * HEAD_DIM
    store_tile(dq_ptr, dq, place_of_m, there, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "splits", "level", "place"])
def backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, out_ptr, rest_ptr, lse_ptr, dk_ptr, dv_ptr,
    order_ptr, start_ptr, visible_ptr, row_keys_ptr, dropout_key_ptr,
    tokens, heads, splits, q_sample, q_query, q_head,
    k_image, k_token, k_head, v_image, v_token, v_head, grad_sample, grad_query, grad_head,
    scale, scale_log2, keep_scale, level, place,
    NUM_QUERIES: tl.constexpr, GROUPED: tl.constexpr, VISIBLE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr, OWNED_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of images that several tiles of rows look at, or nobody.

    Grid: (images * splits * heads,). A program owns dk and dv of one image and head, of every `splits`-th
    block of BLOCK_N tokens, and goes over the image's rows in order. It leaves at once where up to OWNED_ROWS
    rows look at the image: those are one tile of `backward_rows_kernel`, which did the work.
    """
    head = tl.program_id(0) % heads
    if WIDE:
        head = head.to(tl.int64)
    image = tl.program_id(0) // heads // splits
    split = tl.program_id(0) // heads % splits
    rows = NUM_QUERIES
    if GROUPED:
        rows = (tl.load(start_ptr + image + 1) - tl.load(start_ptr + image)) * NUM_QUERIES
    if (rows > 0) & (rows <= OWNED_ROWS):
        return
    k_ptr += image.to(tl.int64) * k_image + head * k_head
    v_ptr += image.to(tl.int64) * v_image + head * v_head
    dk_ptr += (image.to(tl.int64) * tokens * heads + head) * HEAD_DIM
    dv_ptr += (image.to(tl.int64) * tokens * heads + head) * HEAD_DIM
    for start in range(split * BLOCK_N, tokens, splits * BLOCK_N):
        n, visible = tokens_at(start, image, tokens, visible_ptr, VISIBLE, WIDE, BLOCK_N)
        k = load_tile(k_ptr, n * k_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_tile(v_ptr, n * v_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for first in range(0, rows, BLOCK_M):
            sample, query, there = sample_rows(
                first, rows, image, order_ptr, start_ptr, GROUPED, NUM_QUERIES, WIDE, BLOCK_M
            )
            q, grad, delta, lse, m_key = _rows(
                q_ptr, grad_ptr, out_ptr, rest_ptr, lse_ptr, row_keys_ptr, sample, query, there, head, heads,
                q_sample, q_query, q_head, grad_sample, grad_query, grad_head,
                NUM_QUERIES, DROPOUT, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            dropped, high, low = _scores(
                q, grad, delta, lse, m_key, k, v, visible, start, head, dropout_key_ptr,
                scale, scale_log2, keep_scale, level, place, DROPOUT, PRECISION, BLOCK_N,
            )  # fmt: skip
            dv = tl.dot(tl.trans(dropped), grad, dv, input_precision=PRECISION)
            dk = split_dot(tl.trans(high), tl.trans(low), q, dk, PRECISION)
        store_tile(dv_ptr, dv, n * heads * HEAD_DIM, n < tokens, HEAD_DIM, BLOCK_D)
        store_tile(dk_ptr, dk, n * heads * HEAD_DIM, n < tokens, HEAD_DIM, BLOCK_D)
