"""Backend `torch`: the plain expression, over as many images at a time as keep the scores small."""

import torch
from torch import Tensor

MAX_SCORES = 1 << 22
"""Dot products held at a time (16 MiB in fp32), unless one image alone has more."""


def image_text_similarity_chunked(image_feats: Tensor, text_feats: Tensor) -> Tensor:
    """See `image_text_similarity`; the backward holds no more scores at a time than the forward."""
    queries, texts = image_feats.shape[1], text_feats.shape[0]
    wide = torch.promote_types(image_feats.dtype, torch.float32)
    columns = text_feats.to(wide).t()
    images = max(1, MAX_SCORES // max(queries * texts, 1))
    best = [_best(chunk.to(wide), columns) for chunk in image_feats.split(images)]
    return (best[0] if len(best) == 1 else torch.cat(best)).to(image_feats.dtype)


def _best(image_feats: Tensor, columns: Tensor) -> Tensor:
    scores = image_feats @ columns
    if scores.requires_grad:
        return scores.max(dim=1).values
    return scores.amax(dim=1)
