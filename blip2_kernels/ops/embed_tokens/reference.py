"""The plain truth: look up, add, normalise, drop."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..philox import Site, dropout_hidden


def embed_tokens_reference(
    queries: Tensor | None,
    words: Tensor | None,
    positions: Tensor | None,
    token_ids: Tensor | None,
    position_ids: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    query_rows: int,
    padding_idx: int | None,
    eps: float,
    dropout: float,
    dropout_key: Tensor | None,
    row_keys: Tensor | None,
    layer: int,
    site: Site,
) -> Tensor:
    """See `embed_tokens`; any floating dtype, any device.

    Args:
        queries: [n, width], or None; n divides `query_rows`.
        words, positions: [vocabulary, width] and [places, width]; or with `token_ids` None: the text rows,
            and None.
        token_ids, position_ids: int64 [text rows].
        weight, bias, query_rows, padding_idx, eps, dropout, dropout_key, row_keys, layer, site: as there.
    """
    parts = []
    if queries is not None:
        parts.append(queries.repeat(query_rows // max(len(queries), 1), 1))
    if words is not None:
        text = words if token_ids is None else F.embedding(token_ids, words, padding_idx)
        parts.append(text if positions is None else text + F.embedding(position_ids, positions))
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    rows = F.layer_norm(rows, weight.shape, weight, bias, eps)
    if dropout > 0:
        rows = dropout_hidden(rows, dropout, dropout_key, row_keys, layer=layer, site=site)
    return rows
