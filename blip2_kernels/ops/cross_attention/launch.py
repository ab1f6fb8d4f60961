"""Tiles, warps and stages of the cross-attention kernels, as data.

The forward's depend on nothing that says how images are shared, so that a sample's result does not either.
"""

from functools import cache

import torch

from ..launching import BLACKWELL, WARPS_ALONE, Config, LaunchTable

CHUNK = 512
"""Image tokens that are attended to from a fresh start and then merged, in order. Part of the result's
definition: however the chunks are spread over programs, the bits are the same."""

GROUP = Config.of(4, 1, BLOCK_S=1024)
"""Of the grouping kernel: samples that it looks at together."""


def key(dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """What the tables are indexed by."""
    return "fp32" if dtype == torch.float32 else "half", "narrow" if head_dim <= 64 else "wide"


def _tile(rows: int, tokens: int, warps: int, stages: int) -> Config:
    return Config.of(warps, stages, BLOCK_M=rows, BLOCK_N=tokens)


# In half precision the compiler spills no registers of these on NVIDIA's GPUs, in Triton 3.6 or in 3.9, with
# dropout or without; in fp32 it may put 32 bytes aside, outside innermost loops, for one more program
# (`tests/kernels/budget.py`).
# fp32 products, which have no tensor cores, keep whole rows of their operands in registers: eight warps share
# them where four would spill.
FORWARD = LaunchTable(
    {
        ("half", "narrow"): (_tile(64, 64, 4, 3), _tile(64, 32, 4, 1), _tile(32, 32, 4, 1)),
        ("half", "wide"): (_tile(64, 32, 4, 2), _tile(32, 32, 4, 1)),
        ("fp32", "narrow"): (_tile(32, 32, 4, 1), _tile(16, 16, 4, 1)),
        ("fp32", "wide"): (_tile(16, 16, 4, 1),),
    },
    {
        number: {
            ("half", "narrow"): (_tile(64, 32, 4, 3), _tile(32, 32, 4, 1)),
            ("half", "wide"): (_tile(64, 32, 8, 2), _tile(32, 32, 4, 1)),
        }
        for number in WARPS_ALONE
    }
    | {
        number: {
            ("half", "narrow"): (_tile(64, 32, 4, 3), _tile(32, 32, 4, 1)),
            ("half", "wide"): (_tile(64, 32, 8, 3), _tile(32, 32, 4, 1)),
        }
        for number in BLACKWELL
    },
)
BACKWARD_SHARED = LaunchTable(
    {
        ("half", "narrow"): (_tile(128, 64, 8, 2), _tile(64, 32, 4, 1)),
        ("half", "wide"): (_tile(32, 32, 8, 1), _tile(16, 32, 4, 1)),
        ("fp32", "narrow"): (_tile(32, 16, 4, 1), _tile(16, 16, 4, 1)),
        ("fp32", "wide"): (_tile(16, 16, 8, 1),),
    },
    {
        number: {
            ("half", "narrow"): (_tile(64, 32, 8, 2), _tile(32, 32, 4, 1)),
            ("half", "wide"): (_tile(32, 64, 8, 1), _tile(32, 32, 4, 1)),
        }
        for number in WARPS_ALONE
    }
    | {
        number: {
            ("half", "narrow"): (_tile(128, 32, 8, 2), _tile(64, 16, 4, 1)),
            ("half", "wide"): (_tile(64, 64, 8, 2), _tile(32, 32, 4, 1)),
        }
        for number in BLACKWELL
    }
    | {90: {("half", "narrow"): (_tile(128, 64, 8, 1), _tile(64, 32, 4, 1))}},
)
"""Where samples share images: four samples of 32 queries are one tile where its registers suffice."""
BACKWARD_ALONE = LaunchTable(
    {
        ("half", "narrow"): (_tile(32, 64, 4, 2), _tile(32, 32, 4, 1)),
        ("half", "wide"): (_tile(32, 32, 8, 1), _tile(32, 32, 4, 1)),
        ("fp32", "narrow"): (_tile(32, 16, 4, 1), _tile(16, 16, 4, 1)),
        ("fp32", "wide"): (_tile(16, 16, 8, 1),),
    },
    {
        number: {
            ("half", "narrow"): (_tile(32, 32, 4, 2), _tile(32, 32, 4, 1)),
            ("half", "wide"): (_tile(32, 32, 4, 1), _tile(16, 32, 4, 1)),
        }
        for number in WARPS_ALONE
    }
    | {
        number: {
            ("half", "narrow"): (_tile(32, 32, 4, 2), _tile(32, 32, 4, 1)),
            ("half", "wide"): (_tile(32, 64, 8, 2), _tile(16, 32, 4, 1)),
        }
        for number in BLACKWELL
    },
)
"""Where every sample has an image of its own: one sample of 32 queries is a tile."""
BACKWARD_KEYS = LaunchTable(
    {
        ("half", "narrow"): (_tile(64, 64, 8, 1), _tile(32, 32, 4, 1)),
        ("half", "wide"): (_tile(32, 32, 8, 1), _tile(16, 32, 4, 1)),
        ("fp32", "narrow"): (_tile(32, 16, 4, 1), _tile(16, 16, 4, 1)),
        ("fp32", "wide"): (_tile(16, 16, 4, 1),),
    },
    {
        number: {
            ("half", "narrow"): (_tile(64, 32, 4, 1), _tile(32, 32, 4, 1)),
            ("half", "wide"): (_tile(16, 32, 4, 1), _tile(16, 16, 4, 1)),
        }
        for number in WARPS_ALONE
    }
    | {90: {("half", "narrow"): (_tile(64, 32, 4, 1), _tile(32, 32, 4, 1))}},
)
"""Of the kernel for images that several tiles look at."""


@cache
def merge_config(rows: int) -> Config:
    """Of the kernel that merges chunks: the rows are those of the forward kernel's tile."""
    return Config.of(4, 1, BLOCK_M=rows)


def split_chunks(programs: int, chunks: int, processors: int) -> bool:
    """Whether to give each chunk a program of its own: where the tiles alone leave processors idle."""
    return chunks > 1 and programs < 2 * processors


def key_splits(programs: int, blocks: int, processors: int) -> int:
    """Programs among which the key blocks of an image and head with several tiles are dealt."""
    return max(1, min(blocks, -(-2 * processors // max(programs, 1))))
