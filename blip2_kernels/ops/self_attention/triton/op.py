"""The registered operators of masked self-attention, and the launches behind them."""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....layout import TokenLayout
from ....mask import AttentionMask, MaskMode
from ... import launching
from ...library import Gradient, define
from ...philox import LANES, Site, keep_scale, place, threshold
from .. import launch

MAX_HEAD_DIM = 128
LOG2_E = 1.0 / math.log(2.0)


def supports(q: Tensor, k: Tensor, v: Tensor, kv_layout: TokenLayout, dropout: float) -> str | None:
    """None where the kernels can serve, else the reason."""
    if dropout > 0 and not kv_layout.consecutive:
        return "with dropout the kernels need each sample's text from its first token on, not its last rows"
    return launching.supports({"q": q, "k": k, "v": v}, MAX_HEAD_DIM)


class Rows(NamedTuple):
    """The tensors of two layouts, as the operators take them; the last six are None where a part has no text.

    The joint part is the queries with the text of a bidirectional or causal segment, the unimodal part the
    text of a unimodal segment alone (see `tile.py`).
    """

    q_keys: Tensor
    kv_keys: Tensor
    q_offsets: Tensor | None = None
    kv_offsets: Tensor | None = None
    kv_lengths: Tensor | None = None
    unimodal_q_offsets: Tensor | None = None
    unimodal_kv_offsets: Tensor | None = None
    unimodal_kv_lengths: Tensor | None = None


class Sizes(NamedTuple):
    """The host numbers of two layouts and a mask, as the operators take them.

    Attributes:
        samples: S.
        q_start, kv_start: first row of the joint part's text.
        unimodal_q_start, unimodal_kv_start: the same of the unimodal text.
        q_queries, kv_queries: queries a sample.
        q_longest, kv_longest: most rows of the joint part's text in a sample.
        unimodal_q_longest, unimodal_kv_longest: the same of the unimodal text.
        causal: 1 if the joint part's text is causal.
        need_backward: 1 if the forward must leave what the backward of several blocks reads.
    """

    samples: int
    q_start: int = 0
    kv_start: int = 0
    unimodal_q_start: int = 0
    unimodal_kv_start: int = 0
    q_queries: int = 0
    kv_queries: int = 0
    q_longest: int = 0
    kv_longest: int = 0
    unimodal_q_longest: int = 0
    unimodal_kv_longest: int = 0
    causal: int = 0
    need_backward: int = 1

    def places(self) -> tuple[int, ...]:
        """Queries a sample and first text rows, in the kernels' order."""
        return (self.q_queries, self.kv_queries, *self[1:5])

    def shape(self) -> "Sizes":
        """All that a launch depends on but for the grid: the same for many batches."""
        return Sizes(0, 0, 0, 0, 0, *self[5:])

    def tiles(self) -> tuple[launch.Tiles, launch.Tiles]:
        """The single tiles that would hold the joint and the unimodal part of any sample."""
        rows = launch.tile_rows(self.q_queries, self.q_longest)
        keys = launch.tile_rows(self.kv_queries, self.kv_longest)
        text_rows = launch.tile_rows(0, self.unimodal_q_longest)
        text_keys = launch.tile_rows(0, self.unimodal_kv_longest)
        return launch.Tiles(rows, keys), launch.Tiles(text_rows, text_keys)

    def one_tile(self, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether every part of every sample is one tile."""
        joint, unimodal = self.tiles()
        return max(*joint, *unimodal) <= launch.one_tile_rows(dtype, head_dim)


def self_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: TokenLayout,
    kv_layout: TokenLayout,
    mask: AttentionMask,
    *,
    dropout: float,
    dropout_key: Tensor | None,
    layer: int,
    scale: float,
) -> Tensor:
    """See `self_attention`."""
    rows, sizes = _flatten(q_layout, kv_layout, mask)
    need_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    sizes = sizes._replace(need_backward=int(need_backward))
    key = dropout_key.to(q.device) if dropout > 0 else None
    return _forward(q, k, v, *rows, key, list(sizes), scale, dropout, layer)[0]


def _flatten(q_layout: TokenLayout, kv_layout: TokenLayout, mask: AttentionMask) -> tuple[Rows, Sizes]:
    rows: dict[str, Any] = {"q_keys": q_layout.row_keys, "kv_keys": kv_layout.row_keys}
    sizes: dict[str, int] = {
        "samples": q_layout.samples,
        "q_queries": q_layout.num_queries,
        "kv_queries": kv_layout.num_queries,
    }
    for i, mode in enumerate(mask.modes):
        prefix = "unimodal_" if mode == MaskMode.UNIMODAL else ""
        q_text, kv_text = q_layout.texts[i], kv_layout.texts[i]
        rows |= {
            f"{prefix}q_offsets": q_text.offsets,
            f"{prefix}kv_offsets": kv_text.offsets,
            f"{prefix}kv_lengths": kv_text.lengths,
        }
        sizes |= {
            f"{prefix}q_start": q_layout.text_start(i),
            f"{prefix}kv_start": kv_layout.text_start(i),
            f"{prefix}q_longest": q_text.max_length,
            f"{prefix}kv_longest": kv_text.max_length,
        }
        if mode == MaskMode.MULTIMODAL_CAUSAL:
            sizes["causal"] = 1
    return Rows(**rows), Sizes(**sizes)


# ------------------------------------------------------------------------------------------------- operators


_LAYOUT = (
    "Tensor q_keys, Tensor kv_keys, Tensor? q_offsets, Tensor? kv_offsets, Tensor? kv_lengths,"
    " Tensor? unimodal_q_offsets, Tensor? unimodal_kv_offsets, Tensor? unimodal_kv_lengths,"
    " Tensor? dropout_key, SymInt[] sizes, float scale, float dropout, int layer"
)


class _Plan(NamedTuple):
    """What a launch needs to know of a shape.

    Attributes:
        tile: the configuration of the kernels for samples that are one tile, or None where they go by blocks.
        constants: constexprs of the kernels.
    """

    tile: launching.Config | None
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def _plan(
    shape: Sizes, dtype: torch.dtype, head_dim: int, dropout: bool, wide: bool, precision: str, backward: bool
) -> _Plan:
    one_tile = shape.one_tile(dtype, head_dim)
    joint = shape.q_queries > 0 or shape.q_longest > 0
    unimodal = shape.unimodal_q_longest > 0
    if backward:
        # Rows that nobody attends to have a gradient too: 0.
        joint = joint or shape.kv_queries > 0 or shape.kv_longest > 0
        unimodal = unimodal or shape.unimodal_kv_longest > 0
    constants = {
        "JOINT": joint,
        "TEXT": shape.kv_longest > 0 or shape.q_longest > 0,
        "CAUSAL": bool(shape.causal),
        "UNIMODAL": unimodal,
        "DROPOUT": dropout,
        "PRECISION": precision,
        "WIDE": wide,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(launching.SMALLEST_TILE, launching.power_of_two(head_dim)),
    }
    if not backward:
        constants["ONE_TILE"] = one_tile
    return _Plan(launch.one_tile_config(*shape.tiles(), dtype) if one_tile else None, constants)


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, *layout_and_options: Any, by_blocks: bool = False
) -> tuple[Tensor, Tensor]:
    """Output and, where the backward will read it, log-sum-exp; `by_blocks` even where a tile would do."""
    rows, key, sizes, scale, dropout, layer = _unflatten(layout_and_options)
    heads, head_dim = q.shape[1:]
    kind = (q.dtype, head_dim, key is not None, launching.wide(q, k, v), launching.input_precision(q.dtype))
    plan = _plan(sizes.shape(), *kind, False)
    if by_blocks:
        plan = _Plan(None, plan.constants | {"ONE_TILE": False})
    numbers = (*sizes.places(), *launching.strides(q, k, v), scale * LOG2_E, *_dropout(dropout, layer))

    def run(config: launching.Config) -> tuple[Tensor, Tensor]:
        from .forward import forward_kernel

        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = _kept(q, sizes, plan.tile is not None)
        joint = _blocks(sizes.q_queries, sizes.q_longest, config["BLOCK_M"])
        blocks = joint + _blocks(0, sizes.unimodal_q_longest, config["TEXT_M"])
        args = (q, k, v, out, _or_none(lse), *rows, key, heads, joint, *numbers)
        constants = plan.constants
        if plan.tile is not None and config is not plan.tile:
            constants = constants | {"ONE_TILE": False}
        launching.launch(forward_kernel, (sizes.samples * heads, blocks), args, constants, config)
        return out, lse

    configs = launch.FORWARD.configs(launching.architecture(q.device), launch.block_key(q.dtype, head_dim))
    if plan.tile is not None:
        # Where the tile does not fit, its rows go by blocks.
        configs = (plan.tile, *configs)
    compiled_for = (q.dtype, *plan.constants.values())
    return launching.first_that_fits("self_attention", q.device, compiled_for, configs, run)


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    *layout_and_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, key, sizes, scale, dropout, layer = _unflatten(layout_and_options)
    heads, head_dim = q.shape[1:]
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    wide = launching.wide(q, k, v, grad)
    kind = (q.dtype, head_dim, key is not None, wide, launching.input_precision(q.dtype))
    plan = _plan(sizes.shape(), *kind, True)
    numbers = (*sizes.places(), *launching.strides(q, k, v, grad), scale, scale * LOG2_E)
    numbers = (*numbers, *_dropout(dropout, layer))

    def run(config: launching.Config) -> tuple[Tensor, Tensor, Tensor]:
        from .backward import backward_keys_kernel, backward_rows_kernel, backward_tile_kernel

        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        programs = sizes.samples * heads
        if config is tile:
            args = (q, k, v, grad, dq, dk, dv, *rows, key, heads, *numbers)
            parts = plan.constants["JOINT"] + plan.constants["UNIMODAL"]
            launching.launch(backward_tile_kernel, (programs, parts), args, plan.constants, config)
            return dq, dk, dv
        kept = lse
        if tile is not None:
            # A tile's forward kept nothing.
            flat = (*rows, key, sizes._replace(need_backward=1), scale, dropout, layer)
            kept = _run_forward(q, k, v, *flat, by_blocks=True)[1]
        inputs = (q, k, v, grad, kept, torch.empty_like(kept))
        joint = _blocks(sizes.q_queries, sizes.q_longest, config["BLOCK_M"])
        blocks = joint + _blocks(0, sizes.unimodal_q_longest, config["BLOCK_M"])
        args = (*inputs, dq, *rows, key, heads, joint, *numbers)
        launching.launch(backward_rows_kernel, (programs, blocks), args, plan.constants, config)
        joint = _blocks(sizes.kv_queries, sizes.kv_longest, config["BLOCK_N"])
        blocks = joint + _blocks(0, sizes.unimodal_kv_longest, config["BLOCK_N"])
        args = (*inputs, dk, dv, *rows, key, heads, joint, *numbers)
        launching.launch(backward_keys_kernel, (programs, blocks), args, plan.constants, config)
        return dq, dk, dv

    architecture = launching.architecture(q.device)
    configs = launch.BACKWARD.configs(architecture, launch.block_key(q.dtype, head_dim))
    tile = None
    if plan.tile is not None:
        tile = launch.one_tile_backward(plan.tile, q.dtype, head_dim, architecture)
        configs = (tile, *configs)
    compiled_for = (q.dtype, *plan.constants.values())
    return launching.first_that_fits("self_attention_backward", q.device, compiled_for, configs, run)


def _kept(q: Tensor, sizes: Sizes, one_tile: bool) -> Tensor:
    """What the forward of several blocks leaves for the backward: log2-sum-exp2 of each row and head."""
    kept = not one_tile and bool(sizes.need_backward)
    return q.new_empty(q.shape[:2] if kept else 0, dtype=torch.float32)


def _unflatten(flat: tuple) -> tuple[Rows, Tensor | None, Sizes, float, float, int]:
    *rows, key, sizes, scale, dropout, layer = flat
    return Rows(*rows), key, Sizes(*sizes), scale, dropout, layer


def _blocks(queries: int, longest: int, block: int) -> int:
    """Blocks that the longest sample's rows of a part need."""
    begin = -(-queries // LANES) * LANES if longest else queries
    return -(-(begin + longest) // block)


def _dropout(dropout: float, layer: int) -> tuple[float, int, int]:
    """The factor of a kept probability, the threshold below which one is dropped, and where in the model."""
    return keep_scale(dropout), threshold(dropout), place(layer, Site.SELF_ATTENTION)


def _or_none(tensor: Tensor) -> Tensor | None:
    """What a kernel gets for a tensor that may be empty, and then is not used."""
    return tensor if tensor.numel() else None


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    sizes = Sizes(*flat[9])
    return q.new_empty(q.shape), _kept(q, sizes, sizes.one_tile(q.dtype, q.shape[2]))


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, sizes, scale, dropout, layer = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:3], output[1], *tensors[3:])
    ctx.options = (sizes, scale, dropout, layer)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * (9 + len(ctx.options))
    if grad is None:
        return (None, None, None, *rest)
    return (*_backward(grad, *ctx.saved_tensors, *ctx.options), *rest)


_forward = define(
    f"self_attention(Tensor q, Tensor k, Tensor v, {_LAYOUT}) -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    Gradient(_differentiate, _save),
)
_backward = define(
    f"self_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, {_LAYOUT})"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
