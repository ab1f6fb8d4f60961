"""Tiles, warps and stages of the latent attention kernels, as data."""

import torch

from ..launching import SMALLEST_TILE, Config, LaunchTable, power_of_two

COLUMNS = 64
"""Scores and probabilities of a row take a multiple of this, so that no tile of them needs a mask; the output
kernel's BLOCK_N divides it."""

WORKSPACE = 1 << 26
"""Scores held at a time, unless one sample alone has more."""

_WARP_GROUPS = (90, 100, 103)
"""Where a warp group multiplies (from Hopper on), a tile twice as large leaves registers for two programs, or
for one where tokens are hidden by a mask of any pattern."""


def key(dtype: torch.dtype, rows: int, width: int) -> tuple[str, int]:
    """Dtype, and how many rows of a sample at most a tile should have."""
    # The compiler reads rows that do not begin at multiples of 16 element by element, and every element then
    # has an address of its own: the largest tile would spill them.
    largest = 128 if width % 16 == 0 else 64
    kind = "fp32" if dtype == torch.float32 else "half"
    return kind, min(largest, max(SMALLEST_TILE, power_of_two(rows)))


def softmax_key(columns: int) -> int:
    """How many columns a program should read at a time."""
    return min(1024, power_of_two(columns))


def _scores(rows: int, tokens: int, channels: int, warps: int, stages: int) -> Config:
    return Config.of(warps, stages, BLOCK_R=rows, BLOCK_N=tokens, BLOCK_K=channels)


def _output(rows: int, channels: int, tokens: int, warps: int, stages: int) -> Config:
    return Config.of(warps, stages, BLOCK_R=rows, BLOCK_W=channels, BLOCK_N=tokens)


SCORES = LaunchTable(
    {
        ("half", 128): (_scores(128, 64, 64, 8, 3), _scores(64, 64, 32, 4, 2)),
        ("half", 64): (_scores(64, 64, 64, 4, 3), _scores(64, 64, 32, 4, 2)),
        ("half", 32): (_scores(32, 128, 64, 4, 3), _scores(32, 64, 32, 4, 2)),
        ("half", 16): (_scores(16, 128, 64, 4, 3), _scores(16, 64, 32, 4, 2)),
        ("fp32", 128): (_scores(128, 64, 16, 8, 2), _scores(32, 32, 16, 4, 2)),
        ("fp32", 64): (_scores(64, 64, 16, 8, 2), _scores(32, 32, 16, 4, 2)),
        ("fp32", 32): (_scores(32, 64, 32, 4, 2), _scores(32, 32, 16, 4, 2)),
        ("fp32", 16): (_scores(16, 64, 16, 4, 2), _scores(16, 32, 16, 4, 2)),
    },
    {
        number: {("half", 128): (_scores(128, 128, 64, 8, 3), _scores(64, 64, 32, 4, 2))}
        for number in _WARP_GROUPS
    },
)
OUTPUT = LaunchTable(
    {
        ("half", 128): (_output(128, 64, 64, 8, 3), _output(64, 64, 32, 4, 2)),
        ("half", 64): (_output(64, 128, 64, 4, 3), _output(64, 64, 32, 4, 2)),
        ("half", 32): (_output(32, 128, 64, 4, 3), _output(32, 64, 64, 4, 2)),
        ("half", 16): (_output(16, 128, 32, 4, 4), _output(16, 64, 64, 4, 2)),
        ("fp32", 128): (_output(128, 64, 16, 8, 2), _output(32, 32, 16, 4, 2)),
        ("fp32", 64): (_output(64, 64, 16, 8, 2), _output(32, 32, 16, 4, 2)),
        ("fp32", 32): (_output(32, 64, 32, 4, 2), _output(32, 32, 16, 4, 2)),
        ("fp32", 16): (_output(16, 64, 16, 4, 2), _output(16, 32, 16, 4, 2)),
    },
    {
        number: {("half", 128): (_output(128, 128, 32, 8, 4), _output(64, 64, 32, 4, 2))}
        for number in _WARP_GROUPS
    },
)
SOFTMAX = LaunchTable(
    {
        columns: (Config.of(4, 2, BLOCK_R=2048 // columns, BLOCK_N=columns),)
        for columns in (64, 128, 256, 512, 1024)
    }
)
