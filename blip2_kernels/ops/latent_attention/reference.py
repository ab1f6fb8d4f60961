"""The plain truth: gather the features of each sample's image, attend densely."""

import torch
from torch import Tensor

from ..dense_attention import attend


def latent_attention_reference(
    q: Tensor, features: Tensor, image_index: Tensor | None, visible: Tensor | None, *, scale: float
) -> Tensor:
    """See `latent_attention`; `visible` is bool [images, tokens] or None."""
    if visible is None:
        visible = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    # 0 · NaN would leak out of hidden tokens, so they are blanked, not only masked.
    features = features.masked_fill(~visible[:, :, None], 0)
    if image_index is not None:
        index = image_index.long()
        features, visible = features[index], visible[index]
    one_head = features[:, None]
    return attend(q[:, None], one_head, one_head, visible[:, None, None, :], scale)[:, 0]
