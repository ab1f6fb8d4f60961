"""FLOP formulas of what `torch.utils.flop_counter` does not know: our operators, the CPU's fused attention.

    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode() as counter: ...

The package registers them with torch where torch has none of its own, so a plain counter sees everything. As
torch counts fused attention: two products in the forward; five in the backward, which computes the scores
again. Masked scores count as if computed, and a sample's text as long as the longest.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from .. import extension
from .cross_attention.triton import op as _cross_op  # noqa: F401  (defines the operators)
from .image_text_similarity.triton import op as _similarity_op  # noqa: F401
from .latent_attention.triton import op as _latent_op  # noqa: F401
from .self_attention.triton import op as _self_op

Shape = Sequence[int]


def _cpu_attention(q: Shape, k: Shape, v: Shape, *_, **__) -> int:
    return sdpa_flop_count(q, k, v)


def _cpu_attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *_, **__) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _pairs(sizes: Sequence[int]) -> int:
    """Rows times keys of a self-attention, its joint part and its unimodal text."""
    n = _self_op.Sizes(*sizes)
    joint = (n.q_queries + n.q_longest) * (n.kv_queries + n.kv_longest)
    return n.samples * (joint + n.unimodal_q_longest * n.unimodal_kv_longest)


def _self_attention(q: Shape, k: Shape, v: Shape, *options, **__) -> int:
    return 4 * _pairs(_sizes(options)) * q[1] * q[2]


def _self_attention_backward(grad: Shape, q: Shape, k: Shape, v: Shape, *options, **__) -> int:
    return 10 * _pairs(_sizes(options)) * q[1] * q[2]


def _sizes(options: tuple) -> Sequence[int]:
    """The host numbers among an operator's arguments: the only list as long as they are many."""
    count = len(_self_op.Sizes._fields)
    return next(o for o in reversed(options) if isinstance(o, list | tuple) and len(o) == count)


def _packed_attention(q: Shape, k: Shape, v: Shape, *options, **__) -> int:
    pairs = next(option for option in options if isinstance(option, int))
    return 4 * pairs * q[1] * q[2]


def _packed_attention_backward(grad: Shape, *inputs, **__) -> int:
    return 5 * _packed_attention(*inputs) // 2


def _cross_attention(q: Shape, k: Shape, *_, **__) -> int:
    samples, queries, heads, head_dim = q
    return 4 * samples * queries * k[1] * heads * head_dim


def _cross_attention_backward(grad: Shape, q: Shape, k: Shape, *_, **__) -> int:
    return 5 * _cross_attention(q, k) // 2


def _latent_attention(q: Shape, features: Shape, *_, **__) -> int:
    samples, rows, width = q
    return 4 * samples * rows * features[1] * width


def _similarity(image_feats: Shape, text_feats: Shape, *_, **__) -> int:
    images, queries, width = image_feats
    return 2 * images * queries * text_feats[0] * width


def _linear(x: Shape, weight: Shape, *_, **__) -> int:
    return 2 * math.prod(x) * weight[0]


_ours, _aten = torch.ops.blip2_kernels, torch.ops.aten

FORMULAS: dict[object, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
    _ours.self_attention: _self_attention,
    _ours.self_attention_backward: _self_attention_backward,
    _ours.cross_attention: _cross_attention,
    _ours.cross_attention_backward: _cross_attention_backward,
    _ours.latent_attention: _latent_attention,
    _ours.image_text_similarity: _similarity,
}
"""Formulas by operator, of shapes. The similarity's backward multiplies nothing: a gradient row is a sum."""

if extension.reason() is None:
    FORMULAS[_ours.packed_attention] = _packed_attention
    FORMULAS[_ours.packed_attention_backward] = _packed_attention_backward
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # not in a torch that was built without oneDNN
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = _linear

for _operator, _formula in FORMULAS.items():
    if _operator not in flop_registry:
        register_flop_formula(_operator)(_formula)
