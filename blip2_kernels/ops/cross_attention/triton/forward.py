"""Forward kernels of query-to-image cross-attention."""

import triton
import triton.language as tl

from ...triton_primitives import LENGTHS
from .tile import keep_at, load_tile, sample_rows, store_tile, tile_of, tokens_at


@triton.jit
def _chunk(
    q, m_key, k_ptr, v_ptr, visible_ptr, dropout_key_ptr, image, head, chunk, tokens,
    k_token, v_token, scale_log2, level, place,
    VISIBLE: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attend to one chunk of tokens, from a fresh start; k_ptr and v_ptr point at their image and head.

    Returns:
        The unnormalised sum [M, D], the largest score [M] (base 2) and the sum of probabilities [M].
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    end = tl.minimum((chunk + 1) * CHUNK, tokens)
    if VISIBLE == LENGTHS:
        end = tl.minimum(end, tl.load(visible_ptr + image))
    for start in range(chunk * CHUNK, end, BLOCK_N):
        n, visible = tokens_at(start, image, tokens, visible_ptr, VISIBLE, WIDE, BLOCK_N)
        k = load_tile(k_ptr, n * k_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        v = load_tile(v_ptr, n * v_token, visible, HEAD_DIM, BLOCK_D)  # [N, D]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [M, N]
        scores = tl.where(visible[None, :], scores, float("-inf"))
        peak = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen nothing yet has -inf as its peak; -inf minus -inf is not 0.
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        probs = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(largest - safe)
        total = total * fade + tl.sum(probs, 1)
        if DROPOUT:
            keep = keep_at(start, m_key, head, dropout_key_ptr, level, place, BLOCK_N)
            probs = tl.where(keep, probs, 0.0)
        acc = tl.dot(probs.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        largest = peak
    return acc, largest, total


@triton.jit
def _merge(acc, largest, total, chunk_acc, chunk_largest, chunk_total):
    """Add a chunk to what came before it. Explicit fused products: the same bits wherever it is compiled."""
    peak = tl.maximum(largest, chunk_largest)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    fade, chunk_fade = tl.exp2(largest - safe), tl.exp2(chunk_largest - safe)
    total = tl.fma(total, fade, chunk_total * chunk_fade)
    acc = tl.fma(acc, tl.broadcast_to(fade[:, None], acc.shape), chunk_acc * chunk_fade[:, None])
    return acc, peak, total


@triton.jit
def _write(
    out_ptr, lse_ptr, acc, largest, total, sample, query, there, head, heads, keep_scale,
    NUM_QUERIES: tl.constexpr, LSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Normalise and write rows of out, and with LSE their log2-sum-exp2 (inf for a row that sees nothing)."""
    seen = total > 0
    share = tl.where(seen, keep_scale / tl.where(seen, total, 1.0), 0.0)
    place = (sample * NUM_QUERIES + query) * heads + head
    out = acc * share[:, None]
    store_tile(out_ptr, out, place * HEAD_DIM, there, HEAD_DIM, BLOCK_D)
    if LSE:
        lse = tl.where(seen, largest + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
        tl.store(lse_ptr + place, lse, mask=there)


@triton.jit(do_not_specialize=["tokens", "level", "place"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, part_ptr, part_stats_ptr,
    order_ptr, start_ptr, tile_image_ptr, visible_ptr, row_keys_ptr, dropout_key_ptr,
    tokens, heads, q_sample, q_query, q_head,
    k_image, k_token, k_head, v_image, v_token, v_head, scale_log2, keep_scale, level, place,
    NUM_QUERIES: tl.constexpr, GROUPED: tl.constexpr, VISIBLE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr, LSE: tl.constexpr,
    CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cross-attention of stacked query rows to the tokens of their image, forward.

    Grid: (tiles * heads, chunks if SPLIT else 1). A program owns BLOCK_M stacked rows of one image and one
    head, and reads the image's keys and values of that head once, in chunks of CHUNK tokens, each attended to
    from a fresh start and merged in order. With SPLIT it owns a single chunk of them, and writes the sum
    [BLOCK_M, D], the largest score and the sum of probabilities to part_ptr and part_stats_ptr for
    `merge_kernel`. Tiles without an image leave at once.
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
    q = load_tile(
        q_ptr, sample * q_sample + query * q_query + head * q_head, there, HEAD_DIM, BLOCK_D
    )  # [M, D]
    m_key = query
    if DROPOUT:
        m_key = tl.load(row_keys_ptr + sample * NUM_QUERIES + query, mask=there, other=0)
    k_ptr += image.to(tl.int64) * k_image + head * k_head
    v_ptr += image.to(tl.int64) * v_image + head * v_head

    chunk = tl.program_id(1)
    acc, largest, total = _chunk(
        q, m_key, k_ptr, v_ptr, visible_ptr, dropout_key_ptr, image, head, chunk, tokens,
        k_token, v_token, scale_log2, level, place,
        VISIBLE, DROPOUT, PRECISION, WIDE, HEAD_DIM, CHUNK, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if SPLIT:
        part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + chunk
        m = tl.arange(0, BLOCK_M)
        rows_of_part = part * BLOCK_M + m
        tl.store(part_ptr + rows_of_part[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], acc)
        tl.store(part_stats_ptr + part * 2 * BLOCK_M + m, largest)
        tl.store(part_stats_ptr + (part * 2 + 1) * BLOCK_M + m, total)
    else:
        if not ONE_CHUNK:
            for later in range(1, tl.cdiv(tokens, CHUNK)):
                chunk_acc, chunk_largest, chunk_total = _chunk(
                    q, m_key, k_ptr, v_ptr, visible_ptr, dropout_key_ptr, image, head, later, tokens,
                    k_token, v_token, scale_log2, level, place,
                    VISIBLE, DROPOUT, PRECISION, WIDE, HEAD_DIM, CHUNK, BLOCK_N, BLOCK_D,
                )  # fmt: skip
                acc, largest, total = _merge(acc, largest, total, chunk_acc, chunk_largest, chunk_total)
        _write(
            out_ptr, lse_ptr, acc, largest, total, sample, query, there, head, heads, keep_scale,
            NUM_QUERIES, LSE, HEAD_DIM, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["chunks"])
def merge_kernel(
    out_ptr, lse_ptr, part_ptr, part_stats_ptr, order_ptr, start_ptr, tile_image_ptr,
    heads, chunks, keep_scale,
    NUM_QUERIES: tl.constexpr, GROUPED: tl.constexpr, WIDE: tl.constexpr, HEAD_DIM: tl.constexpr,
    LSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the chunks that `forward_kernel` left, in their order.

    Grid: (tiles * heads,). A program owns BLOCK_M stacked rows of one image and one head.
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
    part = tl.program_id(0).to(tl.int64) * chunks
    acc, largest, total = _load_part(part_ptr, part_stats_ptr, part, BLOCK_M, BLOCK_D)
    for later in range(1, chunks):
        chunk_acc, chunk_largest, chunk_total = _load_part(
            part_ptr, part_stats_ptr, part + later, BLOCK_M, BLOCK_D
        )
        acc, largest, total = _merge(acc, largest, total, chunk_acc, chunk_largest, chunk_total)
    _write(
        out_ptr, lse_ptr, acc, largest, total, sample, query, there, head, heads, keep_scale,
        NUM_QUERIES, LSE, HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _load_part(part_ptr, part_stats_ptr, part, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    m = tl.arange(0, BLOCK_M)
    rows = part * BLOCK_M + m
    acc = tl.load(part_ptr + rows[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])
    largest = tl.load(part_stats_ptr + part * 2 * BLOCK_M + m)
    total = tl.load(part_stats_ptr + (part * 2 + 1) * BLOCK_M + m)
    return acc, largest, total
