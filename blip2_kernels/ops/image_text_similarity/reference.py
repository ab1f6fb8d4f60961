"""The plain truth: all dot products, then the maximum over the queries."""

import torch
from torch import Tensor


def image_text_similarity_reference(image_feats: Tensor, text_feats: Tensor) -> Tensor:
    """See `image_text_similarity`; holds [B, Q, T] scores."""
    # Of several equal queries max() picks the first one on the CPU, and NaN before any number. Half precision
    # would make many queries equal that are not.
    wide = torch.promote_types(image_feats.dtype, torch.float32)
    scores = image_feats.to(wide) @ text_feats.to(wide).t()
    return scores.max(dim=1).values.to(image_feats.dtype)
