"""The rows that the first layer reads: queries and embedded text behind their LayerNorm and dropout.

Where the modules are as they were built, one compiled operator does it; else they are called as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import extension
from ..layout import TokenLayout
from ..ops import embed_tokens
from .epilogues import HiddenDropout, norm_reason
from .modules import plain_reason, stock_reason


def first_rows(
    norm: nn.Module,
    embeddings: nn.Module | None,
    queries: Tensor | None,
    texts: Sequence[Tensor],
    position_ids: Sequence[Tensor | None] | None,
    layout: TokenLayout,
    drop: HiddenDropout | None,
    *,
    expand_queries: bool,
) -> Tensor:
    """dropout(norm([queries, text])), [rows, hidden], in the dtype of the norm's weight.

    Args:
        norm: the LayerNorm.
        embeddings: embeds token ids; None where `texts` are embedded.
        queries: [S or 1, Q, hidden], or None.
        texts: a text segment each: token ids [S, width], or embedded rows [rows, hidden].
        position_ids: with token ids, [S or 1, width] a segment; None for 0, 1, 2 ...
        layout: where the rows lie.
        drop: None for no dropout.
        expand_queries: False for the queries of one sample only.
    """
    dtype = norm.weight.dtype
    if _is_fused(norm, embeddings, layout):
        # As the plain path casts: queries to the text's dtype, then all to the norm's.
        beside = texts[-1].dtype if texts and embeddings is None else dtype
        ids, words, positions, padding_idx = None, None, None, None
        if texts and embeddings is not None:
            ids, table = texts, embeddings.word_embeddings
            words, padding_idx = table.weight, table.padding_idx
            positions = embeddings.position_embeddings.weight
        elif texts:
            words = (texts[0] if len(texts) == 1 else torch.cat([t.to(beside) for t in texts])).to(dtype)
        return embed_tokens(
            None if queries is None else queries.to(beside).to(dtype),
            ids,
            words,
            positions,
            norm.weight,
            norm.bias,
            layout,
            position_ids=position_ids,
            expand_queries=expand_queries,
            padding_idx=padding_idx,
            eps=norm.eps,
            **({} if drop is None else {k: v for k, v in drop.options().items() if k != "row_keys"}),
        )
    parts = []
    if queries is not None:
        parts.append((queries.expand(layout.samples, -1, -1) if expand_queries else queries).flatten(0, 1))
    for i, text in enumerate(texts):
        if embeddings is not None:
            own = None if position_ids is None else position_ids[i]
            text = _embedded(embeddings, text, own, layout, i)
        parts.append(text)
    rows = parts[0] if len(parts) == 1 else torch.cat([part.to(parts[-1].dtype) for part in parts])
    rows = norm(rows.to(dtype))
    return rows if drop is None else drop(rows)


def _embedded(
    embeddings: nn.Module, ids: Tensor, positions: Tensor | None, layout: TokenLayout, segment: int
) -> Tensor:
    """The rows of a segment, [rows, hidden], by the module itself."""
    text = layout.texts[segment]
    places = text.source % max(text.width, 1)
    if positions is not None:
        places = positions.expand(ids.shape).flatten()[text.source]
    return embeddings(ids.flatten()[text.source][None], places[None])[0]


def _is_fused(norm: nn.Module, embeddings: nn.Module | None, layout: TokenLayout) -> bool:
    """Whether the compiled operator computes what these modules would."""
    if extension.device_reason(layout.device.type) is not None or norm_reason(norm) is not None:
        return False
    return embeddings is None or embeddings_reason(embeddings, norm.weight.dtype) is None


def embeddings_reason(embeddings: nn.Module, dtype: torch.dtype) -> str | None:
    """None where text embeddings are an untouched sum of words and positions of this dtype, which may be read
    past their `__call__`; else why not."""
    reason = stock_reason(embeddings)
    for name in ("word_embeddings", "position_embeddings"):
        table = embeddings._modules.get(name)
        if reason is not None or table is None:
            return reason or f"has no {name}"
        reason = plain_reason(table, nn.Embedding)
        if reason is None and (table.max_norm is not None or table.scale_grad_by_freq or table.sparse):
            reason = "has options beyond padding_idx"
        if reason is None and table.weight.dtype != dtype:
            reason = f"is in {table.weight.dtype}, its LayerNorm in {dtype}"
        if reason is not None:
            reason = f"{name} {reason}"
    return reason
