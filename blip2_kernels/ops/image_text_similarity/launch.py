"""Tiles, warps and stages of the similarity kernels, as data."""

import torch

from ..launching import Config

SMALLEST_TILE = 16
"""`tl.dot` takes no less."""

SMALL_SHARED_MEMORY = (86, 89, 120, 121)
"""Architectures on which a program has about 99 KiB of shared memory; others have 163 KiB and more."""


def query_block(queries: int) -> int:
    """Queries of an image that a tile takes at a time: a power of two that leaves few places empty."""
    if queries <= SMALLEST_TILE:
        return power_of_two(queries)
    return min((64, 32, 16), key=lambda block: -(-queries // block) * block)


def power_of_two(n: int) -> int:
    """The smallest power of two >= n; 1 for n <= 1."""
    return 1 << max(n - 1, 0).bit_length()


def forward_configs(architecture: int, dtype: torch.dtype, queries: int) -> tuple[Config, ...]:
    """Configurations of the forward kernel, best first: texts x queries of a tile, channels a step.

    Two programs of eight warps share a multiprocessor, so that one multiplies while the other looks for its
    maxima. GROUP image tiles walk along the texts together: what they read stays in the second-level cache.
    """
    if dtype == torch.float32:
        return (
            _forward(queries, texts=64, rows=64, channels=32, warps=8, stages=2),
            _forward(queries, texts=32, rows=64, channels=32, warps=4, stages=1),
        )
    small = _forward(queries, texts=64, rows=64, channels=32, warps=4, stages=2)
    if architecture in SMALL_SHARED_MEMORY:
        return (_forward(queries, texts=128, rows=128, channels=32, warps=8, stages=3), small)
    return (_forward(queries, texts=128, rows=128, channels=64, warps=8, stages=3), small)


def _forward(queries: int, texts: int, rows: int, channels: int, warps: int, stages: int) -> Config:
    block = query_block(queries)
    images = max(1, rows // block)
    blocks = {"BLOCK_I": images, "BLOCK_Q": block, "BLOCK_T": texts, "BLOCK_E": channels, "GROUP": 8}
    return Config.of(warps, stages, **blocks)


def image_gradient_configs(
    architecture: int, dtype: torch.dtype, queries: int, channels: int
) -> tuple[Config, ...]:
    """Configurations of the gradient of the images, best first: queries x channels of a tile, texts a step."""
    block = query_block(queries)
    images = max(1, 64 // block)
    width = min(128, max(SMALLEST_TILE, power_of_two(channels)))
    common = {"BLOCK_I": images, "BLOCK_Q": block}
    if dtype == torch.float32:
        return (
            Config.of(8, 2, **common, BLOCK_E=min(width, 64), BLOCK_T=32),
            Config.of(8, 1, **common, BLOCK_E=min(width, 32), BLOCK_T=16),
        )
    return (
        Config.of(4, 3, **common, BLOCK_E=width, BLOCK_T=64),
        Config.of(4, 2, **common, BLOCK_E=min(width, 64), BLOCK_T=32),
    )


def text_gradient_configs(architecture: int, dtype: torch.dtype, channels: int) -> tuple[Config, ...]:
    """Configurations of the gradient of the texts: images x channels read at a time by a text's program."""
    width = min(256, max(SMALLEST_TILE, power_of_two(channels)))
    return (Config.of(4, 2, BLOCK_B=16, BLOCK_E=width),)
