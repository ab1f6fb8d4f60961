"""Tiles, warps and stages of the similarity kernels, as data."""

from collections.abc import Hashable

import torch

from ..launching import BLACKWELL, SMALLEST_TILE, Config, LaunchTable, power_of_two

GROUP = 8
"""Image tiles that walk along the texts together: what they read stays in the second-level cache."""

_QUERY_BLOCKS = (1, 2, 4, 8, 16, 32, 64)


def query_block(queries: int) -> int:
    """Queries of an image that a tile takes at a time: a power of two that leaves few places empty."""
    if queries <= SMALLEST_TILE:
        return power_of_two(queries)
    return min((64, 32, 16), key=lambda block: -(-queries // block) * block)


def forward_key(dtype: torch.dtype, queries: int) -> tuple[str, int, bool]:
    """Dtype, query block, and whether that is all of an image's queries."""
    block = query_block(queries)
    return _kind(dtype), block, block == queries


def image_gradient_key(dtype: torch.dtype, queries: int, channels: int) -> tuple[str, int, int]:
    """Dtype, query block, and how many channels at most a tile should have."""
    return _kind(dtype), query_block(queries), min(128, max(SMALLEST_TILE, power_of_two(channels)))


def text_gradient_key(channels: int) -> int:
    """How many channels a program should read at a time."""
    return min(256, max(SMALLEST_TILE, power_of_two(channels)))


def _kind(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "half"


def _forward(block: int, *, texts: int, rows: int, channels: int, warps: int, stages: int = 2) -> Config:
    images = min(max(1, rows // block), 32)
    return Config.of(warps, stages, BLOCK_I=images, BLOCK_Q=block, BLOCK_T=texts, BLOCK_E=channels)


def _forward_table(texts: int, ragged_stages: int = 3) -> dict[Hashable, tuple[Config, ...]]:
    """Tiles of texts x queries, at most `texts` in half precision; `ragged_stages` where a block is not all
    of an image's queries. Two programs of eight warps share a multiprocessor, so that one multiplies while
    the other looks for its maxima."""
    table: dict[Hashable, tuple[Config, ...]] = {}
    for block in _QUERY_BLOCKS:
        for whole in (False, True):
            # Small blocks, and the running maxima of several blocks, take registers that tiles then lack.
            large, stages = whole and block >= 32, 3 if whole else ragged_stages
            table["half", block, whole] = (
                _forward(block, texts=texts if large else 64, rows=128, channels=64, warps=8, stages=stages),
                _forward(block, texts=64, rows=64, channels=32, warps=4),
            )
            table["fp32", block, whole] = (
                _forward(block, texts=128 if large else 64, rows=64, channels=16, warps=8),
                _forward(block, texts=32, rows=32, channels=16, warps=4),
            )
    return table


def _image_gradient_table() -> dict[Hashable, tuple[Config, ...]]:
    table: dict[Hashable, tuple[Config, ...]] = {}
    for block in _QUERY_BLOCKS:
        shape = {"BLOCK_I": min(max(1, 64 // block), 16), "BLOCK_Q": block}
        for width in (16, 32, 64, 128):
            table["half", block, width] = (
                Config.of(4, 3, **shape, BLOCK_E=width, BLOCK_T=64),
                Config.of(4, 2, **shape, BLOCK_E=min(width, 64), BLOCK_T=32),
            )
            table["fp32", block, width] = (
                Config.of(8, 2, **shape, BLOCK_E=width, BLOCK_T=16),
                Config.of(4, 2, **shape, BLOCK_E=min(width, 32), BLOCK_T=16),
            )
    return table


FORWARD = LaunchTable(
    _forward_table(64), {90: _forward_table(128)} | {number: _forward_table(128, 2) for number in BLACKWELL}
)
"""Where a warp group multiplies (from Hopper on), the larger tile still leaves registers for two programs. On
sm_100 three stages spill 8 bytes in Triton 3.9 where there are several blocks of queries."""
IMAGE_GRADIENT = LaunchTable(_image_gradient_table())
TEXT_GRADIENT = LaunchTable(
    {width: (Config.of(8, 2, BLOCK_B=16, BLOCK_E=width),) for width in (16, 32, 64, 128, 256)}
)
