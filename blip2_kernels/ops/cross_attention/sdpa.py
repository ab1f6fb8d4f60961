"""Backend `torch`: cross-attention through scaled_dot_product_attention."""

from torch import Tensor

from ...checks import values_are_free
from ..dense_attention import attend_torch
from .by_image import image_by_image


def supports(dropout: float) -> str | None:
    """None where SDPA can serve, else the reason."""
    if dropout > 0:
        return "scaled_dot_product_attention cannot take the Philox dropout mask"
    return None


def cross_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, image_index: Tensor | None, visible: Tensor | None, *, scale: float
) -> Tensor:
    """See `cross_attention`; `image_index` is None where sample s looks at image s; dropout is not served."""
    samples, queries = q.shape[:2]
    if visible is not None:
        hidden = ~visible[:, :, None, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    if k.shape[0] == 1 and samples > 1:
        # One image: its samples are stacked as one long query, so that keys and values are read once.
        stacked = _attend(q.flatten(0, 1)[None], k, v, visible, scale)
        return stacked.unflatten(1, (samples, queries))[0]
    if image_index is not None:
        if samples and values_are_free(q.device):
            return image_by_image(
                lambda q, k, v, seen, _: _attend(q, k, v, seen, scale), q, k, v, image_index, visible
            )
        index = image_index.long()
        k, v = k.index_select(0, index), v.index_select(0, index)
        visible = visible.index_select(0, index) if visible is not None else None
    return _attend(q, k, v, visible, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    mask = None if visible is None else visible[:, None, None, :].expand(-1, 1, q.shape[1], -1)
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    return attend_torch(query, key, value, mask, scale).transpose(1, 2)
