"""Tiles, warps and stages of the self-attention kernels, as data.

A sample is one tile while its rows fit; longer samples go by blocks. What is chosen depends on the longest
sample's length only through its power-of-two bucket, so that a sample's result does not depend on its
neighbours' exact lengths.
"""

from typing import NamedTuple

import torch

from ..launching import Config

SMALLEST_TILE = 16
"""`tl.dot` takes no less."""


class Tiles(NamedTuple):
    """Rows of a part's tile on each side: attending and attended."""

    rows: int
    keys: int


def one_tile_rows(dtype: torch.dtype, head_dim: int) -> int:
    """Rows of the largest single tile: what the backward holds in registers without spilling."""
    if dtype == torch.float32:
        return 64 if head_dim <= 64 else 32
    return 128 if head_dim <= 64 else 64


def tile_rows(queries: int, longest_text: int) -> int:
    """Rows of the power-of-two tile that holds the queries and a text of the longest's bucket."""
    text = power_of_two(longest_text) if longest_text else 0
    # The text begins at a multiple of eight behind the queries.
    begin = -(-queries // 8) * 8 if text else queries
    return max(SMALLEST_TILE, power_of_two(begin + text))


def power_of_two(n: int) -> int:
    """The smallest power of two >= n; 1 for n <= 1."""
    return 1 << max(n - 1, 0).bit_length()


def one_tile_configs(
    architecture: int, dtype: torch.dtype, joint: Tiles, unimodal: Tiles, *, backward: bool
) -> tuple[Config, ...]:
    """Configurations for samples that are one tile, best first."""
    largest = max(joint.rows * joint.keys, unimodal.rows * unimodal.keys)
    warps = 2 if largest <= 32 * 32 else 4 if largest <= 64 * 64 else 8
    if dtype == torch.float32 and largest > 32 * 32:
        warps = 8
    blocks = {"BLOCK_M": joint.rows, "BLOCK_N": joint.keys, "TEXT_M": unimodal.rows, "TEXT_N": unimodal.keys}
    return (Config.of(warps, 1, **blocks),)


def _square(size: int, warps: int, stages: int, *, backward: bool) -> Config:
    blocks = {"BLOCK_M": size, "BLOCK_N": size}
    return (
        Config.of(warps, stages, **blocks)
        if backward
        else Config.of(warps, stages, **blocks, TEXT_M=size, TEXT_N=size)
    )


def block_configs(
    architecture: int, dtype: torch.dtype, head_dim: int, *, backward: bool
) -> tuple[Config, ...]:
    """Configurations for longer samples, best first."""
    if dtype == torch.float32:
        return tuple(_square(size, 4, 1, backward=backward) for size in (32, 16))
    stages = 2 if head_dim <= 64 else 1
    return tuple(_square(size, 4, stages, backward=backward) for size in (64, 32))
