"""Forward kernel of masked self-attention."""

import triton
import triton.language as tl

from .tile import allowed_at, extent, keep_at, load_tile, real_at, rows_at, store_tile


@triton.jit
def _part(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_keys_ptr, kv_keys_ptr,
    q_offsets_ptr, kv_offsets_ptr, lengths_ptr, dropout_key_ptr,
    sample, head, heads, block, q_queries, kv_queries, q_start, kv_start,
    q_row, q_head, k_row, k_head, v_row, v_head,
    scale_log2, keep_scale, level, place,
    TEXT: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, HEAD_DIM: tl.constexpr, ONE_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of rows of one part of one sample and head; see `forward_kernel`."""
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    m_rows, m_there = rows_at(m, sample, q_queries, q_start, q_offsets_ptr, TEXT, WIDE)
    m_key = tl.load(q_keys_ptr + m_rows, mask=m_there, other=0)
    q = load_tile(q_ptr, m_rows, m_there, q_row, head * q_head, HEAD_DIM, BLOCK_D)  # [M, D]

    columns = extent(sample, kv_queries, kv_offsets_ptr, TEXT)
    if ONE_TILE:
        columns = BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, columns, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_rows, n_there = rows_at(n, sample, kv_queries, kv_start, kv_offsets_ptr, TEXT, WIDE)
        n_real = real_at(n, sample, kv_queries, lengths_ptr, TEXT)
        k = load_tile(k_ptr, n_rows, n_real, k_row, head * k_head, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_tile(v_ptr, n_rows, n_real, v_row, head * v_head, HEAD_DIM, BLOCK_D)  # [N, D]
        n_key = tl.load(kv_keys_ptr + n_rows, mask=n_there, other=0)
        allowed = allowed_at(m, n, m_key, n_key, n_real, q_queries, kv_queries, CAUSAL)

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
        scores = tl.where(allowed, scores, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen nothing yet has -inf as its peak; -inf minus -inf is not 0.
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        probs = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(largest - safe)
        total = total * fade + tl.sum(probs, 1)
        if DROPOUT:
            keep = keep_at(
                start, m_key, sample, head, kv_queries, kv_start, kv_offsets_ptr, kv_keys_ptr,
                dropout_key_ptr, level, place, TEXT, WIDE, BLOCK_N,
            )  # fmt: skip
            probs = tl.where(keep, probs, 0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        largest = peak

    seen = total > 0
    share = tl.where(seen, keep_scale / tl.where(seen, total, 1.0), 0.0)
    out = acc * share[:, None]
    store_tile(out_ptr, out, m_rows, m_there, heads * HEAD_DIM, head * HEAD_DIM, HEAD_DIM, BLOCK_D)
    if lse_ptr is not None:
        lse = tl.where(seen, largest + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
        tl.store(lse_ptr + m_rows * heads + head, lse, mask=m_there)


@triton.jit(
    do_not_specialize=[
        "joint_blocks", "q_queries", "kv_queries", "q_start", "kv_start", "text_q_start", "text_kv_start",
        "level", "place",
    ]
)  # fmt: skip
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_keys_ptr, kv_keys_ptr,
    q_offsets_ptr, kv_offsets_ptr, lengths_ptr,
    text_q_offsets_ptr, text_kv_offsets_ptr, text_lengths_ptr, dropout_key_ptr,
    heads, joint_blocks, q_queries, kv_queries, q_start, kv_start, text_q_start, text_kv_start,
    q_row, q_head, k_row, k_head, v_row, v_head,
    scale_log2, keep_scale, level, place,
    JOINT: tl.constexpr, TEXT: tl.constexpr, CAUSAL: tl.constexpr, UNIMODAL: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TEXT_M: tl.constexpr, TEXT_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Masked self-attention, forward.

    Grid: (samples * heads, blocks of attending rows: those of the joint part, then of the unimodal text).
    A program owns one block of output rows of one sample and head. It reads those rows of q and all rows of
    k and v that its part of the sample has, once; with ONE_TILE these are a single tile and the loop is gone.
    It writes the rows of out and, where there is an lse_ptr, their log2-sum-exp2 (inf for a row that sees
    nothing).

    Strides are in elements, of a row and of a head; the last dimension is contiguous, and out wholly so.
    """
    sample = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    if WIDE:
        head = head.to(tl.int64)
    block = tl.program_id(1)
    if JOINT:
        if block < joint_blocks:
            _part(
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_keys_ptr, kv_keys_ptr,
                q_offsets_ptr, kv_offsets_ptr, lengths_ptr, dropout_key_ptr,
                sample, head, heads, block, q_queries, kv_queries, q_start, kv_start,
                q_row, q_head, k_row, k_head, v_row, v_head,
                scale_log2, keep_scale, level, place,
                TEXT, CAUSAL, DROPOUT, PRECISION, WIDE, HEAD_DIM, ONE_TILE, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    if UNIMODAL:
        if block >= joint_blocks:
            _part(
                q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_keys_ptr, kv_keys_ptr,
                text_q_offsets_ptr, text_kv_offsets_ptr, text_lengths_ptr, dropout_key_ptr,
                sample, head, heads, block - joint_blocks, 0, 0, text_q_start, text_kv_start,
                q_row, q_head, k_row, k_head, v_row, v_head,
                scale_log2, keep_scale, level, place,
                True, False, DROPOUT, PRECISION, WIDE, HEAD_DIM, ONE_TILE, TEXT_M, TEXT_N, BLOCK_D,
            )  # fmt: skip
