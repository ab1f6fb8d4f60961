"""`embed_tokens`: what it means, what it refuses, which backend runs it."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ...checks import INTEGERS, check_bool, check_int, check_range, check_tensor, describe
from ...layout import TokenLayout
from ..add_layer_norm.api import check_eps, check_row_dropout
from ..backends import choose_backend
from ..dense_attention import DTYPES, no_autocast
from ..philox import Site
from .compiled import embed_tokens_compiled, supports
from .reference import embed_tokens_reference


def embed_tokens(
    queries: Tensor | None,
    input_ids: Sequence[Tensor] | None,
    words: Tensor | None,
    positions: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    layout: TokenLayout,
    *,
    position_ids: Sequence[Tensor | None] | None = None,
    expand_queries: bool = True,
    padding_idx: int | None = None,
    eps: float = 1e-12,
    dropout: float = 0.0,
    dropout_key: Tensor | None = None,
    layer: int = 0,
    site: Site = Site.EMBEDDINGS,
    validate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The rows that the first layer reads (BERT's embeddings, with the query tokens in front), in one pass.

        out = dropout(LayerNorm(queries, or words[id] + positions[place]) * weight + bias)

    written straight to where `layout` has each row.

    Args:
        queries: [S, Q, width], or [1, Q, width] where all samples have the same; None where Q = 0.
        input_ids: int64 or int32 [S, the segment's width] a text segment, values in [0, vocabulary); None
            where the text was embedded elsewhere.
        words: [vocabulary, width]; with `input_ids` None the embedded text, [text rows, width] of all
            segments, packed. None in a layout without text.
        positions: [places, width], or None for no position embeddings.
        weight, bias: [width] of the LayerNorm; fp16, bf16, fp32 or fp64, the dtype of everything that floats.
        layout: where the rows lie, and their names for dropout.
        position_ids: int64 or int32 [S or 1, the segment's width] a text segment, values in [0, places);
            None, for all or for one of them: 0, 1, 2 ...
        expand_queries: False writes the queries of one sample only, before the text; nothing may be dropped
            then, and `queries` is [1, Q, width].
        padding_idx: a word whose row gets no gradient, as in `nn.Embedding`.
        eps: added to the variance, >= 0; default 1e-12, BERT's.
        dropout: probability in [0, 1) of dropping an element of the result, by the Philox contract of
            `blip2_kernels.ops.philox`, rows named by `layout.row_keys`.
        dropout_key: int64 [] from `draw_key`; needed where dropout > 0.
        layer, site: part of the dropout counter.
        validate: look at the values of ids on a GPU too, which waits for it. Without it a kernel takes the
            nearest row for an id that is out of range, and `check_device_errors` raises. On the CPU ids are
            always looked at.
        backend: "auto" (the first of `csrc`, `reference` that can serve), or one of them; a named backend
            that cannot serve raises.

    Returns:
        [layout.rows, width] in weight's dtype (fewer rows with `expand_queries=False`). Backend `csrc`
        computes in fp32 throughout and rounds once; its gradients, those of the tables too, are the same
        in every run, whatever the number of threads.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message, before
            anything is computed.
    """
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"layout: expected a TokenLayout, got {describe(layout)}")
    check_tensor("weight", weight, ["width"], DTYPES, layout.device)
    width, alike = weight.shape[0], ([weight.dtype], weight.device)
    if width == 0:
        raise ValueError(f"weight: expected at least one channel, got {describe(weight)}")
    check_tensor("bias", bias, [width], *alike)
    query_rows = _check_queries(queries, layout, width, expand_queries, alike)
    check_bool("validate", validate)
    token_ids, place_ids = _check_text(
        input_ids, words, positions, position_ids, layout, width, alike, validate
    )
    if padding_idx is not None:
        check_int("padding_idx", padding_idx, 0, 0 if words is None else max(words.shape[0] - 1, 0))
    check_eps(eps)
    check_row_dropout(dropout, dropout_key, layout.row_keys, layer, site, layout.row_keys)
    if not expand_queries and dropout > 0:
        raise ValueError(f"dropout: expected 0 where expand_queries is False, got {dropout}")
    if queries is None and words is None:
        return weight.new_zeros(0, width)
    candidates = {"csrc": partial(supports, weight), "reference": lambda: None}
    chosen = choose_backend(backend, candidates)
    function = embed_tokens_compiled if chosen == "csrc" else embed_tokens_reference
    with no_autocast(weight.device):
        return function(
            None if queries is None else queries.flatten(0, 1),
            words,
            positions,
            token_ids,
            place_ids,
            weight,
            bias,
            query_rows=query_rows,
            padding_idx=padding_idx,
            eps=float(eps),
            dropout=float(dropout),
            dropout_key=dropout_key,
            row_keys=layout.row_keys,
            layer=layer,
            site=site,
        )


Alike = tuple[list[torch.dtype], torch.device]


def _check_queries(queries: object, layout: TokenLayout, width: int, expand: object, alike: Alike) -> int:
    """The number of query rows to be written."""
    check_bool("expand_queries", expand)
    count = layout.num_queries
    if queries is None or not count:
        if queries is not None or count:
            expected = f"a tensor [{layout.samples} or 1, {count}, {width}]" if count else "None"
            raise ValueError(f"queries: expected {expected} for {count} queries, got {describe(queries)}")
        return 0
    checked = check_tensor("queries", queries, ["S or 1", count, width], *alike)
    if checked.shape[0] not in ((1, layout.samples) if expand else (1,)):
        expected = f"{layout.samples} or 1" if expand else "1"
        raise ValueError(f"queries: expected [{expected}, {count}, {width}], got {describe(queries)}")
    return layout.query_rows if expand else count


def _check_text(
    input_ids: Sequence[Tensor] | None,
    words: object,
    positions: object,
    position_ids: Sequence[Tensor | None] | None,
    layout: TokenLayout,
    width: int,
    alike: Alike,
    validate: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The words and the positions of the text rows, int64 [text rows] each."""
    segments, rows = layout.texts, layout.rows - layout.query_rows
    for name, given in (("input_ids", input_ids), ("position_ids", position_ids)):
        if given is None:
            continue
        if isinstance(given, str | Tensor) or not isinstance(given, Sequence):
            raise TypeError(f"{name}: expected a sequence, one entry a text segment, got {describe(given)}")
        if len(given) != len(segments):
            raise ValueError(f"{name}: expected {len(segments)}, one a text segment, got {len(given)}")
    if not segments:
        for name, unread in (("words", words), ("positions", positions)):
            if unread is not None:
                raise ValueError(f"{name}: expected None in a layout without text, got {describe(unread)}")
        return None, None
    table = check_tensor("words", words, [rows if input_ids is None else "vocabulary", width], *alike)
    if positions is None and position_ids is not None:
        raise ValueError("positions: expected a table beside position_ids, got None")
    places = 0
    if positions is not None:
        if input_ids is None:
            raise ValueError(f"positions: expected None beside embedded text, got {describe(positions)}")
        places = check_tensor("positions", positions, ["places", width], *alike).shape[0]
    tokens, taken = [], []
    for i, segment in enumerate(segments if input_ids is not None else ()):
        size = [layout.samples, segment.width]
        ids = check_tensor(f"input_ids[{i}]", input_ids[i], size, INTEGERS, layout.device)
        check_range(f"input_ids[{i}]", ids, table.shape[0], force=validate)
        tokens.append(ids.flatten().index_select(0, segment.source))
        own = None if position_ids is None else position_ids[i]
        if positions is None:
            continue
        if own is None:
            if segment.width > places:
                raise ValueError(
                    f"input_ids[{i}]: expected at most {places} tokens, as there are positions, got "
                    f"{segment.width}"
                )
            taken.append(segment.source % max(segment.width, 1))
            continue
        own = check_tensor(f"position_ids[{i}]", own, ["S or 1", segment.width], INTEGERS, layout.device)
        if own.shape[0] not in (1, layout.samples):
            expected = f"[{layout.samples} or 1, {segment.width}]"
            raise ValueError(f"position_ids[{i}]: expected {expected}, got {list(own.shape)}")
        check_range(f"position_ids[{i}]", own, places, force=validate)
        taken.append(own.expand(size).flatten().index_select(0, segment.source))
    return _joined(tokens), _joined(taken)


def _joined(ids: list[Tensor]) -> Tensor | None:
    if not ids:
        return None
    return (ids[0] if len(ids) == 1 else torch.cat(ids)).long()
