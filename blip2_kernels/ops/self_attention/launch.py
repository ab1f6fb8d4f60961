"""Tiles, warps and stages of the self-attention kernels, as data.

A sample is one tile while its rows fit; longer samples go by blocks. What is chosen depends on the longest
sample's length only through its power-of-two bucket, so that a sample's result does not depend on its
neighbours' exact lengths.
"""

from functools import cache
from typing import NamedTuple

import torch

from ..launching import BLACKWELL, SMALLEST_TILE, WARPS_ALONE, Config, LaunchTable, power_of_two


class Tiles(NamedTuple):
    """Rows of a part's tile on each side: attending and attended."""

    rows: int
    keys: int


def tile_rows(queries: int, longest_text: int) -> int:
    """Rows of the power-of-two tile that holds the queries and a text of the longest's bucket."""
    text = power_of_two(longest_text) if longest_text else 0
    # The text begins at a multiple of eight behind the queries.
    begin = -(-queries // 8) * 8 if text else queries
    return max(SMALLEST_TILE, power_of_two(begin + text))


def one_tile_rows(dtype: torch.dtype, head_dim: int) -> int:
    """Rows of the largest single tile: what the backward holds in registers."""
    if dtype == torch.float32:
        return 32 if head_dim <= 64 else 16
    return 128 if head_dim <= 64 else 64


ONE_TILE_WARPS = {16: 1, 32: 2, 64: 4, 128: 8}
"""By the longer side of the larger tile: about a fixed number of scores a thread."""


@cache
def one_tile_config(joint: Tiles, unimodal: Tiles, dtype: torch.dtype) -> Config:
    """The configuration of the kernels for samples that are one tile: the tile is theirs, not a choice."""
    warps = 4 if dtype == torch.float32 else ONE_TILE_WARPS[max(*joint, *unimodal)]
    blocks = {"BLOCK_M": joint.rows, "BLOCK_N": joint.keys, "TEXT_M": unimodal.rows, "TEXT_N": unimodal.keys}
    return Config.of(warps, 1, **blocks)


_WHOLE_SLICE = dict.fromkeys(WARPS_ALONE, 32) | dict.fromkeys(BLACKWELL, 64)
"""Rows of the largest half-precision tile whose backward takes all attending rows at once."""


@cache
def one_tile_backward(tile: Config, dtype: torch.dtype, head_dim: int, architecture: int) -> Config:
    """The same for the backward, which takes the tile's attending rows in slices of SLICE: what has a score
    for each is in registers for one slice at a time."""
    slice_rows, warps = max(tile["BLOCK_M"], tile["TEXT_M"]), tile.num_warps
    if dtype == torch.float32:
        slice_rows = SMALLEST_TILE
    elif head_dim > 64:
        warps *= 2
    elif slice_rows > _WHOLE_SLICE.get(architecture, 128):
        slice_rows = SMALLEST_TILE
    return Config.of(warps, tile.num_stages, SLICE=slice_rows, **dict(tile.blocks))


def block_key(dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """What the tables of the blocked kernels are indexed by."""
    return "fp32" if dtype == torch.float32 else "half", "narrow" if head_dim <= 64 else "wide"


def _forward(rows: int, keys: int, warps: int, stages: int) -> Config:
    return Config.of(warps, stages, BLOCK_M=rows, BLOCK_N=keys, TEXT_M=rows, TEXT_N=keys)


def _backward(rows: int, keys: int, warps: int, stages: int) -> Config:
    return Config.of(warps, stages, BLOCK_M=rows, BLOCK_N=keys)


# In half precision the compiler spills no registers of these on NVIDIA's GPUs, in Triton 3.6 or in 3.9, with
# dropout or without; in fp32 it may put 32 bytes aside, outside innermost loops, for one more program
# (`tests/kernels/budget.py`).
# fp32 products, which have no tensor cores, keep whole rows of their operands in registers: eight warps share
# them where four would spill.
FORWARD = LaunchTable(
    {
        ("half", "narrow"): (_forward(64, 32, 4, 2), _forward(32, 32, 4, 2)),
        ("half", "wide"): (_forward(64, 32, 4, 2), _forward(32, 32, 4, 2)),
        ("fp32", "narrow"): (_forward(32, 16, 4, 1), _forward(16, 16, 8, 1)),
        ("fp32", "wide"): (_forward(16, 16, 8, 1),),
    }
)
BACKWARD = LaunchTable(
    {
        ("half", "narrow"): (_backward(64, 32, 4, 1), _backward(32, 32, 4, 1)),
        ("half", "wide"): (_backward(32, 32, 8, 1),),
        ("fp32", "narrow"): (_backward(32, 16, 4, 1), _backward(16, 16, 8, 1)),
        ("fp32", "wide"): (_backward(16, 16, 8, 1),),
    },
    # Each warp multiplies what it holds in registers there.
    {
        number: {
            ("half", "wide"): (_backward(32, 32, 4, 1),),
        }
        for number in WARPS_ALONE
    }
    | {
        number: {
            ("half", "narrow"): (_backward(64, 32, 8, 1), _backward(16, 16, 4, 1)),
            ("half", "wide"): (_backward(32, 64, 8, 1), _backward(32, 32, 4, 1)),
        }
        for number in BLACKWELL
    },
)
