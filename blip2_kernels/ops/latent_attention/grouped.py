"""Backend `torch`: plain matrix products, one image at a time on the CPU."""

import torch
from torch import Tensor

from ...checks import values_are_free
from ..dense_attention import attend_torch
from ..linear import linear


def latent_attention_grouped(
    q: Tensor, features: Tensor, image_index: Tensor | None, visible: Tensor | None, *, scale: float
) -> Tensor:
    """See `latent_attention`; `visible` is bool [images, tokens] or None."""
    if values_are_free(q.device):
        return _image_by_image(q, features, image_index, visible, scale)
    if visible is not None:
        features = features.masked_fill(~visible[:, :, None], 0)
    samples, rows = q.shape[:2]
    if features.shape[0] == 1 and samples > 1:
        # One image: its samples are stacked as one long query, so that the features are read once.
        return _attend(q.flatten(0, 1)[None], features, visible, scale).unflatten(1, (samples, rows))[0]
    if image_index is not None:
        index = image_index.long()
        features = features.index_select(0, index)
        visible = visible.index_select(0, index) if visible is not None else None
    return _attend(q, features, visible, scale)


def _attend(q: Tensor, features: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    one_head = features[:, None]
    mask = None if visible is None else visible[:, None, None, :].expand(-1, 1, q.shape[1], -1)
    return attend_torch(q[:, None], one_head, one_head, mask, scale)[:, 0]


def _image_by_image(
    q: Tensor, features: Tensor, image_index: Tensor | None, visible: Tensor | None, scale: float
) -> Tensor:
    """No feature is copied for the samples that share it, and hidden tokens are never touched.

    With half precision this is also 1.5 times as fast as the CPU's fused attention (bf16, 384 rows, 257
    tokens, width 1408, one core with avx512_bf16).
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32

    def read(rows: Tensor, tokens: Tensor) -> Tensor:
        scores = linear(rows.to(wide), tokens.to(wide)).mul_(scale)
        return linear(scores.softmax(-1).to(q.dtype), tokens.t())

    if len(features) == 1 and visible is None and features.numel() and q.numel():
        return read(q.flatten(0, 1), features[0]).view(q.shape)  # nothing to put together
    out = torch.empty(q.shape, dtype=q.dtype)  # every sample looks at some image
    for image, tokens in enumerate(features):
        if visible is not None and not bool(visible[image].all()):
            tokens = tokens[visible[image]]
        looking = slice(image, image + 1) if image_index is None else (image_index == image).nonzero()[:, 0]
        rows = q[looking].flatten(0, 1)
        if tokens.numel() == 0:
            out[looking] = 0
        elif rows.numel():
            out[looking] = read(rows, tokens).view(-1, *q.shape[1:])
    return out
