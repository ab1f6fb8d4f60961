"""A pass on padded rows, as the plain models are called: [S, L, hidden] in, [S, L, hidden] out."""

import dataclasses

import torch
from torch import Tensor

from ..layout import CAPTION_STREAM, TEXT_STREAM, TokenLayout
from ..mask import AttentionMask, MaskMode
from .encoder import FusedEncoder
from .images import ImageKeyValues
from .plan import Saving


def is_expanded(t: Tensor) -> bool:
    """Whether all samples of a batch [S, ...] are one."""
    return t.dim() > 0 and (t.shape[0] == 1 or t.stride(0) == 0)


def encode_padded(
    encoder: FusedEncoder,
    queries: Tensor | None,
    text: Tensor | None,
    *,
    samples: int,
    text_mask: Tensor | None = None,
    images: ImageKeyValues | None = None,
    mode: MaskMode = MaskMode.BIDIRECTIONAL,
    row_keys: Tensor | None = None,
    dropout_key: Tensor | None = None,
    queries_only: bool = False,
) -> Tensor:
    """Encode embedded rows that lie as a plain Q-Former takes them.

    Args:
        encoder: of the Q-Former.
        queries: [S, Q, hidden] before the first LayerNorm, or [1, Q, hidden] where all samples have the same;
            None for text alone.
        text: [S, T, hidden] before the first LayerNorm, or None.
        samples: S.
        text_mask: [S, T], which text rows are real; default all.
        images: of all samples, or one image for all; needed with queries.
        mode: which of the paper's masks joins queries and text.
        row_keys: int32 [S, Q + T], names of the rows for dropout; default those of the layout.
        dropout_key: int64 [], Philox key; default a new one where the Q-Former drops.
        queries_only: return the query rows only, so that text rows that nobody reads are left out.

    Returns:
        [S, Q + T, hidden], queries first, or [S, Q, hidden]. Padding rows hold what a row in their place
        would.
    """
    device = (text if queries is None else queries).device
    count = 0 if queries is None else queries.shape[1]
    stream = CAPTION_STREAM if mode == MaskMode.MULTIMODAL_CAUSAL else TEXT_STREAM
    if text is not None and text_mask is None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=device)
    layout = TokenLayout.from_attention_masks(
        count,
        () if text is None else [text_mask],
        samples=samples,
        padded=not queries_only or not encoder.uses(Saving.PACKED_TEXT),
        text_streams=None if text is None else [stream],
        device=device,
    )
    if row_keys is not None:
        texts = () if text is None else [row_keys[:, count:, None]]
        layout = dataclasses.replace(layout, row_keys=layout.pack(row_keys[:, :count, None], texts)[:, 0])
    index = None
    if queries is not None and images is not None and images.images == 1 < samples:
        index = torch.zeros(samples, dtype=torch.int32, device=device)
    encoded = encoder(
        queries,
        () if text is None else [text.flatten(0, 1)[layout.texts[0].source]],
        layout,
        AttentionMask(() if text is None else (mode,)),
        images,
        index,
        keep_texts=() if text is None else ("none" if queries_only else "all",),
        dropout_key=dropout_key,
    )
    parts = [] if queries is None else [encoded.queries]
    if text is not None and not queries_only:
        parts.append(encoded.padded_text())
    return torch.cat(parts, dim=1)
