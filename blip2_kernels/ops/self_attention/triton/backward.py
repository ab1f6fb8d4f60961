"""Backward kernels of masked self-attention: one tile a sample and head, or blocks of longer samples.

With P the probabilities, M the dropout mask with its scale, and G the gradient of out = (P * M) V:

    dV = (P * M)^T G
    dP = (G V^T) * M
    dS = P * (dP - delta) * scale                 delta = rowsum(P * dP)
    dQ = dS K,  dK = dS^T Q

delta is summed from the very numbers it is subtracted from; by blocks, in a first sweep over the keys. That
it equals rowsum(G * out) is true of exact numbers only: out was summed from rounded probabilities, and where
a row sees few keys their rounding would be all that is left of the difference.

Every element of dQ, dK and dV belongs to one program, which sums it in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from ...triton_primitives import mean_of, split, split_dot
from .tile import allowed_at, extent, keep_at, load_tile, real_at, rows_at, store_tile


@triton.jit
def _slice(
    m, n, n_key, n_real, k, v, dk, dv,
    q_ptr, grad_ptr, dq_ptr, q_keys_ptr, kv_keys_ptr, q_offsets_ptr, kv_offsets_ptr, dropout_key_ptr,
    sample, head, heads, q_queries, kv_queries, q_start, kv_start,
    q_row, q_head, grad_row, grad_head, scale, scale_log2, keep_scale, level, place,
    TEXT: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attending rows m of a tile: stores their dq, returns dk and dv with what they add."""
    m_rows, m_there = rows_at(m, sample, q_queries, q_start, q_offsets_ptr, TEXT, WIDE)
    m_key = tl.load(q_keys_ptr + m_rows, mask=m_there, other=0)
    allowed = allowed_at(m, n, m_key, n_key, n_real, q_queries, kv_queries, CAUSAL)
    q = load_tile(q_ptr, m_rows, m_there, q_row, head * q_head, HEAD_DIM, BLOCK_D)  # [M, D]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
    scores = tl.where(allowed, scores, float("-inf"))
    peak = tl.max(scores, 1)
    probs = tl.exp2(scores - tl.where(peak == float("-inf"), 0.0, peak)[:, None])
    total = tl.sum(probs, 1)
    probs = probs / tl.where(total > 0, total, 1.0)[:, None]

    grad = load_tile(grad_ptr, m_rows, m_there, grad_row, head * grad_head, HEAD_DIM, BLOCK_D)  # [M, D]
    d_probs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # [M, N]
    dropped = probs
    if DROPOUT:
        keep = keep_at(
            0, m_key, sample, head, kv_queries, kv_start, kv_offsets_ptr, kv_keys_ptr, dropout_key_ptr,
            level, place, TEXT, WIDE, BLOCK_N,
        )  # fmt: skip
        dropped = tl.where(keep, probs * keep_scale, 0.0)
        d_probs = tl.where(keep, d_probs * keep_scale, 0.0)
    dv = tl.dot(tl.trans(dropped.to(grad.dtype)), grad, dv, input_precision=PRECISION)  # [N, D]

    delta = tl.sum(probs * d_probs, 1)
    high, low = split(probs * (d_probs - delta[:, None]) * scale, q.dtype)  # [M, N]
    dk = split_dot(tl.trans(high), tl.trans(low), q, dk, PRECISION)  # [N, D]
    dq = split_dot(high, low, k, tl.zeros(q.shape, tl.float32), PRECISION)  # [M, D]
    store_tile(dq_ptr, dq, m_rows, m_there, heads * HEAD_DIM, head * HEAD_DIM, HEAD_DIM, BLOCK_D)
    return dk, dv


@triton.jit
def _tile(
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr, q_keys_ptr, kv_keys_ptr,
    q_offsets_ptr, kv_offsets_ptr, lengths_ptr, dropout_key_ptr,
    sample, head, heads, q_queries, kv_queries, q_start, kv_start,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
    scale, scale_log2, keep_scale, level, place,
    TEXT: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """One part of one sample and head in one tile; see `backward_tile_kernel`."""
    n = tl.arange(0, BLOCK_N)
    n_rows, n_there = rows_at(n, sample, kv_queries, kv_start, kv_offsets_ptr, TEXT, WIDE)
    n_real = real_at(n, sample, kv_queries, lengths_ptr, TEXT)
    n_key = tl.load(kv_keys_ptr + n_rows, mask=n_there, other=0)
    k = load_tile(k_ptr, n_rows, n_real, k_row, head * k_head, HEAD_DIM, BLOCK_D)  # [N, D]
    v = load_tile(v_ptr, n_rows, n_real, v_row, head * v_head, HEAD_DIM, BLOCK_D)  # [N, D]
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if BLOCK_M <= SLICE:  # no loop: one of a single turn costs registers
        dk, dv = _slice(
            tl.arange(0, BLOCK_M), n, n_key, n_real, k, v, dk, dv,
            q_ptr, grad_ptr, dq_ptr, q_keys_ptr, kv_keys_ptr, q_offsets_ptr, kv_offsets_ptr, dropout_key_ptr,
            sample, head, heads, q_queries, kv_queries, q_start, kv_start,
            q_row, q_head, grad_row, grad_head, scale, scale_log2, keep_scale, level, place,
            TEXT, CAUSAL, DROPOUT, PRECISION, WIDE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        for first in range(0, BLOCK_M, SLICE):
            dk, dv = _slice(
                first + tl.arange(0, SLICE), n, n_key, n_real, k, v, dk, dv,
                q_ptr, grad_ptr, dq_ptr, q_keys_ptr, kv_keys_ptr, q_offsets_ptr, kv_offsets_ptr,
                dropout_key_ptr, sample, head, heads, q_queries, kv_queries, q_start, kv_start,
                q_row, q_head, grad_row, grad_head, scale, scale_log2, keep_scale, level, place,
                TEXT, CAUSAL, DROPOUT, PRECISION, WIDE, HEAD_DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    store_tile(dv_ptr, dv, n_rows, n_there, heads * HEAD_DIM, head * HEAD_DIM, HEAD_DIM, BLOCK_D)
    store_tile(dk_ptr, dk, n_rows, n_there, heads * HEAD_DIM, head * HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "q_queries", "kv_queries", "q_start", "kv_start", "text_q_start", "text_kv_start", "level", "place",
    ]
)  # fmt: skip
def backward_tile_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr, q_keys_ptr, kv_keys_ptr,
    q_offsets_ptr, kv_offsets_ptr, lengths_ptr,
    text_q_offsets_ptr, text_kv_offsets_ptr, text_lengths_ptr, dropout_key_ptr,
    heads, q_queries, kv_queries, q_start, kv_start, text_q_start, text_kv_start,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
    scale, scale_log2, keep_scale, level, place,
    JOINT: tl.constexpr, TEXT: tl.constexpr, CAUSAL: tl.constexpr, UNIMODAL: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TEXT_M: tl.constexpr, TEXT_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Masked self-attention, backward, for samples whose part fits one tile.

    Grid: (samples * heads, parts: the joint one, then the unimodal text). A program owns dq, dk and dv of one
    part of one sample and head, and reads the part's q, k, v and grad once, attending rows in slices of
    SLICE. The softmax is computed again from q and k: neither out nor a log-sum-exp is read.
    """
    sample = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    if WIDE:
        head = head.to(tl.int64)
    if JOINT:
        if tl.program_id(1) == 0:
            _tile(
                q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr, q_keys_ptr, kv_keys_ptr,
                q_offsets_ptr, kv_offsets_ptr, lengths_ptr, dropout_key_ptr,
                sample, head, heads, q_queries, kv_queries, q_start, kv_start,
                q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
                scale, scale_log2, keep_scale, level, place,
                TEXT, CAUSAL, DROPOUT, PRECISION, WIDE, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
                SLICE,
            )  # fmt: skip
    if UNIMODAL:
        if tl.program_id(1) == tl.num_programs(1) - 1:
            _tile(
                q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr, q_keys_ptr, kv_keys_ptr,
                text_q_offsets_ptr, text_kv_offsets_ptr, text_lengths_ptr, dropout_key_ptr,
                sample, head, heads, 0, 0, text_q_start, text_kv_start,
                q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
                scale, scale_log2, keep_scale, level, place,
                True, False, DROPOUT, PRECISION, WIDE, HEAD_DIM, TEXT_M, TEXT_N, BLOCK_D,
                SLICE,
            )  # fmt: skip


@triton.jit
def _probs(
    m, m_key, q, grad, lse, n, n_key, n_real, k, v, start,
    sample, head, q_queries, kv_queries, kv_start, kv_offsets_ptr, kv_keys_ptr, dropout_key_ptr,
    scale_log2, keep_scale, level, place,
    TEXT: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Probabilities [M, N] of the attended rows from `start` on, the same after dropout, their gradient."""
    allowed = allowed_at(m, n, m_key, n_key, n_real, q_queries, kv_queries, CAUSAL)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    probs = tl.where(allowed, tl.exp2(scores - lse[:, None]), 0.0)
    d_probs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    dropped = probs
    if DROPOUT:
        keep = keep_at(
            start, m_key, sample, head, kv_queries, kv_start, kv_offsets_ptr, kv_keys_ptr, dropout_key_ptr,
            level, place, TEXT, WIDE, BLOCK_N,
        )  # fmt: skip
        dropped = tl.where(keep, probs * keep_scale, 0.0)
        d_probs = tl.where(keep, d_probs * keep_scale, 0.0)
    return probs, dropped, d_probs


@triton.jit
def _d_rows(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, q_keys_ptr, kv_keys_ptr,
    q_offsets_ptr, kv_offsets_ptr, lengths_ptr, dropout_key_ptr,
    sample, head, heads, block, q_queries, kv_queries, q_start, kv_start,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
    scale, scale_log2, keep_scale, level, place,
    TEXT: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq of one block of attending rows, over all attended ones."""
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows, m_there = rows_at(m, sample, q_queries, q_start, q_offsets_ptr, TEXT, WIDE)
    m_key = tl.load(q_keys_ptr + m_rows, mask=m_there, other=0)
    q = load_tile(q_ptr, m_rows, m_there, q_row, head * q_head, HEAD_DIM, BLOCK_D)  # [M, D]
    grad = load_tile(grad_ptr, m_rows, m_there, grad_row, head * grad_head, HEAD_DIM, BLOCK_D)  # [M, D]
    lse = tl.load(lse_ptr + m_rows * heads + head, mask=m_there, other=float("inf"))
    columns = extent(sample, kv_queries, kv_offsets_ptr, TEXT)
    delta = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_rows, n_there = rows_at(n, sample, kv_queries, kv_start, kv_offsets_ptr, TEXT, WIDE)
        n_real = real_at(n, sample, kv_queries, lengths_ptr, TEXT)
        n_key = tl.load(kv_keys_ptr + n_rows, mask=n_there, other=0)
        k = load_tile(k_ptr, n_rows, n_real, k_row, head * k_head, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_tile(v_ptr, n_rows, n_real, v_row, head * v_head, HEAD_DIM, BLOCK_D)  # [N, D]
        probs, _, d_probs = _probs(
            m, m_key, q, grad, lse, n, n_key, n_real, k, v, start,
            sample, head, q_queries, kv_queries, kv_start, kv_offsets_ptr, kv_keys_ptr, dropout_key_ptr,
            scale_log2, keep_scale, level, place, TEXT, CAUSAL, DROPOUT, PRECISION, WIDE, BLOCK_N,
        )  # fmt: skip
        delta += tl.sum(probs * d_probs, 1)
        total += tl.sum(probs, 1)
    delta = mean_of(delta, total)
    tl.store(delta_ptr + m_rows * heads + head, delta, mask=m_there)

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, columns, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_rows, n_there = rows_at(n, sample, kv_queries, kv_start, kv_offsets_ptr, TEXT, WIDE)
        n_real = real_at(n, sample, kv_queries, lengths_ptr, TEXT)
        n_key = tl.load(kv_keys_ptr + n_rows, mask=n_there, other=0)
        k = load_tile(k_ptr, n_rows, n_real, k_row, head * k_head, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_tile(v_ptr, n_rows, n_real, v_row, head * v_head, HEAD_DIM, BLOCK_D)  # [N, D]
        probs, _, d_probs = _probs(
            m, m_key, q, grad, lse, n, n_key, n_real, k, v, start,
            sample, head, q_queries, kv_queries, kv_start, kv_offsets_ptr, kv_keys_ptr, dropout_key_ptr,
            scale_log2, keep_scale, level, place, TEXT, CAUSAL, DROPOUT, PRECISION, WIDE, BLOCK_N,
        )  # fmt: skip
        high, low = split(probs * (d_probs - delta[:, None]) * scale, q.dtype)
        dq = split_dot(high, low, k, dq, PRECISION)
    store_tile(dq_ptr, dq, m_rows, m_there, heads * HEAD_DIM, head * HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit
def _d_keys(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, q_keys_ptr, kv_keys_ptr,
    q_offsets_ptr, kv_offsets_ptr, lengths_ptr, dropout_key_ptr,
    sample, head, heads, block, q_queries, kv_queries, q_start, kv_start,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
    scale, scale_log2, keep_scale, level, place,
    TEXT: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of attended rows, over all attending ones."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_rows, n_there = rows_at(n, sample, kv_queries, kv_start, kv_offsets_ptr, TEXT, WIDE)
    n_real = real_at(n, sample, kv_queries, lengths_ptr, TEXT)
    n_key = tl.load(kv_keys_ptr + n_rows, mask=n_there, other=0)
    k = load_tile(k_ptr, n_rows, n_real, k_row, head * k_head, HEAD_DIM, BLOCK_D)  # [N, D]
    v = load_tile(v_ptr, n_rows, n_real, v_row, head * v_head, HEAD_DIM, BLOCK_D)  # [N, D]
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, extent(sample, q_queries, q_offsets_ptr, TEXT), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        m_rows, m_there = rows_at(m, sample, q_queries, q_start, q_offsets_ptr, TEXT, WIDE)
        m_key = tl.load(q_keys_ptr + m_rows, mask=m_there, other=0)
        q = load_tile(q_ptr, m_rows, m_there, q_row, head * q_head, HEAD_DIM, BLOCK_D)  # [M, D]
        grad = load_tile(grad_ptr, m_rows, m_there, grad_row, head * grad_head, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + m_rows * heads + head, mask=m_there, other=float("inf"))
        delta = tl.load(delta_ptr + m_rows * heads + head, mask=m_there, other=0.0)
        probs, dropped, d_probs = _probs(
            m, m_key, q, grad, lse, n, n_key, n_real, k, v, block * BLOCK_N,
            sample, head, q_queries, kv_queries, kv_start, kv_offsets_ptr, kv_keys_ptr, dropout_key_ptr,
            scale_log2, keep_scale, level, place, TEXT, CAUSAL, DROPOUT, PRECISION, WIDE, BLOCK_N,
        )  # fmt: skip
        dv = tl.dot(tl.trans(dropped.to(grad.dtype)), grad, dv, input_precision=PRECISION)
        high, low = split(probs * (d_probs - delta[:, None]) * scale, q.dtype)
        dk = split_dot(tl.trans(high), tl.trans(low), q, dk, PRECISION)
    store_tile(dk_ptr, dk, n_rows, n_there, heads * HEAD_DIM, head * HEAD_DIM, HEAD_DIM, BLOCK_D)
    store_tile(dv_ptr, dv, n_rows, n_there, heads * HEAD_DIM, head * HEAD_DIM, HEAD_DIM, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "joint_blocks", "q_queries", "kv_queries", "q_start", "kv_start", "text_q_start", "text_kv_start",
        "level", "place",
    ]
)  # fmt: skip
def backward_rows_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, q_keys_ptr, kv_keys_ptr,
    q_offsets_ptr, kv_offsets_ptr, lengths_ptr,
    text_q_offsets_ptr, text_kv_offsets_ptr, text_lengths_ptr, dropout_key_ptr,
    heads, joint_blocks, q_queries, kv_queries, q_start, kv_start, text_q_start, text_kv_start,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
    scale, scale_log2, keep_scale, level, place,
    JOINT: tl.constexpr, TEXT: tl.constexpr, CAUSAL: tl.constexpr, UNIMODAL: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Masked self-attention of samples of any length, backward: dq.

    Grid: (samples * heads, blocks of attending rows: those of the joint part, then of the unimodal text). A
    program owns dq and delta of one block of one sample and head, and loops over the keys and values of its
    part twice, with the forward's log2-sum-exp2.
    """
    sample = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    if WIDE:
        head = head.to(tl.int64)
    block = tl.program_id(1)
    if JOINT:
        if block < joint_blocks:
            _d_rows(
                q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, q_keys_ptr, kv_keys_ptr,
                q_offsets_ptr, kv_offsets_ptr, lengths_ptr, dropout_key_ptr,
                sample, head, heads, block, q_queries, kv_queries, q_start, kv_start,
                q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
                scale, scale_log2, keep_scale, level, place,
                TEXT, CAUSAL, DROPOUT, PRECISION, WIDE, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    if UNIMODAL:
        if block >= joint_blocks:
            _d_rows(
                q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, q_keys_ptr, kv_keys_ptr,
                text_q_offsets_ptr, text_kv_offsets_ptr, text_lengths_ptr, dropout_key_ptr,
                sample, head, heads, block - joint_blocks, 0, 0, text_q_start, text_kv_start,
                q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
                scale, scale_log2, keep_scale, level, place,
                True, False, DROPOUT, PRECISION, WIDE, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "joint_blocks", "q_queries", "kv_queries", "q_start", "kv_start", "text_q_start", "text_kv_start",
        "level", "place",
    ]
)  # fmt: skip
def backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, q_keys_ptr, kv_keys_ptr,
    q_offsets_ptr, kv_offsets_ptr, lengths_ptr,
    text_q_offsets_ptr, text_kv_offsets_ptr, text_lengths_ptr, dropout_key_ptr,
    heads, joint_blocks, q_queries, kv_queries, q_start, kv_start, text_q_start, text_kv_start,
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
    scale, scale_log2, keep_scale, level, place,
    JOINT: tl.constexpr, TEXT: tl.constexpr, CAUSAL: tl.constexpr, UNIMODAL: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Masked self-attention of samples of any length, backward: dk and dv.

    Grid: (samples * heads, blocks of attended rows: those of the joint part, then of the unimodal text). A
    program owns dk and dv of one block of one sample and head, and loops over the rows of its part, with the
    delta that `backward_rows_kernel` left.
    """
    sample = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    if WIDE:
        head = head.to(tl.int64)
    block = tl.program_id(1)
    if JOINT:
        if block < joint_blocks:
            _d_keys(
                q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
                q_keys_ptr, kv_keys_ptr, q_offsets_ptr, kv_offsets_ptr, lengths_ptr, dropout_key_ptr,
                sample, head, heads, block, q_queries, kv_queries, q_start, kv_start,
                q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
                scale, scale_log2, keep_scale, level, place,
                TEXT, CAUSAL, DROPOUT, PRECISION, WIDE, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    if UNIMODAL:
        if block >= joint_blocks:
            _d_keys(
                q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
                q_keys_ptr, kv_keys_ptr,
                text_q_offsets_ptr, text_kv_offsets_ptr, text_lengths_ptr, dropout_key_ptr,
                sample, head, heads, block - joint_blocks, 0, 0, text_q_start, text_kv_start,
                q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head,
                scale, scale_log2, keep_scale, level, place,
                True, False, DROPOUT, PRECISION, WIDE, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
