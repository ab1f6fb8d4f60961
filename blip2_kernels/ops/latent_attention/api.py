"""`latent_attention`: what it means, what it refuses, which backend runs it."""

from functools import partial

import torch
from torch import Tensor

from ...checks import check_bool, check_tensor, describe
from ..backends import choose_backend
from ..dense_attention import DTYPES, no_autocast
from ..image_arguments import check_image_index, check_image_tokens, visible_tokens
from .grouped import latent_attention_grouped
from .reference import latent_attention_reference
from .triton import op as triton_op


def latent_attention(
    q: Tensor,
    features: Tensor,
    *,
    scale: float,
    image_index: Tensor | None = None,
    image_lengths: Tensor | None = None,
    image_mask: Tensor | None = None,
    backend: str = "auto",
    validate: bool = False,
) -> Tensor:
    """Attention to image features that are keys and values of all heads at once, for inference.

        out[s] = softmax(q[s] features[image]ᵀ * scale) features[image]

    Cross-attention (BLIP-2, section 3.1) with the key projection moved to the queries and the value
    projection behind the sum: (q W_kᵀ) Iᵀ are its scores and (P I) W_v its context, so the keys and values of
    a long image never exist.

    Args:
        q: [S, R, width], fp16, bf16, fp32 or fp64: the R = queries * heads rows of a sample, each already in
            the features' space.
        features: [images, tokens, width], same dtype and device.
        scale: factor of the scores. The width says nothing about it: it is head_dim ** -0.5 of the attention
            that was absorbed.
        image_index: int32 [S], the image each sample looks at; default sample s looks at image s. Several
            samples may share an image.
        image_lengths: int32 [images], visible tokens of each image, from the first; default all.
        image_mask: 0/1 [images, tokens] instead of lengths, for any pattern.
        backend: "auto" (the first of `triton`, `torch`, `reference` that can serve), or one of them; a named
            backend that cannot serve raises.
        validate: check the values of device tensors too, at the price of a synchronisation. CPU tensors are
            always checked. Unchecked on a device, a wrong image_index is taken for the nearest image and
            reported later (`check_device_errors`); lengths are clamped to [0, tokens] and whatever is not 0
            in a mask counts as 1, without a report.

    Returns:
        [S, R, width] in q's dtype; 0 where an image has no visible token. Scores and sums are fp32 (fp64 for
        fp64 inputs), probabilities have q's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message, before
            anything is computed; also a tensor that requires a gradient where gradients are recorded: there
            is no backward.
    """
    check_tensor("q", q, ["S", "R", "width"], DTYPES)
    samples, _, width = q.shape
    if width == 0:
        raise ValueError(f"q: expected at least one channel, got {describe(q)}")
    check_tensor("features", features, ["images", "tokens", width], [q.dtype], q.device)
    images, tokens = features.shape[:2]
    check_bool("validate", validate)
    check_image_index(image_index, samples, images, q.device, validate)
    check_image_tokens(image_lengths, image_mask, images, tokens, q.device, validate)
    _check_scale(scale)
    if torch.is_grad_enabled():
        for name, tensor in (("q", q), ("features", features)):
            if tensor.requires_grad:
                expected = "a tensor without gradient, or torch.no_grad(): there is no backward"
                raise ValueError(f"{name}: expected {expected}, got one with requires_grad=True")
    candidates = {
        "triton": partial(triton_op.supports, q, features),
        "torch": lambda: None,
        "reference": lambda: None,
    }
    chosen = choose_backend(backend, candidates)
    with no_autocast(q.device):
        if chosen == "triton":
            seen = (image_lengths, image_mask)
            return triton_op.latent_attention_triton(q, features, image_index, *seen, scale=float(scale))
        visible = visible_tokens(image_lengths, image_mask, tokens)
        plain = latent_attention_grouped if chosen == "torch" else latent_attention_reference
        return plain(q, features, image_index, visible, scale=float(scale))


def _check_scale(scale: object) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale: expected a finite number, got {describe(scale)}")
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale: expected a finite number, got {scale}")
