"""Backward kernels: the gradient of each score goes to one query and one text.

    d_image[b, q] = sum over the t whose best query in b is q of grad[b, t] text[t]
    d_text[t]     = sum over b of grad[b, t] image[b, the best query of b for t]

Every element belongs to one program, which sums it in a fixed order: no atomics.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["images", "texts"])
def image_gradient_kernel(
    grad_ptr, text_ptr, index_ptr, d_image_ptr,
    images, texts, text_stride,
    QUERIES: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of the images, as a product of texts and of a matrix with one entry a column and image.

    Grid: (tiles of BLOCK_I images, blocks of BLOCK_Q queries, tiles of BLOCK_E channels). A program owns that
    tile of d_image and reads grad and index of its images, and the channels of all texts.
    """
    row = tl.arange(0, BLOCK_I * BLOCK_Q)  # BLOCK_Q queries of the first image, then of the next …
    b = tl.program_id(0) * BLOCK_I + row // BLOCK_Q
    q = tl.program_id(1) * BLOCK_Q + row % BLOCK_Q
    e = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    image = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    query = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = (e < CHANNELS)[None, :]

    d_image = tl.zeros((BLOCK_I * BLOCK_Q, BLOCK_E), tl.float32)
    for start in range(0, texts, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        place = image.to(tl.int64)[:, None] * texts + t[None, :]  # [I, T]
        mask = (image < images)[:, None] & (t < texts)[None, :]
        index = tl.load(index_ptr + place, mask=mask, other=-1)
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0)
        weight = tl.where(index[:, None, :] == query[None, :, None], grad[:, None, :], 0.0)  # [I, Q, T]
        weight = tl.reshape(weight.to(grad.dtype), (BLOCK_I * BLOCK_Q, BLOCK_T))
        text_rows = (t.to(tl.int64) if WIDE else t) * text_stride
        text = tl.load(
            text_ptr + text_rows[:, None] + e[None, :], mask=(t < texts)[:, None] & exists, other=0.0
        )
        d_image = tl.dot(weight, text, d_image, input_precision=PRECISION)  # [I * Q, E]

    place = ((b.to(tl.int64) * QUERIES + q) * CHANNELS)[:, None] + e[None, :]
    mask = ((b < images) & (q < QUERIES))[:, None] & exists
    tl.store(d_image_ptr + place, d_image.to(d_image_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["images", "texts"])
def text_gradient_kernel(
    grad_ptr, image_ptr, index_ptr, d_text_ptr,
    images, texts, image_stride, query_stride,
    QUERIES: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of the texts: the best query of every image, gathered and summed.

    Grid: (texts, tiles of BLOCK_E channels). A program owns that part of a row of d_text and reads a column
    of grad and of index, and one query of every image.
    """
    t = tl.program_id(0)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    exists = e < CHANNELS
    partial = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    for start in range(0, images, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        there = b < images
        place = b.to(tl.int64) * texts + t
        index = tl.load(index_ptr + place, mask=there, other=0)
        there = there & (index >= 0) & (index < QUERIES)
        grad = tl.load(grad_ptr + place, mask=there, other=0.0).to(tl.float32)
        rows = (b.to(tl.int64) if WIDE else b) * image_stride
        rows += (index.to(tl.int64) if WIDE else index) * query_stride
        mask = there[:, None] & exists[None, :]
        image = tl.load(image_ptr + rows[:, None] + e[None, :], mask=mask, other=0.0)  # [B, E]
        partial += grad[:, None] * image.to(tl.float32)
    d_text = tl.sum(partial, 0).to(d_text_ptr.dtype.element_ty)
    tl.store(d_text_ptr + t.to(tl.int64) * CHANNELS + e, d_text, mask=exists)
