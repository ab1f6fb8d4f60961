"""`cross_attention`: what it means, what it refuses, which backend runs it."""

from functools import partial

import torch
from torch import Tensor

from ...checks import check_bool, check_tensor
from ...layout import padded_row_keys
from ..backends import choose_backend
from ..dense_attention import check_dropout, check_projections, check_scale, no_autocast
from ..image_arguments import check_image_index, check_image_tokens, visible_tokens
from . import sdpa
from .reference import cross_attention_reference
from .triton import op as triton_op


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    image_index: Tensor | None = None,
    image_lengths: Tensor | None = None,
    image_mask: Tensor | None = None,
    row_keys: Tensor | None = None,
    dropout: float = 0.0,
    dropout_key: Tensor | None = None,
    layer: int = 0,
    scale: float | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """Attention of query tokens to image tokens (BLIP-2, section 3.1).

    Args:
        q: [S, Q, heads, head_dim], fp16, bf16, fp32 or fp64; may be a strided view.
        k, v: [images, tokens, heads, head_dim], same dtype and device; any strides.
        image_index: int32 [S], the image each sample looks at; default sample s looks at image s. Several
            samples may share an image, and an image nobody looks at gets a zero gradient.
        image_lengths: int32 [images], visible tokens of each image, from the first; default all.
        image_mask: 0/1 [images, tokens] instead of lengths, for any pattern.
        row_keys: int32 [S, Q], names of the query rows in the dropout counters; default those of samples 0
            … S - 1.
        dropout: probability in [0, 1) of dropping an attention probability, by the Philox contract of
            `blip2_kernels.ops.philox` (an image token goes by its ordinal).
        dropout_key: int64 [] from `draw_key`; needed where dropout > 0.
        layer: number of the layer, part of the dropout counter.
        scale: factor of the scores; default head_dim ** -0.5.
        backend: "auto" (the first of `triton`, `torch`, `reference` that can serve), or one of them; a named
            backend that cannot serve raises.
        validate: check the values of device tensors too, at the price of a synchronisation. CPU tensors are
            always checked. Unchecked on a device, a wrong image_index is taken for the nearest image and
            reported later (`check_device_errors`); lengths are clamped to [0, tokens] and whatever is not 0
            in a mask counts as 1, without a report.

    Returns:
        [S, Q, heads, head_dim] in q's dtype; 0 with zero gradient where an image has no visible token.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message, before
            anything is computed.
    """
    check_projections(q, k, v, ["S", "Q"], ["images", "tokens"])
    samples, queries = q.shape[:2]
    images, tokens = k.shape[:2]
    check_bool("validate", validate)
    check_image_index(image_index, samples, images, q.device, validate)
    check_image_tokens(image_lengths, image_mask, images, tokens, q.device, validate)
    if row_keys is not None:
        check_tensor("row_keys", row_keys, [samples, queries], [torch.int32], q.device)
    check_dropout(dropout, dropout_key, layer)
    scale = check_scale(scale, q.shape[-1])
    candidates = {
        "triton": partial(triton_op.supports, q, k, v),
        "torch": partial(sdpa.supports, dropout),
        "reference": lambda: None,
    }
    chosen = choose_backend(backend, candidates)
    if row_keys is None and dropout > 0:
        row_keys = padded_row_keys(samples, queries, device=q.device)
    options = {"dropout": dropout, "dropout_key": dropout_key, "layer": layer, "scale": scale}
    with no_autocast(q.device):
        if chosen == "triton":
            seen = (image_lengths, image_mask)
            return triton_op.cross_attention_triton(q, k, v, image_index, *seen, row_keys, **options)
        visible = visible_tokens(image_lengths, image_mask, tokens)
        if chosen == "torch":
            return sdpa.cross_attention_sdpa(q, k, v, image_index, visible, scale=scale)
        return cross_attention_reference(q, k, v, image_index, visible, row_keys, **options)
