"""Samples that share images, stacked by image: what both torch implementations do where counts are free."""

from collections.abc import Callable

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""From q [1, rows, heads, head_dim], k and v [1, tokens, heads, head_dim], visible bool [1, tokens] or None,
row keys [1, rows] or None to [1, rows, heads, head_dim]."""


def image_by_image(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_index: Tensor,
    visible: Tensor | None,
    row_keys: Tensor | None = None,
) -> Tensor:
    """Samples sorted by image, each image's stacked: its keys and values are read in place, once.

    Where every sample has a copy of them, copies and their gradients are most of what a step remembers. The
    host looks at `image_index`, which must be on the CPU and not empty.

    Args:
        attend: attention of one image's rows.
        q: [S, Q, heads, head_dim].
        k, v: [images, tokens, heads, head_dim].
        image_index: int32 [S].
        visible: bool [images, tokens], or None for all.
        row_keys: int32 [S, Q], or None where nothing is dropped.

    Returns:
        [S, Q, heads, head_dim].
    """
    samples, queries = q.shape[:2]
    order = torch.argsort(image_index, stable=True)
    counts = torch.bincount(image_index, minlength=k.shape[0]).tolist()
    stacks = q.index_select(0, order).split(counts)
    names = [None] * len(counts) if row_keys is None else row_keys.index_select(0, order).split(counts)
    outputs = []
    # unbind, not indexing: its backward stacks the gradients once instead of filling zeros for every image.
    images = zip(stacks, names, k.unbind(0), v.unbind(0), strict=True)
    for image, (stack, named, key, value) in enumerate(images):
        if len(stack):
            seen = None if visible is None else visible[image : image + 1]
            keys = None if named is None else named.flatten()[None]
            outputs.append(attend(stack.flatten(0, 1)[None], key[None], value[None], seen, keys)[0])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(samples))
    return torch.cat(outputs).unflatten(0, (samples, queries)).index_select(0, place)
