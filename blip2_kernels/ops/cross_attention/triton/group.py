"""Which samples look at which image: found on the device, without a synchronisation.

The query rows of all samples that look at one image are stacked into one list, sample by sample, and cut into
tiles of BLOCK_M rows: keys and values are then read once a tile, not once a sample. Where n_i samples look at
image i, and o_i at the images before it, image i has ceil(n_i * Q / BLOCK_M) tiles, and they begin at tile

    floor(o_i * Q / BLOCK_M) + i.

These ranges never overlap (a floor of a sum is at least the sum of the floors, and a ceiling at most one more
than a floor), so no sum over images is needed to find them, and all tiles of S samples and I images lie below
floor(S * Q / BLOCK_M) + I. Tiles in the gaps have nothing to do.
"""

import triton
import triton.language as tl


@triton.jit
def first_tile(image, before, NUM_QUERIES: tl.constexpr, BLOCK_M: tl.constexpr):
    """The first tile of an image, `before` samples looking at the images before it."""
    return before * NUM_QUERIES // BLOCK_M + image


@triton.jit(do_not_specialize=["samples", "images"])
def group_kernel(
    image_index_ptr, order_ptr, start_ptr, tile_image_ptr, error_ptr, samples, images,
    NUM_QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sort the samples by the image they look at.

    Grid: (images,). Program i owns what belongs to image i, and reads image_index [samples] once. It writes
    the numbers of its samples, ascending, to order [samples]; where they begin there to start [images + 1]
    (the last program writes the end too); and i to tile_image at its tiles, -1 behind them up to those of the
    next image. A sample that points at no image is given the nearest one, and program 0 sets the error flag.
    """
    image = tl.program_id(0)
    before, count, wrong = 0, 0, 0
    for first in range(0, samples, BLOCK_S):
        sample = first + tl.arange(0, BLOCK_S)
        index = tl.load(image_index_ptr + sample, mask=sample < samples, other=0)
        nearest = tl.minimum(tl.maximum(index, 0), images - 1)
        wrong += tl.sum((index != nearest).to(tl.int32))
        nearest = tl.where(sample < samples, nearest, images)
        before += tl.sum((nearest < image).to(tl.int32))
        count += tl.sum((nearest == image).to(tl.int32))
    if (image == 0) & (wrong > 0):
        tl.store(error_ptr, wrong)

    place = before
    for first in range(0, samples, BLOCK_S):
        sample = first + tl.arange(0, BLOCK_S)
        index = tl.load(image_index_ptr + sample, mask=sample < samples, other=0)
        nearest = tl.minimum(tl.maximum(index, 0), images - 1)
        mine = ((sample < samples) & (nearest == image)).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(mine, 0) - 1, sample, mask=mine != 0)
        place += tl.sum(mine)

    tl.store(start_ptr + image, before)
    if image == images - 1:
        tl.store(start_ptr + images, place)

    tile = first_tile(image, before, NUM_QUERIES, BLOCK_M)
    used = tile + tl.cdiv(count * NUM_QUERIES, BLOCK_M)
    after = first_tile(image + 1, before + count, NUM_QUERIES, BLOCK_M)
    if image == images - 1:
        after = samples * NUM_QUERIES // BLOCK_M + images
    for first in range(tile, after, BLOCK_S):
        tiles = first + tl.arange(0, BLOCK_S)
        tl.store(tile_image_ptr + tiles, tl.where(tiles < used, image, -1), mask=tiles < after)
