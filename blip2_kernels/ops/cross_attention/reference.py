"""The plain truth: gather the keys and values of each sample's image, attend densely."""

import torch
from torch import Tensor

from ..dense_attention import attend
from ..philox import Site, dropout_attention


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
    index = torch.arange(len(q), device=q.device) if image_index is None else image_index.long()
    if visible is None:
        allowed = torch.ones((), dtype=torch.bool, device=q.device)
    else:
        hidden = ~visible[:, :, None, None]
        # 0 · NaN would leak out of padding tokens, so they are blanked, not only masked.
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
        allowed = visible[index][:, None, None, :]

    def drop(probs: Tensor) -> Tensor:
        ordinals = torch.arange(k.shape[1], dtype=torch.int32, device=q.device)
        keys = (dropout_key, row_keys, ordinals)
        return dropout_attention(probs, dropout, *keys, layer=layer, site=Site.CROSS_ATTENTION)

    query, key, value = (t.transpose(1, 2) for t in (q, k[index], v[index]))
    return attend(query, key, value, allowed, scale, drop if dropout > 0 else None).transpose(1, 2)
