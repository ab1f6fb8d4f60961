"""The registered operators of masked self-attention, and the launches behind them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....layout import TokenLayout
from ....mask import AttentionMask, MaskMode
from ... import launching
from ...library import define, differentiate
from ...philox import LANES, Site, keep_scale, threshold
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
        q_queries, kv_queries: queries a sample.
        need_backward: 1 if the forward must leave what the backward of several blocks reads.
        causal: 1 if the joint part's text is causal.
        q_start, kv_start: first row of the joint part's text.
        q_longest, kv_longest: most rows of it in a sample.
        unimodal_…: the same of the unimodal text.
    """

    samples: int
    q_queries: int
    kv_queries: int
    need_backward: int = 1
    causal: int = 0
    q_start: int = 0
    kv_start: int = 0
    q_longest: int = 0
    kv_longest: int = 0
    unimodal_q_start: int = 0
    unimodal_kv_start: int = 0
    unimodal_q_longest: int = 0
    unimodal_kv_longest: int = 0

    def places(self) -> tuple[int, ...]:
        """Queries a sample and first text rows, in the kernels' order."""
        starts = (self.q_start, self.kv_start, self.unimodal_q_start, self.unimodal_kv_start)
        return (self.q_queries, self.kv_queries, *starts)

    def has_text(self) -> bool:
        """Whether the joint part has a text."""
        return self.kv_longest > 0 or self.q_longest > 0

    def joint_tiles(self) -> launch.Tiles:
        """The single tile that would hold the joint part of any sample."""
        rows = launch.tile_rows(self.q_queries, self.q_longest)
        return launch.Tiles(rows, launch.tile_rows(self.kv_queries, self.kv_longest))

    def unimodal_tiles(self) -> launch.Tiles:
        """The single tile that would hold the unimodal text of any sample."""
        rows = launch.tile_rows(0, self.unimodal_q_longest)
        return launch.Tiles(rows, launch.tile_rows(0, self.unimodal_kv_longest))

    def one_tile(self, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether every part of every sample is one tile."""
        limit = launch.one_tile_rows(dtype, head_dim)
        return max(*self.joint_tiles(), *self.unimodal_tiles()) <= limit


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


def _run_forward(q: Tensor, k: Tensor, v: Tensor, *layout_and_options: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, key, sizes, scale, dropout, layer = _unflatten(layout_and_options)
    heads, head_dim = q.shape[1:]
    one_tile = sizes.one_tile(q.dtype, head_dim)
    constants = _constants(q, rows, sizes, key)
    constants |= {"JOINT": sizes.q_queries > 0 or sizes.q_longest > 0, "ONE_TILE": one_tile}
    constants["WIDE"] = launching.wide(q, k, v)
    constants["UNIMODAL"] = sizes.unimodal_q_longest > 0

    def run(config: launching.Config) -> tuple[Tensor, Tensor, Tensor]:
        from .forward import forward_kernel

        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        kept = not one_tile and sizes.need_backward
        lse = torch.empty((q.shape[0], heads) if kept else 0, dtype=torch.float32, device=q.device)
        rest = torch.empty(
            q.shape if kept and q.dtype != torch.float32 else 0, dtype=q.dtype, device=q.device
        )
        joint = _blocks(sizes.q_queries, sizes.q_longest, config["BLOCK_M"]) if constants["JOINT"] else 0
        unimodal = _blocks(0, sizes.unimodal_q_longest, config["TEXT_M"])
        args = (
            q,
            k,
            v,
            out,
            _or_none(rest),
            _or_none(lse),
            *rows,
            key,
            heads,
            joint,
            *sizes.places(),
            *_strides(q, k, v),
        )
        args = (*args, scale * LOG2_E, *_dropout(dropout, layer))
        launching.launch(forward_kernel, (sizes.samples * heads, joint + unimodal), args, constants, config)
        return out, rest, lse

    architecture = launching.architecture(q.device)
    configs: tuple[launching.Config, ...]
    if one_tile:
        configs = (launch.one_tile_config(sizes.joint_tiles(), sizes.unimodal_tiles(), q.dtype),)
    else:
        table = launch.FORWARD
        configs = table.configs(architecture, launch.block_key(q.dtype, head_dim))
    return launching.first_that_fits("self_attention", q.device, configs, run)


def _run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    rest: Tensor,
    lse: Tensor,
    *layout_and_options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, key, sizes, scale, dropout, layer = _unflatten(layout_and_options)
    heads, head_dim = q.shape[1:]
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    constants = _constants(q, rows, sizes, key)
    constants["WIDE"] = launching.wide(q, k, v, grad)
    constants |= {"JOINT": sizes.q_queries + sizes.kv_queries > 0 or sizes.has_text()}
    constants["UNIMODAL"] = sizes.unimodal_kv_longest > 0
    numbers = (*sizes.places(), *_strides(q, k, v, grad), scale, scale * LOG2_E, *_dropout(dropout, layer))

    def run(config: launching.Config) -> tuple[Tensor, Tensor, Tensor]:
        from .backward import backward_keys_kernel, backward_rows_kernel, backward_tile_kernel

        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        gradients = dq, dk, dv
        if one_tile:
            args = (q, k, v, grad, *gradients, *rows, key, heads, *numbers)
            grid = (sizes.samples * heads, constants["JOINT"] + constants["UNIMODAL"])
            launching.launch(backward_tile_kernel, grid, args, constants, config)
            return gradients
        inputs = (q, k, v, grad, out, _or_none(rest), lse)
        joint = _blocks(sizes.q_queries, sizes.q_longest, config["BLOCK_M"])
        blocks = joint + _blocks(0, sizes.unimodal_q_longest, config["BLOCK_M"])
        args = (*inputs, dq, *rows, key, heads, joint, *numbers)
        launching.launch(backward_rows_kernel, (sizes.samples * heads, blocks), args, constants, config)
        joint = _blocks(sizes.kv_queries, sizes.kv_longest, config["BLOCK_N"])
        blocks = joint + _blocks(0, sizes.unimodal_kv_longest, config["BLOCK_N"])
        args = (*inputs, dk, dv, *rows, key, heads, joint, *numbers)
        launching.launch(backward_keys_kernel, (sizes.samples * heads, blocks), args, constants, config)
        return gradients

    one_tile = sizes.one_tile(q.dtype, head_dim)
    architecture = launching.architecture(q.device)
    configs: tuple[launching.Config, ...]
    if one_tile:
        configs = (launch.one_tile_config(sizes.joint_tiles(), sizes.unimodal_tiles(), q.dtype),)
    else:
        table = launch.BACKWARD
        configs = table.configs(architecture, launch.block_key(q.dtype, head_dim))
    return launching.first_that_fits("self_attention_backward", q.device, configs, run)


def _unflatten(flat: tuple) -> tuple[Rows, Tensor | None, Sizes, float, float, int]:
    *rows, key, sizes, scale, dropout, layer = flat
    return Rows(*rows), key, Sizes(*sizes), scale, dropout, layer


def _constants(q: Tensor, rows: Rows, sizes: Sizes, key: Tensor | None) -> dict[str, Any]:
    head_dim = q.shape[2]
    return {
        "TEXT": sizes.has_text(),
        "CAUSAL": bool(sizes.causal),
        "DROPOUT": key is not None,
        "PRECISION": launching.input_precision(q.dtype),
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(launching.SMALLEST_TILE, launching.power_of_two(head_dim)),
    }


def _blocks(queries: int, longest: int, block: int) -> int:
    """Blocks that the longest sample's rows of a part need."""
    begin = -(-queries // LANES) * LANES if longest else queries
    return -(-(begin + longest) // block)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in launching.strides(tensor))


def _dropout(dropout: float, layer: int) -> tuple[float, int, int]:
    """The factor of a kept probability, the threshold below which one is dropped, and where in the model."""
    return keep_scale(dropout), threshold(dropout), layer * LANES + int(Site.SELF_ATTENTION)


def _or_none(tensor: Tensor) -> Tensor | None:
    """What a kernel gets for a tensor that may be empty, and then is not used."""
    return tensor if tensor.numel() else None


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    sizes = Sizes(*flat[9])
    kept = not sizes.one_tile(q.dtype, q.shape[2]) and sizes.need_backward
    rest = q.new_empty(q.shape if kept and q.dtype != torch.float32 else 0)
    return q.new_empty(q.shape), rest, q.new_empty(q.shape[:2] if kept else 0, dtype=torch.float32)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, *tensors, sizes, scale, dropout, layer = inputs
    out, rest, lse = output
    ctx.set_materialize_grads(False)
    # One tile computes its softmax again and needs neither output.
    ctx.save_for_backward(q, k, v, out if lse.numel() else lse, rest, lse, *tensors)
    ctx.options = (sizes, scale, dropout, layer)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * (9 + len(ctx.options))
    if grad is None:
        return (None, None, None, *rest)
    return (*_backward(grad, *ctx.saved_tensors, *ctx.options), *rest)


_forward = define(
    f"self_attention(Tensor q, Tensor k, Tensor v, {_LAYOUT}) -> (Tensor, Tensor, Tensor)",
    _run_forward,
    _fake_forward,
)
_backward = define(
    "self_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor rest, Tensor lse, "
    f"{_LAYOUT}) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
differentiate("self_attention", _differentiate, _save)
