"""Backend `torch`: cross-attention through scaled_dot_product_attention."""

import torch
from torch import Tensor

from ...checks import values_are_free
from ..dense_attention import attend_torch


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
            return _image_by_image(q, k, v, image_index, visible, scale)
        index = image_index.long()
        k, v = k.index_select(0, index), v.index_select(0, index)
        visible = visible.index_select(0, index) if visible is not None else None
    return _attend(q, k, v, visible, scale)


def _image_by_image(
    q: Tensor, k: Tensor, v: Tensor, image_index: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """Samples sorted by image, each image's stacked: its keys and values are read in place, once.

    Where every sample has a copy of them, copies and their gradients are most of what a step remembers. On
    the CPU the counts cost no synchronisation.
    """
    samples, queries = q.shape[:2]
    order = torch.argsort(image_index, stable=True)
    counts = torch.bincount(image_index, minlength=k.shape[0]).tolist()
    stacks = q.index_select(0, order).split(counts)
    outputs = []
    # unbind, not indexing: its backward stacks the gradients once instead of filling zeros for every image.
    for image, (stack, key, value) in enumerate(zip(stacks, k.unbind(0), v.unbind(0), strict=True)):
        if len(stack):
            seen = None if visible is None else visible[image : image + 1]
            outputs.append(_attend(stack.flatten(0, 1)[None], key[None], value[None], seen, scale)[0])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(samples))
    return torch.cat(outputs).unflatten(0, (samples, queries)).index_select(0, place)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    mask = None if visible is None else visible[:, None, None, :].expand(-1, 1, q.shape[1], -1)
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))
    return attend_torch(query, key, value, mask, scale).transpose(1, 2)
