"""One Q-Former layer on packed rows (BLIP-2, figure 2 left).

Linear layers, norms and activations with something on them (hooks, adapters, quantised weights) are called as
the modules they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layout import Selection, TokenLayout
from ..mask import AttentionMask
from ..ops import cross_attention, latent_attention, self_attention
from ..ops.linear import linear, linear_by_head
from ..ops.philox import Site
from .epilogues import HiddenDropout, dense_add_norm, dense_gelu
from .images import ImageKeyValues, KeyValues
from .modules import call_linear, plain_reason
from .weights import Fold, FoldedLinear, Join


@dataclass(frozen=True)
class LayerCall:
    """A layer's arguments in the padded form, for a layer that has to be called as the module it is.

    Attributes:
        hidden: [S, L, C], query rows first, then the rows of every text.
        allowed: bool [S, 1, L, L], True where a row may attend.
        num_queries: Q.
        features: [S, tokens, width] behind the image norm, or None without queries.
        image_allowed: bool [S, 1, 1, tokens], or None for all.
        dropout_key: int64 [], or None where nothing is dropped.
        row_keys: int32 [S, L].
    """

    hidden: Tensor
    allowed: Tensor
    num_queries: int
    features: Tensor | None
    image_allowed: Tensor | None
    dropout_key: Tensor | None
    row_keys: Tensor


CallLayer = Callable[[nn.Module, LayerCall], Tensor]


@dataclass(frozen=True)
class Pass:
    """What every layer of one encoder pass shares.

    Attributes:
        layout, mask: the rows and who may attend to whom.
        heads: attention heads.
        images: what the images contribute, None where no layer needs them.
        image_index: int32 [S], the image each sample looks at; None for its own.
        dropout_key: int64 [] Philox key of the step, or None where nothing is dropped.
        fold: `FoldedLinear.fold`, or that of a cache.
        join: `WeightCache.joined` where self-attention's projections are one product.
        backend: of the attentions.
    """

    layout: TokenLayout
    mask: AttentionMask
    heads: int
    images: ImageKeyValues | None
    image_index: Tensor | None
    dropout_key: Tensor | None
    fold: Fold = FoldedLinear.fold
    join: Join | None = None
    backend: str = "auto"

    def hidden_dropout(
        self, dropout: nn.Dropout, names: Tensor, layer: int, site: Site
    ) -> HiddenDropout | None:
        """What a dropout module does to hidden rows of these names; None where nothing is dropped."""
        if self.dropout_key is None or dropout.p == 0:
            return None
        return HiddenDropout(dropout.p, self.dropout_key, names, layer, site)

    def attention_dropout(self, attention: nn.Module, layer: int) -> dict[str, object]:
        """The dropout arguments of an attention op."""
        rate = attention.attention_dropout if self.dropout_key is not None else 0.0
        return {"dropout": rate, "dropout_key": self.dropout_key, "layer": layer}


@dataclass(frozen=True)
class Selected:
    """The rows that are read of a layer's result.

    Attributes:
        layout: where they lie.
        index: int64 [its rows], their numbers among all rows.
    """

    layout: TokenLayout
    index: Tensor

    @classmethod
    def of(cls, layout: TokenLayout, queries: bool, texts: Sequence[Selection]) -> "Selected | None":
        """None where every row is read."""
        if (queries or not layout.query_rows) and all(choice == "all" for choice in texts):
            return None
        return cls(*layout.select(queries=queries, texts=texts))


def self_attention_part(
    layer: nn.Module, number: int, rows: Tensor, run: Pass, kept: Selected | None = None
) -> Tensor:
    """The first third of a layer: masked self-attention with its output block.

    Args:
        layer: with `attention`.
        number: its place, from 0.
        rows: [layout.rows, hidden].
        run: the pass it belongs to.
        kept: the rows to compute, None for all.

    Returns:
        [kept rows, hidden].
    """
    attention = layer.attention.attention
    if kept is None:
        layout, asking = run.layout, rows
        q, k, v = _projections(run, rows, attention.query, attention.key, attention.value)
    else:
        layout, asking = kept.layout, rows.index_select(0, kept.index)
        q = _by_head(call_linear(attention.query, asking), run)
        k, v = _projections(run, rows, attention.key, attention.value)
    drop = run.attention_dropout(attention, number)
    context = self_attention(
        q, k, v, layout, run.layout, run.mask, scale=attention.scaling, backend=run.backend, **drop
    )
    return _add_norm(
        layer.attention.output, context.flatten(1), asking, layout.row_keys, number, Site.SELF_OUTPUT, run
    )


def shared_self_attention_part(
    layer: nn.Module, queries: Tensor, text: Tensor | None, run: Pass
) -> tuple[Tensor, Tensor | None]:
    """The same in the first layer, where all samples still have the same queries and nothing is dropped.

    Args:
        layer: with `attention`.
        queries: [Q, hidden], one sample's.
        text: [text rows, hidden], or None.
        run: the pass it belongs to.

    Returns:
        The queries, of one sample if they see no text, else of all; and the text rows.
    """
    attention, output = layer.attention.attention, layer.attention.output
    layout = run.layout
    rows = queries if text is None else torch.cat([queries, text])
    q, k, v = _projections(run, rows, attention.query, attention.key, attention.value)
    count, samples = queries.shape[0], layout.samples

    def spread(t: Tensor) -> Tensor:
        """One sample's query rows repeated for all, and the text rows behind them."""
        return torch.cat([t[:count].expand(samples, -1, *t.shape[1:]).flatten(0, 1), t[count:]])

    if text is not None and run.mask.joins_queries_and_text:
        context = self_attention(
            spread(q),
            spread(k),
            spread(v),
            layout,
            layout,
            run.mask,
            scale=attention.scaling,
            backend=run.backend,
        )
        rows = spread(rows)
        rows = dense_add_norm(output.dense, output.LayerNorm, context.flatten(1), rows, None)
        return rows[: layout.query_rows], rows[layout.query_rows :]

    one = TokenLayout.from_attention_masks(count, samples=1, device=rows.device)
    context = self_attention(
        q[:count],
        k[:count],
        v[:count],
        one,
        one,
        AttentionMask(),
        scale=attention.scaling,
        backend=run.backend,
    )
    if text is not None:
        texts, _ = layout.select(queries=False)
        read = self_attention(
            q[count:],
            spread(k),
            spread(v),
            texts,
            layout,
            run.mask,
            scale=attention.scaling,
            backend=run.backend,
        )
        context = torch.cat([context, read])
    rows = dense_add_norm(output.dense, output.LayerNorm, context.flatten(1), rows, None)
    return rows[:count], rows[count:] if text is not None else None


def cross_attention_part(
    layer: nn.Module, number: int, queries: Tensor, names: Tensor, run: Pass, images: KeyValues | None
) -> Tensor:
    """The second third of a layer: the queries read the images.

    Args:
        layer: with `crossattention`.
        number: its place, from 0.
        queries: [S * Q, hidden], or [Q, hidden] where all samples have the same.
        names: int32 [S * Q], their row keys.
        run: the pass it belongs to.
        images: keys and values of this layer, or None for the absorbed form.

    Returns:
        [S * Q, hidden].
    """
    attention = layer.crossattention.attention
    samples, count = run.layout.samples, run.layout.num_queries
    q = _by_head(call_linear(attention.query, queries), run).unflatten(0, (-1, count))
    if images is None:
        context = _absorbed(attention, q, run)
    else:
        context = cross_attention(
            q.expand(samples, -1, -1, -1),
            images.key,
            images.value,
            image_index=run.image_index if run.images.shared else None,
            image_mask=_mask_of_samples(run),
            row_keys=names.unflatten(0, (samples, count)),
            scale=attention.scaling,
            backend=run.backend,
            **run.attention_dropout(attention, number),
        ).flatten(2)
        if images.context_bias is not None:
            context = context + _seen(run, images.context_bias)
    residual = queries.unflatten(0, (-1, count)).expand(samples, -1, -1).flatten(0, 1)
    return _add_norm(
        layer.crossattention.output, context.flatten(0, 1), residual, names, number, Site.CROSS_OUTPUT, run
    )


def feed_forward_part(
    layer: nn.Module, number: int, queries: Tensor | None, text: Tensor | None, names: Tensor, run: Pass
) -> Tensor:
    """The last third of a layer: a network for the query rows, another for the text rows.

    Args:
        layer: with `intermediate_query` and `output_query`, `intermediate` and `output`.
        number: its place, from 0.
        queries, text: [rows, hidden] each, or None.
        names: int32 [rows of both], their row keys.
        run: the pass it belongs to.

    Returns:
        [rows of both, hidden].
    """
    outputs, done = [], 0
    for kind, rows in (("_query", queries), ("", text)):
        if rows is None:
            continue
        intermediate, output = getattr(layer, f"intermediate{kind}"), getattr(layer, f"output{kind}")
        inner = dense_gelu(intermediate.dense, intermediate.intermediate_act_fn, rows)
        own = names[done : done + rows.shape[0]]
        outputs.append(_add_norm(output, inner, rows, own, number, Site.FEED_FORWARD, run))
        done += rows.shape[0]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def call_whole(layer: nn.Module, rows: Tensor, run: Pass, call: CallLayer) -> Tensor:
    """Run a layer as the module it is, on padded rows."""
    layout = run.layout
    dense = layout.dense()
    features = image_allowed = None
    if layout.query_rows and hasattr(layer, "crossattention"):
        features, mask = run.images.features.behind_norm, run.images.mask
        if run.image_index is not None:
            index = run.image_index.long()
            features, mask = features[index], None if mask is None else mask[index]
        image_allowed = None if mask is None else (mask != 0)[:, None, None, :]
    hidden = call(
        layer,
        LayerCall(
            dense.spread(rows),
            run.mask.between(dense, dense)[:, None],
            layout.num_queries,
            features,
            image_allowed,
            run.dropout_key,
            dense.row_keys,
        ),
    )
    return dense.collect(hidden)


def parameters_of_dead_rows(
    layer: nn.Module, queries: Tensor | None, text: Tensor | None, layout: TokenLayout
) -> list[Tensor]:
    """Parameters of a layer that only rows work with of which none was kept."""
    parts = []
    if queries is None and layout.query_rows:
        parts += ["crossattention", "intermediate_query", "output_query"]
    if text is None and layout.texts:
        parts += ["intermediate", "output"]
    return [p for part in parts if hasattr(layer, part) for p in getattr(layer, part).parameters()]


def _projections(run: Pass, rows: Tensor, *linears: nn.Module) -> list[Tensor]:
    """Rows through several linear layers, [rows, heads, head_dim] each: views of one product where their
    weights are kept side by side."""
    whole = None
    if run.join is not None and all(plain_reason(each, nn.Linear) is None for each in linears):
        whole = run.join(linears)
    if whole is None:
        made = [call_linear(each, rows) for each in linears]
    else:
        made = list(linear(rows, whole.weight, whole.bias).chunk(len(linears), -1))
    return [_by_head(each, run) for each in made]


def _by_head(rows: Tensor, run: Pass) -> Tensor:
    """Rows [rows, hidden] as [rows, heads, head_dim]."""
    return rows.view(rows.shape[0], run.heads, rows.shape[1] // run.heads)


def _absorbed(attention: nn.Module, q: Tensor, run: Pass) -> Tensor:
    """Cross-attention of q [S or 1, Q, heads, head_dim] on the features themselves, [S, Q, hidden].

        scores = q (I W_k^T)^T = (q W_k) I^T        context = P (I W_v^T) = (P I) W_v^T

    The key bias adds the same to all scores of a row, which the softmax takes out again.
    """
    features, samples = run.images.features, run.layout.samples
    _, count, heads, head_dim = q.shape
    key = run.fold(attention.key, features.norm, with_bias=False).weight
    value = run.fold(attention.value, features.norm)
    by_head = key.unflatten(0, (heads, head_dim)).transpose(1, 2)  # [heads, width, head_dim]
    latent = linear_by_head(q.flatten(0, 1).to(key.dtype), by_head)  # [all Q, heads, width]
    latent = latent.to(features.values.dtype).reshape(-1, count * heads, latent.shape[-1])
    read = latent_attention(
        latent.expand(samples, -1, -1),
        features.values,
        scale=attention.scaling,
        backend=run.backend,
        image_index=run.image_index if run.images.shared else None,
        image_mask=_mask_of_samples(run),
    )
    read = read.view(samples * count, heads, -1).to(value.weight.dtype)
    context = linear_by_head(read, value.weight.unflatten(0, (heads, head_dim)))  # [S * Q, heads, head_dim]
    context = context.reshape(samples, count, -1)
    return context if value.bias is None else context + _seen(run, value.bias)


def _mask_of_samples(run: Pass) -> Tensor | None:
    mask = run.images.mask
    if mask is None or run.images.shared or run.image_index is None:
        return mask
    return mask.index_select(0, run.image_index.long())


def _seen(run: Pass, bias: Tensor) -> Tensor:
    """A value bias as the context has it: nothing where an image has no visible token."""
    mask = run.images.mask
    if mask is None:
        return bias
    seen = (mask != 0).any(1)
    seen = seen if run.image_index is None else seen.index_select(0, run.image_index.long())
    return seen.to(bias.dtype)[:, None, None] * bias


def _add_norm(
    output: nn.Module, x: Tensor, residual: Tensor, names: Tensor, number: int, site: Site, run: Pass
) -> Tensor:
    """LayerNorm(residual + dropout(dense(x))): how each of the three parts of a layer ends."""
    drop = run.hidden_dropout(output.dropout, names, number, site)
    return dense_add_norm(output.dense, output.LayerNorm, x, residual, drop)
