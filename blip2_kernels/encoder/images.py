"""What the images contribute to the cross-attention layers, made once for every pass that looks at them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_binary, check_tensor
from ..layout import MASK_DTYPES


@dataclass(frozen=True)
class ImageKeyValues:
    """Keys and values of a set of images for each layer of a Q-Former.

    Attributes:
        layers: one entry a layer: (key, value), each [images, tokens, heads, head_dim], or None where the
            layer has no cross-attention.
        images: how many images; samples point at them through `image_index`.
        mask: 0/1 [images, tokens], or None where every token is visible.
    """

    layers: tuple[tuple[Tensor, Tensor] | None, ...]
    images: int
    mask: Tensor | None = None


def project_images(
    layers: nn.ModuleList, heads: int, features: Tensor, mask: Tensor | None = None
) -> ImageKeyValues:
    """Project image features to every cross-attention layer's keys and values.

    Args:
        layers: the Q-Former's layers.
        heads: attention heads.
        features: [images, tokens, width], cast to the weights' dtype.
        mask: 0/1 [images, tokens] of visible tokens; default all.

    Raises:
        TypeError, ValueError: features or mask of the wrong kind, shape or width.
    """
    check_tensor("encoder_hidden_states", features, ["images", "tokens", "width"])
    images, tokens, width = features.shape
    if mask is not None:
        check_tensor("encoder_attention_mask", mask, [images, tokens], MASK_DTYPES, features.device)
        check_binary("encoder_attention_mask", mask)
    projected: list[tuple[Tensor, Tensor] | None] = []
    for layer in layers:
        cross = getattr(layer, "crossattention", None)
        if cross is None:
            projected.append(None)
            continue
        key, value = cross.attention.key, cross.attention.value
        if width != key.in_features:
            expected = f"[images, tokens, {key.in_features}]"
            raise ValueError(f"encoder_hidden_states: expected {expected}, got {list(features.shape)}")
        cast = (
            features.to(key.weight.dtype) if not torch.is_autocast_enabled(features.device.type) else features
        )
        projected.append(tuple(linear(cast).unflatten(-1, (heads, -1)) for linear in (key, value)))
    return ImageKeyValues(tuple(projected), images, mask)
