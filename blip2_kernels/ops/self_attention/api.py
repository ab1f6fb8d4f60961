"""`self_attention`: what it means, what it refuses, which backend runs it."""

from functools import partial

import torch
from torch import Tensor

from ...checks import describe, values_are_free
from ...layout import TokenLayout
from ...mask import AttentionMask
from ..backends import choose_backend
from ..dense_attention import check_dropout, check_projections, check_scale, no_autocast
from . import compiled, sdpa
from .reference import self_attention_reference
from .triton import op as triton_op


def self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: TokenLayout,
    kv_layout: TokenLayout,
    mask: AttentionMask,
    *,
    dropout: float = 0.0,
    dropout_key: Tensor | None = None,
    layer: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Masked self-attention over query and text rows (BLIP-2, section 3.1 and figure 2).

    Args:
        q: [q_layout.rows, heads, head_dim], fp16, bf16, fp32 or fp64; may be a strided view.
        k, v: [kv_layout.rows, heads, head_dim], same dtype and device.
        q_layout: where the attending rows lie. They are a subset of the key side's rows, known by their row
            keys: the same layout, or what `kv_layout.select(...)` keeps of it (dead rows, cached decoding).
        kv_layout: where the rows attended to lie; the same samples and number of text segments.
        mask: one mode a text segment.
        dropout: probability in [0, 1) of dropping an attention probability, by the Philox contract of
            `blip2_kernels.ops.philox`.
        dropout_key: int64 [] from `draw_key`; needed where dropout > 0.
        layer: number of the layer, part of the dropout counter.
        scale: factor of the scores; default head_dim ** -0.5.
        backend: "auto" (the first of `triton`, `csrc`, `torch`, `reference` that can serve), or one of them;
            a named backend that cannot serve raises. `csrc` is for the CPU, computes in fp32 and rounds once.

    Returns:
        [q_layout.rows, heads, head_dim] in q's dtype. A row that may attend to nothing gives 0 with zero
        gradient. Padding rows of a padded layout attend as a real row in their place would. The
        kernels do not read their k and v, and what their q holds reaches no real row's output; but gradients
        want it finite, since a padding row's part of dk and dv is 0 * NaN otherwise.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message, before
            anything is computed.
    """
    check_projections(q, k, v, ["rows"], ["rows"])
    _check_layouts(q, k, q_layout, kv_layout, mask)
    check_dropout(dropout, dropout_key, layer)
    scale = check_scale(scale, q.shape[-1])
    candidates = {
        "triton": partial(triton_op.supports, q, k, v, kv_layout, dropout),
        "csrc": partial(compiled.supports, q, kv_layout),
        "torch": partial(sdpa.supports, dropout),
        "reference": lambda: None,
    }
    chosen = choose_backend(backend, candidates)
    options = {"dropout": dropout, "dropout_key": dropout_key, "layer": layer, "scale": scale}
    with no_autocast(q.device):
        if chosen == "triton":
            return triton_op.self_attention_triton(q, k, v, q_layout, kv_layout, mask, **options)
        if chosen == "csrc":
            return compiled.self_attention_compiled(q, k, v, q_layout, kv_layout, mask, **options)
        if chosen == "torch":
            return sdpa.self_attention_sdpa(q, k, v, q_layout, kv_layout, mask, scale=scale)
        return self_attention_reference(q, k, v, q_layout, kv_layout, mask, **options)


def _check_layouts(
    q: Tensor, k: Tensor, q_layout: TokenLayout, kv_layout: TokenLayout, mask: AttentionMask
) -> None:
    if not isinstance(mask, AttentionMask):
        raise TypeError(f"mask: expected an AttentionMask, got {describe(mask)}")
    for name, layout, argument, tensor in (("q_layout", q_layout, "q", q), ("kv_layout", kv_layout, "k", k)):
        if not isinstance(layout, TokenLayout):
            raise TypeError(f"{name}: expected a TokenLayout, got {describe(layout)}")
        mask.check(layout, name)
        if layout.rows != tensor.shape[0]:
            raise ValueError(f"{argument}: expected {layout.rows} rows, as {name} has, got {tensor.shape[0]}")
        if layout.device != tensor.device:
            raise ValueError(f"{name}: expected a layout on {tensor.device}, got one on {layout.device}")
    if q_layout.samples != kv_layout.samples:
        raise ValueError(
            f"kv_layout: expected {q_layout.samples} samples, as q_layout has, got {kv_layout.samples}"
        )
    if q_layout.num_queries not in (0, kv_layout.num_queries):
        expected = f"0 or {kv_layout.num_queries} queries a sample, as kv_layout has"
        raise ValueError(f"q_layout: expected {expected}, got {q_layout.num_queries}")
    _check_subset(q_layout, kv_layout)


def _check_subset(q_layout: TokenLayout, kv_layout: TokenLayout) -> None:
    """On the CPU: every attending row is one of the key side. What the layouts tell by themselves is not
    looked up again: 64 samples of 32 queries and 20 tokens cost 0.1 ms."""
    names, others = q_layout.row_keys, kv_layout.row_keys
    if names is others or q_layout.selected_from is others or not values_are_free(names.device):
        return
    strangers = (~torch.isin(names, others)).nonzero()
    if len(strangers):
        row = int(strangers[0])
        raise ValueError(
            f"q_layout: expected rows of kv_layout (by their row keys), got another in row {row}"
        )
