"""Backward kernels of query-to-image cross-attention.

With P the probabilities, M the dropout mask with its scale, and G the gradient of out = (P * M) V:

    dV = (P * M)^T G
    dP = (G V^T) * M
    dS = P * (dP - delta) * scale                 delta = rowsum(P * dP)
    dQ = dS K,  dK = dS^T Q

delta is summed from the very numbers it is subtracted from, in a first sweep over the keys. That it equals
rowsum(G * out) is true of exact numbers only: out was summed from rounded probabilities, and where a row sees
few keys their rounding would be all that is left of the difference.

Where all rows that look at an image are one tile, one program does all of it in one pass over the image.
Where they are several, each tile's program computes dQ, and dK and dV belong to programs of their own, which
go over the rows in order. An image that nobody looks at has dK = dV = 0. No atomics: every element has one
owner.
"""

import triton
import triton.language as tl

from ...triton_primitives import LENGTHS, mean_of, split, split_dot
from .tile import keep_at, load_tile, sample_rows, store_tile, tile_of, tokens_at


@triton.jit
def _rows(
    q_ptr, grad_ptr, lse_ptr, row_keys_ptr, sample, query, there, head, heads,
    q_sample, q_query, q_head, grad_sample, grad_query, grad_head,
    NUM_QUERIES: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a tile of stacked rows brings: q, grad, log2-sum-exp2 and row keys."""
    q = load_tile(q_ptr, sample * q_sample + query * q_query + head * q_head, there, HEAD_DIM, BLOCK_D)
    grad_place = sample * grad_sample + query * grad_query + head * grad_head
    grad = load_tile(grad_ptr, grad_place, there, HEAD_DIM, BLOCK_D)
    place = (sample * NUM_QUERIES + query) * heads + head
    lse = tl.load(lse_ptr + place, mask=there, other=float("inf"))
    m_key = query
    if DROPOUT:
        m_key = tl.load(row_keys_ptr + sample * NUM_QUERIES + query, mask=there, other=0)
    return q, grad, lse, m_key


@triton.jit
def _probs(
    q, grad, lse, m_key, k, v, visible, start, head, dropout_key_ptr,
    scale_log2, keep_scale, level, place,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Probabilities [M, N], the same after dropout, and their gradient [M, N]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    probs = tl.where(visible[None, :], tl.exp2(scores - lse[:, None]), 0.0)
    d_probs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    dropped = probs
    if DROPOUT:
        keep = keep_at(start, m_key, head, dropout_key_ptr, level, place, BLOCK_N)
        dropped = tl.where(keep, probs * keep_scale, 0.0)
        d_probs = tl.where(keep, d_probs * keep_scale, 0.0)
    return probs, dropped, d_probs


@triton.jit(do_not_specialize=["tokens", "level", "place"])
def backward_rows_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
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
    these are all the rows that look at the image, dk and dv of the image and head too; where they are not, it
    writes delta, float32, for `backward_keys_kernel`. It reads its rows of q and grad once, and the image's
    keys and values twice, the second time from the cache. dq, dk and dv are contiguous.
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
    q, grad, lse, m_key = _rows(
        q_ptr, grad_ptr, lse_ptr, row_keys_ptr, sample, query, there, head, heads,
        q_sample, q_query, q_head, grad_sample, grad_query, grad_head,
        NUM_QUERIES, DROPOUT, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    k_ptr += image.to(tl.int64) * k_image + head * k_head
    v_ptr += image.to(tl.int64) * v_image + head * v_head
    dk_ptr += (image.to(tl.int64) * tokens * heads + head) * HEAD_DIM
    dv_ptr += (image.to(tl.int64) * tokens * heads + head) * HEAD_DIM
    seen = tokens
    if VISIBLE == LENGTHS:
        seen = tl.minimum(tokens, tl.load(visible_ptr + image))
    delta = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Nothing is moved out of this loop: it would take registers all through the next one.
    for start in tl.range(0, seen, BLOCK_N, disable_licm=True):
        n, visible = tokens_at(start, image, tokens, visible_ptr, VISIBLE, WIDE, BLOCK_N)
        k = load_tile(k_ptr, n * k_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_tile(v_ptr, n * v_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        probs, _, d_probs = _probs(
            q, grad, lse, m_key, k, v, visible, start, head, dropout_key_ptr,
            scale_log2, keep_scale, level, place, DROPOUT, PRECISION, BLOCK_N,
        )  # fmt: skip
        delta += tl.sum(probs * d_probs, 1)
        total += tl.sum(probs, 1)
    delta = mean_of(delta, total)
    if rows > BLOCK_M:
        tl.store(delta_ptr + (sample * NUM_QUERIES + query) * heads + head, delta, mask=there)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        n, visible = tokens_at(start, image, tokens, visible_ptr, VISIBLE, WIDE, BLOCK_N)
        k = load_tile(k_ptr, n * k_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_tile(v_ptr, n * v_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        probs, dropped, d_probs = _probs(
            q, grad, lse, m_key, k, v, visible, start, head, dropout_key_ptr,
            scale_log2, keep_scale, level, place, DROPOUT, PRECISION, BLOCK_N,
        )  # fmt: skip
        high, low = split(probs * (d_probs - delta[:, None]) * scale, q.dtype)
        dq = split_dot(high, low, k, dq, PRECISION)
        if rows <= BLOCK_M:
            dv = tl.dot(tl.trans(dropped.to(q.dtype)), grad, input_precision=PRECISION)  # [N, D]
            store_tile(dv_ptr, dv, n * heads * HEAD_DIM, n < tokens, HEAD_DIM, BLOCK_D)
            dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
            dk = split_dot(tl.trans(high), tl.trans(low), q, dk, PRECISION)
            store_tile(dk_ptr, dk, n * heads * HEAD_DIM, n < tokens, HEAD_DIM, BLOCK_D)
    place_of_m = ((sample * NUM_QUERIES + query) * heads + head) * HEAD_DIM
    store_tile(dq_ptr, dq, place_of_m, there, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "splits", "level", "place"])
def backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
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
    turn = tl.program_id(0) // heads % splits
    rows = NUM_QUERIES
    if GROUPED:
        rows = (tl.load(start_ptr + image + 1) - tl.load(start_ptr + image)) * NUM_QUERIES
    if (rows > 0) & (rows <= OWNED_ROWS):
        return
    k_ptr += image.to(tl.int64) * k_image + head * k_head
    v_ptr += image.to(tl.int64) * v_image + head * v_head
    dk_ptr += (image.to(tl.int64) * tokens * heads + head) * HEAD_DIM
    dv_ptr += (image.to(tl.int64) * tokens * heads + head) * HEAD_DIM
    for start in range(turn * BLOCK_N, tokens, splits * BLOCK_N):
        n, visible = tokens_at(start, image, tokens, visible_ptr, VISIBLE, WIDE, BLOCK_N)
        k = load_tile(k_ptr, n * k_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_tile(v_ptr, n * v_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for first in range(0, rows, BLOCK_M):
            sample, query, there = sample_rows(
                first, rows, image, order_ptr, start_ptr, GROUPED, NUM_QUERIES, WIDE, BLOCK_M
            )
            q, grad, lse, m_key = _rows(
                q_ptr, grad_ptr, lse_ptr, row_keys_ptr, sample, query, there, head, heads,
                q_sample, q_query, q_head, grad_sample, grad_query, grad_head,
                NUM_QUERIES, DROPOUT, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            delta_place = (sample * NUM_QUERIES + query) * heads + head
            delta = tl.load(delta_ptr + delta_place, mask=there, other=0.0)
            probs, dropped, d_probs = _probs(
                q, grad, lse, m_key, k, v, visible, start, head, dropout_key_ptr,
                scale_log2, keep_scale, level, place, DROPOUT, PRECISION, BLOCK_N,
            )  # fmt: skip
            high, low = split(probs * (d_probs - delta[:, None]) * scale, q.dtype)
            dv = tl.dot(tl.trans(dropped.to(q.dtype)), grad, dv, input_precision=PRECISION)
            dk = split_dot(tl.trans(high), tl.trans(low), q, dk, PRECISION)
        store_tile(dv_ptr, dv, n * heads * HEAD_DIM, n < tokens, HEAD_DIM, BLOCK_D)
        store_tile(dk_ptr, dk, n * heads * HEAD_DIM, n < tokens, HEAD_DIM, BLOCK_D)
