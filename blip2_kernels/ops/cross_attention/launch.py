"""Tiles, warps and stages of the cross-attention kernels, as data."""

import torch

from ..launching import Config

CHUNK = 512
"""Image tokens that are attended to from a fresh start and then merged, in order. Part of the result's
definition: however the chunks are spread over programs, the bits are the same."""

SMALLEST_TILE = 16
"""`tl.dot` takes no less."""

GROUP_BLOCK = 1024
"""Samples that the grouping kernel looks at together."""


def power_of_two(n: int) -> int:
    """The smallest power of two >= n; 1 for n <= 1."""
    return 1 << max(n - 1, 0).bit_length()


def forward_configs(architecture: int, dtype: torch.dtype, head_dim: int) -> tuple[Config, ...]:
    """Configurations of the forward kernel, best first.

    They depend on nothing that says how images are shared, so that a sample's result does not either.
    """
    if dtype == torch.float32:
        return (
            Config.of(4, 1, BLOCK_M=32, BLOCK_N=32),
            Config.of(4, 1, BLOCK_M=16, BLOCK_N=16),
        )
    stages = 3 if head_dim <= 64 else 2
    return (
        Config.of(4, stages, BLOCK_M=64, BLOCK_N=64),
        Config.of(4, 1, BLOCK_M=64, BLOCK_N=32),
        Config.of(4, 1, BLOCK_M=32, BLOCK_N=32),
    )


def backward_configs(
    architecture: int, dtype: torch.dtype, head_dim: int, num_queries: int, *, grouped: bool
) -> tuple[Config, ...]:
    """Configurations of the backward kernel, best first: 128 stacked rows where images are shared."""
    if dtype == torch.float32:
        return (
            Config.of(4, 1, BLOCK_M=32, BLOCK_N=32),
            Config.of(4, 1, BLOCK_M=16, BLOCK_N=16),
        )
    alone = min(max(SMALLEST_TILE, power_of_two(num_queries)), 128)
    rows = 128 if grouped else alone
    if head_dim > 64:
        rows = min(rows, 64)
    wide = Config.of(8 if rows == 128 else 4, 2, BLOCK_M=rows, BLOCK_N=64)
    return (wide, Config.of(4, 1, BLOCK_M=min(rows, 64), BLOCK_N=32))


def split_chunks(programs: int, chunks: int, processors: int) -> bool:
    """Whether to give each chunk a program of its own: where the tiles alone leave processors idle."""
    return chunks > 1 and programs < 2 * processors


def key_splits(programs: int, blocks: int, processors: int) -> int:
    """Programs among which the key blocks of an image and head with several tiles are dealt."""
    return max(1, min(blocks, -(-2 * processors // max(programs, 1))))
