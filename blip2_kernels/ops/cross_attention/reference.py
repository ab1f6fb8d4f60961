"""The plain truth: each sample attends densely to the keys and values of its image."""

from functools import partial

import torch
from torch import Tensor

from ...checks import values_are_free
from ..dense_attention import attend
from ..philox import Site, dropout_attention
from ..recomputed import recomputed
from .by_image import image_by_image


def cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor | None,
    visible: Tensor | None,
    row_keys: Tensor | None,
    *,
    dropout: float,
    dropout_key: Tensor | None,
    layer: int,
    scale: float,
) -> Tensor:
    """See `cross_attention`; `visible` is bool [images, tokens] or None for all, `row_keys` needed where
    dropout > 0.
    """
    compute = partial(_cross_attention, dropout=dropout, layer=layer, scale=scale)
    tensors = (q, k, v, image_index, visible, row_keys, dropout_key)
    # Probabilities, dropped ones and their mask are three more of what a training step would keep.
    return recomputed(compute, *tensors) if dropout > 0 else compute(*tensors)


def _cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor | None,
    visible: Tensor | None,
    row_keys: Tensor | None,
    dropout_key: Tensor | None,
    *,
    dropout: float,
    layer: int,
    scale: float,
) -> Tensor:
    if visible is not None:
        # 0 · NaN would leak out of padding tokens, so they are blanked, not only masked.
        hidden = ~visible[:, :, None, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    ordinals = torch.arange(k.shape[1], dtype=torch.int32, device=q.device)

    def attend_own(
        q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, row_keys: Tensor | None
    ) -> Tensor:
        """Sample s looks at image s."""
        if visible is None:
            allowed = torch.ones((), dtype=torch.bool, device=q.device)
        else:
            allowed = visible[:, None, None, :]

        def drop(probs: Tensor) -> Tensor:
            keys = (dropout_key, row_keys, ordinals)
            return dropout_attention(probs, dropout, *keys, layer=layer, site=Site.CROSS_ATTENTION)

        query, key, value = (t.transpose(1, 2) for t in (q, k, v))
        return attend(query, key, value, allowed, scale, drop if dropout > 0 else None).transpose(1, 2)

    if image_index is None:
        return attend_own(q, k, v, visible, row_keys)
    if len(q) and values_are_free(q.device):
        return image_by_image(attend_own, q, k, v, image_index, visible, row_keys)
    index = image_index.long()
    seen = None if visible is None else visible.index_select(0, index)
    return attend_own(q, k.index_select(0, index), v.index_select(0, index), seen, row_keys)
