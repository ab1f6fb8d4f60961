"""What is shipped: every kernel in every launch configuration, and a call that launches it.

Calls are made under the fake driver (`budget.py`), with the packed projections of twelve heads, and what
makes the code largest: the unimodal and the causal part side by side, samples grouped by image, a visibility
mask, several chunks of image tokens, and what the backward needs kept. To keep the list short:

- bf16 stands for fp16, and tiles of one sample are square;
- the attentions' first configuration for a dtype and head dim is compiled with and without dropout, those
  behind it, taken only where the first does not fit, with dropout alone;
- latent attention has the width of BLIP-2's image encoder; a configuration that stands in several rows of a
  table is compiled once, since the rows of a sample are no part of what is compiled;
- the similarity's forward is compiled for every key, with as many queries as make the code largest; the
  images' gradient for every block of queries at 256 channels, and at fewer for 32 queries; what is behind the
  first configuration, half its size, for 32 queries.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from blip2_kernels.ops.cross_attention import launch as cross_launch
from blip2_kernels.ops.cross_attention.triton import op as cross_op
from blip2_kernels.ops.image_text_similarity import launch as similarity_launch
from blip2_kernels.ops.image_text_similarity.triton import op as similarity_op
from blip2_kernels.ops.latent_attention import launch as latent_launch
from blip2_kernels.ops.latent_attention.triton import op as latent_op
from blip2_kernels.ops.launching import Config, LaunchTable
from blip2_kernels.ops.self_attention import launch as self_launch
from blip2_kernels.ops.self_attention.triton import op as self_op

HEADS = 12
KINDS = {
    ("half", "narrow"): (torch.bfloat16, 64),
    ("half", "wide"): (torch.bfloat16, 128),
    ("fp32", "narrow"): (torch.float32, 64),
    ("fp32", "wide"): (torch.float32, 128),
}
"""Dtype and head dim that stand for a key of the attentions' launch tables; calls take any others too."""
DTYPES = {"half": torch.bfloat16, "fp32": torch.float32}
LATENT_WIDTH = 1408


@dataclass(frozen=True)
class Shipped:
    """One kernel in one configuration that may be launched.

    Attributes:
        name: which it is, in words.
        kernel: the kernel's own name.
        call: launches it, perhaps after others.
        tables: what to launch with, for each table that is asked.
    """

    name: str
    kernel: str
    call: Callable[[], None]
    tables: tuple[tuple[LaunchTable, Config], ...] = ()

    @property
    def half(self) -> bool:
        return " half " in self.name


def shipped(arch: int) -> Iterator[Shipped]:
    """Every kernel and configuration that the operators launch on an architecture."""
    yield from _self_tiles()
    yield from _self_blocks(arch)
    yield from _cross(arch)
    yield from _latent(arch)
    yield from _similarity(arch)


def _self_tiles() -> Iterator[Shipped]:
    for kind, (dtype, head_dim) in KINDS.items():
        for rows in (16, 32, 64, 128):
            if rows > self_launch.one_tile_rows(dtype, head_dim):
                continue
            for dropout in (0.0, 0.1):
                end = f"{' '.join(kind)} tile {rows}x{rows}{_said(dropout)}"
                for direction, kernel in (
                    ("forward", "forward_kernel"),
                    ("backward", "backward_tile_kernel"),
                ):
                    call = _call(self_call, kind, rows, dropout, direction == "backward")
                    yield Shipped(f"self {direction} {end}", kernel, call)


def _self_blocks(arch: int) -> Iterator[Shipped]:
    for kind in KINDS:
        for config, dropout in _choices(self_launch.FORWARD, arch, kind):
            call = _call(self_call, kind, 1024, dropout, False)
            name = f"self forward {_named(kind, config, dropout)}"
            yield Shipped(name, "forward_kernel", call, ((self_launch.FORWARD, config),))
        for config, dropout in _choices(self_launch.BACKWARD, arch, kind):
            call = _call(self_call, kind, 1024, dropout, True)
            for part in ("rows", "keys"):
                name = f"self backward {part} {_named(kind, config, dropout)}"
                yield Shipped(name, f"backward_{part}_kernel", call, ((self_launch.BACKWARD, config),))


def _cross(arch: int) -> Iterator[Shipped]:
    yield Shipped("cross group", "group_kernel", _call(cross_forward_call, ("half", "narrow"), 0.0, "one"))
    for kind in KINDS:
        first = cross_launch.FORWARD.configs(arch, kind)[0]
        for config, dropout in _choices(cross_launch.FORWARD, arch, kind):
            tables = ((cross_launch.FORWARD, config),)
            # What most images have, what makes the code largest, and what a small batch is given.
            for chunks in ("one", "many", "split") if config is first else ("many",):
                name = (
                    f"cross forward {_named(kind, config, dropout)}, {chunks} chunk{'s' * (chunks != 'one')}"
                )
                call = _call(cross_forward_call, kind, dropout, chunks)
                yield Shipped(
                    name.replace("split chunks", "a chunk a program"), "forward_kernel", call, tables
                )
            if dropout:
                name = f"cross merge {' '.join(kind)} {config['BLOCK_M']} rows"
                if config["BLOCK_M"] not in _rows_before(cross_launch.FORWARD.configs(arch, kind), config):
                    yield Shipped(
                        name, "merge_kernel", _call(cross_forward_call, kind, dropout, "split"), tables
                    )
        for table, grouped, what in (
            (cross_launch.BACKWARD_SHARED, True, "shared"),
            (cross_launch.BACKWARD_ALONE, False, "alone"),
        ):
            for config, dropout in _choices(table, arch, kind):
                name = f"cross backward {what} {_named(kind, config, dropout)}"
                call = _call(cross_backward_call, kind, dropout, grouped)
                yield Shipped(name, "backward_rows_kernel", call, ((table, config),))
        shared = cross_launch.BACKWARD_SHARED.configs(arch, kind)[-1]
        for config, dropout in _choices(cross_launch.BACKWARD_KEYS, arch, kind):
            name = f"cross backward keys {_named(kind, config, dropout)}"
            tables = ((cross_launch.BACKWARD_SHARED, shared), (cross_launch.BACKWARD_KEYS, config))
            call = _call(cross_backward_call, kind, dropout, True)
            yield Shipped(name, "backward_keys_kernel", call, tables)


def _latent(arch: int) -> Iterator[Shipped]:
    seen = set()
    for choice in (0, 1):
        for table, what in ((latent_launch.SCORES, "scores"), (latent_launch.OUTPUT, "output")):
            for kind, dtype in DTYPES.items():
                for rows in (128, 64, 32, 16):
                    config = table.configs(arch, latent_launch.key(dtype, rows, LATENT_WIDTH))[choice]
                    if (what, kind, config) in seen:
                        continue
                    seen.add((what, kind, config))
                    name = f"latent {what} {kind} {_blocks(config)}"
                    yield Shipped(
                        name, f"{what}_kernel", _call(latent_call, dtype, rows, 257), ((table, config),)
                    )
    for columns in latent_launch.SOFTMAX.default:
        call = _call(latent_call, torch.bfloat16, 16, columns)
        yield Shipped(f"latent softmax half {columns} columns", "softmax_kernel", call)


def _similarity(arch: int) -> Iterator[Shipped]:
    table = similarity_launch.FORWARD
    for kind, dtype in DTYPES.items():
        for key in table.default:
            queries = _most_queries(dtype, key)
            for i, config in enumerate(table.configs(arch, key)):
                if queries is None or key[0] != kind or (i and key[1:] != (32, True)):
                    continue
                name = f"similarity forward {kind} {queries} queries, {_blocks(config)}"
                call = _call(_similarity_forward, dtype, queries)
                yield Shipped(name, "forward_kernel", call, ((table, config),))
    table = similarity_launch.IMAGE_GRADIENT
    for kind, dtype in DTYPES.items():
        for block in (1, 2, 4, 8, 16, 32, 64):
            for channels in (16, 32, 64, 256):
                key = similarity_launch.image_gradient_key(dtype, block, channels)
                for i, config in enumerate(table.configs(arch, key)):
                    if (block != 32 and channels != 256) or (i and (block, channels) != (32, 256)):
                        continue
                    name = f"similarity image gradient {kind} {channels} channels, {_blocks(config)}"
                    call = _call(_similarity_backward, dtype, block, channels)
                    yield Shipped(name, "image_gradient_kernel", call, ((table, config),))
    for kind, dtype in DTYPES.items():
        for channels in similarity_launch.TEXT_GRADIENT.default:
            if kind == "half" or channels == 256:
                call = _call(_similarity_backward, dtype, 32, channels)
                yield Shipped(
                    f"similarity text gradient {kind} {channels} channels", "text_gradient_kernel", call
                )


def _most_queries(dtype: torch.dtype, key: tuple) -> int | None:
    """Queries of an image that get this key of the forward's table, if possible with a block not full."""
    found = [n for n in range(1, 128) if similarity_launch.forward_key(dtype, n) == key]
    return max((n for n in found if n % key[1]), default=max(found, default=None))


def _choices(table: LaunchTable, arch: int, kind: tuple[str, str]) -> Iterator[tuple[Config, float]]:
    """Configurations, and the dropout each is compiled with."""
    for i, config in enumerate(table.configs(arch, kind)):
        if i == 0:
            yield config, 0.0
        yield config, 0.1


def _blocks(config: Config) -> str:
    sizes = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in config.blocks)
    return f"{sizes}, {config.num_warps} warps, {config.num_stages} stages"


def _rows_before(configs: tuple[Config, ...], config: Config) -> set[int]:
    return {other["BLOCK_M"] for other in configs[: configs.index(config)]}


def _said(dropout: float) -> str:
    return ", dropout" if dropout else ""


def _named(kind: tuple[str, str], config: Config, dropout: float) -> str:
    sizes = f"{config['BLOCK_M']}x{config['BLOCK_N']}, {config.num_warps} warps, {config.num_stages} stages"
    return f"{' '.join(kind)} blocks {sizes}{_said(dropout)}"


# -------------------------------------------------------------------------------------------------- the calls


def _call(function: Callable, *args: object) -> Callable[[], None]:
    return lambda: function(*args)


def _integers(size: int = 16) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32)


def self_call(kind: tuple, rows: int, dropout: float, backward: bool, **changed: int) -> None:
    """Samples of that many rows, half of them queries, beside a unimodal text as long; `changed` sizes."""
    dtype, head_dim = KINDS.get(kind, kind)
    half = rows // 2
    sizes = self_op.Sizes(2, 3, 3, 3, 3, half, half, half, half, rows, rows, causal=1, need_backward=1)
    sizes = sizes._replace(**changed)
    q, k, v = torch.empty(2, 3, HEADS, head_dim, dtype=dtype).unbind(1)
    key = torch.tensor(1) if dropout else None
    layout = (*(_integers() for _ in self_op.Rows._fields), key, list(sizes), 0.125, dropout, 3)
    if not backward:
        self_op._run_forward(q, k, v, *layout)
        return
    grad = torch.empty(q.shape, dtype=dtype)
    self_op._run_backward(grad, q, k, v, torch.empty(q.shape[:2]), *layout)


def _cross_tensors(kind: tuple, dropout: float, grouped: bool, tokens: int) -> tuple:
    """q, k and v of samples of 32 queries, then what the operators take of images and dropout."""
    dtype, head_dim = KINDS.get(kind, kind)
    samples, images = 64, 32 if grouped else 64
    q = torch.empty(1, dtype=dtype).expand(samples, 32, HEADS, head_dim)
    q = torch.empty_like(q, memory_format=torch.contiguous_format)
    k, v = torch.empty(images, tokens, 2, HEADS, head_dim, dtype=dtype).unbind(2)
    index = _integers(samples) if grouped else None
    visible = torch.empty(images, tokens, dtype=torch.uint8)
    key, row_keys = (torch.tensor(1), _integers()) if dropout else (None, None)
    return q, k, v, index, visible, row_keys, key, 0.125, dropout, 3


def cross_forward_call(kind: tuple, dropout: float, chunks: str, need_backward: bool = True) -> None:
    tokens = 257 if chunks == "one" else 677
    split = mock.patch.object(cross_launch, "split_chunks", lambda *_: chunks == "split")
    with split:
        cross_op._run_forward(*_cross_tensors(kind, dropout, True, tokens), need_backward)


def cross_backward_call(kind: tuple, dropout: float, grouped: bool) -> None:
    q, *given = _cross_tensors(kind, dropout, grouped, 257)
    cross_op._run_backward(torch.empty_like(q), q, *given[:2], torch.empty(q.shape[:3]), *given[2:])


def latent_call(dtype: torch.dtype, rows: int, tokens: int) -> None:
    q = torch.empty(2, rows, LATENT_WIDTH, dtype=dtype)
    features = torch.empty(1, tokens, LATENT_WIDTH, dtype=dtype)
    mask = torch.empty(1, tokens, dtype=torch.uint8)
    latent_op._run(q, features, _integers(2), mask, 0.125)


def _similarity_forward(dtype: torch.dtype, queries: int) -> None:
    image, text = torch.empty(12, queries, 256, dtype=dtype), torch.empty(33, 256, dtype=dtype)
    similarity_op._run_forward(image, text, True)


def _similarity_backward(dtype: torch.dtype, queries: int, channels: int) -> None:
    image, text = torch.empty(12, queries, channels, dtype=dtype), torch.empty(33, channels, dtype=dtype)
    grad, index = torch.empty(12, 33, dtype=dtype), torch.empty(12, 33, dtype=torch.int32)
    similarity_op._run_image_backward(grad, text, index, queries)
    similarity_op._run_text_backward(grad, image, index)
