"""The registered operators of cross-attention, and the launches behind them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....device_errors import error_flag
from ... import launching
from ...image_arguments import visibility
from ...library import Gradient, define
from ...philox import Site, keep_scale, place, threshold
from .. import launch

MAX_HEAD_DIM = 128
LOG2_E = 1.0 / math.log(2.0)


def supports(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """None where the kernels can serve, else the reason."""
    return launching.supports({"q": q, "k": k, "v": v}, MAX_HEAD_DIM)


def cross_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor | None,
    image_lengths: Tensor | None,
    image_mask: Tensor | None,
    row_keys: Tensor | None,
    *,
    dropout: float,
    dropout_key: Tensor | None,
    layer: int,
    scale: float,
) -> Tensor:
    """See `cross_attention`; `image_index` is None where sample s looks at image s."""
    visible = image_lengths
    if image_mask is not None:
        visible = (image_mask != 0).to(torch.uint8)
    key = dropout_key.to(q.device) if dropout > 0 else None
    names = row_keys.contiguous() if dropout > 0 else None
    need_backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return _forward(q, k, v, image_index, visible, names, key, scale, dropout, layer, need_backward)[0]


# ------------------------------------------------------------------------------------------------- operators


class Groups(NamedTuple):
    """Which samples look at which image (see `group.py`); all None where sample s looks at image s.

    Attributes:
        order: int32 [S], samples by image.
        start: int32 [images + 1], where each image's samples begin there.
        tile_image: int32 [tiles], -1 where a tile has nothing to do.
    """

    order: Tensor | None
    start: Tensor | None
    tile_image: Tensor | None


def _group(q: Tensor, images: int, image_index: Tensor | None, block_m: int) -> tuple[Groups, int]:
    """Group the samples by image; also the number of tiles."""
    samples, queries = q.shape[:2]
    if image_index is None:
        return Groups(None, None, None), samples * -(-queries // block_m)
    from .group import group_kernel

    tiles = samples * queries // block_m + images
    order, start, tile_image = (
        torch.empty(n, dtype=torch.int32, device=q.device) for n in (samples, images + 1, tiles)
    )
    args = (image_index.contiguous(), order, start, tile_image, error_flag(q.device), samples, images)
    constants = {"NUM_QUERIES": queries, "BLOCK_M": block_m}
    launching.launch(group_kernel, (images,), args, constants, launch.GROUP)
    return Groups(order, start, tile_image), tiles


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor | None,
    visible: Tensor | None,
    row_keys: Tensor | None,
    dropout_key: Tensor | None,
    scale: float,
    dropout: float,
    layer: int,
    need_backward: bool,
) -> tuple[Tensor, Tensor]:
    heads, head_dim = q.shape[2:]
    images, tokens = k.shape[:2]
    constants = _constants(q, image_index, visible, dropout_key) | {"WIDE": launching.wide(q, k[:1], v[:1])}
    chunks = max(1, -(-tokens // launch.CHUNK))

    def run(config: launching.Config) -> tuple[Tensor, Tensor]:
        from .forward import forward_kernel, merge_kernel

        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:3] if need_backward else 0, dtype=torch.float32, device=q.device)
        groups, tiles = _group(q, images, image_index, config["BLOCK_M"])
        programs = tiles * heads
        split = launch.split_chunks(programs, chunks, launching.processors(q.device))
        part = part_stats = None
        if split:
            size = programs * chunks * config["BLOCK_M"]
            part = torch.empty(size * constants["BLOCK_D"], dtype=torch.float32, device=q.device)
            part_stats = torch.empty(size * 2, dtype=torch.float32, device=q.device)
        factor, level, place = _dropout(dropout, layer)
        args = (
            q,
            k,
            v,
            out,
            lse,
            part,
            part_stats,
            *groups,
            visible,
            row_keys,
            dropout_key,
            tokens,
            heads,
        )
        numbers = (*launching.strides(q, k, v), scale * LOG2_E, factor, level, place)
        own = {"LSE": need_backward, "CHUNK": launch.CHUNK, "ONE_CHUNK": chunks == 1, "SPLIT": split}
        grid = (programs, chunks if split else 1)
        launching.launch(forward_kernel, grid, (*args, *numbers), constants | own, config)
        if split:
            left = (out, lse, part, part_stats, *groups, heads, chunks, factor)
            shared = ("NUM_QUERIES", "GROUPED", "WIDE", "HEAD_DIM", "BLOCK_D")
            own = {name: constants[name] for name in shared} | {"LSE": need_backward}
            merge = launch.merge_config(config["BLOCK_M"])
            launching.launch(merge_kernel, (programs,), left, own, merge)
        return out, lse

    architecture = launching.architecture(q.device)
    configs = launch.FORWARD.configs(architecture, launch.key(q.dtype, head_dim))
    compiled_for = (q.dtype, chunks == 1, need_backward, *constants.values())
    return launching.first_that_fits("cross_attention", q.device, compiled_for, configs, run)


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    image_index: Tensor | None,
    visible: Tensor | None,
    row_keys: Tensor | None,
    dropout_key: Tensor | None,
    scale: float,
    dropout: float,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    queries, heads, head_dim = q.shape[1:]
    images, tokens = k.shape[:2]
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    constants = _constants(q, image_index, visible, dropout_key)
    constants["WIDE"] = launching.wide(q, k[:1], v[:1], grad)
    compiled_for = (q.dtype, *constants.values())
    numbers = (*launching.strides(q, k, v, grad), scale, scale * LOG2_E, *_dropout(dropout, layer))

    def run(config: launching.Config) -> tuple[Tensor, Tensor, Tensor]:
        from .backward import backward_keys_kernel, backward_rows_kernel

        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        # Written and read only where several tiles look at an image.
        delta = torch.empty_like(lse)
        groups, tiles = _group(q, images, image_index, config["BLOCK_M"])
        given = (visible, row_keys, dropout_key, tokens, heads)
        args = (q, k, v, grad, lse, delta, dq, dk, dv, *groups, *given, *numbers)
        launching.launch(backward_rows_kernel, (tiles * heads,), args, constants, config)
        if image_index is None and queries <= config["BLOCK_M"]:
            return dq, dk, dv

        def run_keys(own: launching.Config) -> None:
            blocks = -(-tokens // own["BLOCK_N"])
            splits = launch.key_splits(images * heads, blocks, launching.processors(q.device))
            args = (
                q,
                k,
                v,
                grad,
                lse,
                delta,
                dk,
                dv,
                groups.order,
                groups.start,
                *given,
                splits,
                *numbers,
            )
            owned = {"OWNED_ROWS": config["BLOCK_M"]}
            grid = (images * splits * heads,)
            launching.launch(backward_keys_kernel, grid, args, constants | owned, own)

        key_configs = launch.BACKWARD_KEYS.configs(architecture, table_key)
        name = "cross_attention_backward (keys)"
        launching.first_that_fits(name, q.device, compiled_for, key_configs, run_keys)
        return dq, dk, dv

    architecture, table_key = launching.architecture(q.device), launch.key(q.dtype, head_dim)
    table = launch.BACKWARD_ALONE if image_index is None else launch.BACKWARD_SHARED
    configs = table.configs(architecture, table_key)
    return launching.first_that_fits("cross_attention_backward", q.device, compiled_for, configs, run)


def _constants(
    q: Tensor, image_index: Tensor | None, visible: Tensor | None, key: Tensor | None
) -> dict[str, Any]:
    head_dim = q.shape[3]
    return {
        "NUM_QUERIES": q.shape[1],
        "GROUPED": image_index is not None,
        "VISIBLE": visibility(visible),
        "DROPOUT": key is not None,
        "PRECISION": launching.input_precision(q.dtype),
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(launching.SMALLEST_TILE, launching.power_of_two(head_dim)),
    }


def _dropout(dropout: float, layer: int) -> tuple[float, int, int]:
    """The factor of a kept probability, the threshold below which one is dropped, and where in the model."""
    return keep_scale(dropout), threshold(dropout), place(layer, Site.CROSS_ATTENTION)


def _fake_forward(q: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    need_backward = inputs[-1]
    return q.new_empty(q.shape), q.new_empty(q.shape[:3] if need_backward else 0, dtype=torch.float32)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, dropout, layer, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors[:3], output[1], *tensors[3:])
    ctx.options = (scale, dropout, layer)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 8
    if grad is None:
        return (None, None, None, *rest)
    return (*_backward(grad, *ctx.saved_tensors, *ctx.options), *rest)


_OPTIONS = (
    "Tensor? image_index, Tensor? visible, Tensor? row_keys, Tensor? dropout_key,"
    " float scale, float dropout, int layer"
)
_forward = define(
    f"cross_attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}, bool need_backward) -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    Gradient(_differentiate, _save),
)
_backward = define(
    f"cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
