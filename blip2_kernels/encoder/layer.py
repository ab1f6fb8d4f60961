"""One Q-Former layer on packed rows (BLIP-2, figure 2 left).

Linear layers, norms and activations are called as the modules they are, so whatever hangs on them (hooks,
adapters, quantised weights) goes on working.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layout import TokenLayout
from ..mask import AttentionMask
from ..ops import cross_attention, self_attention
from ..ops.philox import Site, dropout_hidden
from .images import ImageKeyValues


@dataclass(frozen=True)
class Dropout:
    """The dropout of a pass; both probabilities are 0 outside training.

    Attributes:
        hidden: probability at the ends of attention, cross-attention and feed-forward.
        attention: probability of dropping an attention probability.
        key: int64 [] Philox key of the step, or None where nothing is dropped.
    """

    hidden: float = 0.0
    attention: float = 0.0
    key: Tensor | None = None

    def apply(self, x: Tensor, row_keys: Tensor, layer: int, site: Site) -> Tensor:
        """Drop hidden elements of x [rows, C]."""
        if self.hidden == 0:
            return x
        return dropout_hidden(x, self.hidden, self.key, row_keys, layer=layer, site=site)


@dataclass(frozen=True)
class Pass:
    """What every layer of one encoder pass shares.

    Attributes:
        layout, mask: the rows and who may attend to whom.
        heads: attention heads.
        images: keys and values of the images, None where no layer needs them.
        image_index: int32 [S], the image each sample looks at; None for its own.
        dropout: probabilities and key.
    """

    layout: TokenLayout
    mask: AttentionMask
    heads: int
    images: ImageKeyValues | None
    image_index: Tensor | None
    dropout: Dropout


def run_layer(layer: nn.Module, number: int, rows: Tensor, run: Pass) -> Tensor:
    """Run one layer.

    Args:
        layer: with `attention`, maybe `crossattention`, and the feed-forward networks of queries
            (`intermediate_query`, `output_query`) and text (`intermediate`, `output`).
        number: its place, from 0.
        rows: [layout.rows, hidden].
        run: the pass it belongs to.

    Returns:
        [layout.rows, hidden].
    """
    layout, dropout = run.layout, run.dropout
    projections = layer.attention.attention
    q, k, v = (
        linear(rows).unflatten(-1, (run.heads, -1))
        for linear in (projections.query, projections.key, projections.value)
    )
    drop = {"dropout": dropout.attention, "dropout_key": dropout.key, "layer": number}
    context = self_attention(q, k, v, layout, layout, run.mask, **drop)
    names = layout.row_keys
    rows = _add_norm(
        layer.attention.output, context.flatten(1), rows, names, number, Site.SELF_OUTPUT, dropout
    )

    count = layout.query_rows
    outputs = []
    if count:
        queries, query_names = rows[:count], names[:count]
        if hasattr(layer, "crossattention"):
            queries = _cross_attention(layer.crossattention, number, queries, query_names, run)
        network = (layer.intermediate_query, layer.output_query)
        outputs.append(_feed_forward(*network, queries, query_names, number, dropout))
    if layout.rows > count:
        outputs.append(
            _feed_forward(layer.intermediate, layer.output, rows[count:], names[count:], number, dropout)
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else rows


def _cross_attention(module: nn.Module, number: int, queries: Tensor, names: Tensor, run: Pass) -> Tensor:
    key, value = run.images.layers[number]
    shape = (run.layout.samples, run.layout.num_queries)
    q = module.attention.query(queries).unflatten(-1, (run.heads, -1)).unflatten(0, shape)
    context = cross_attention(
        q,
        key,
        value,
        image_index=run.image_index,
        image_mask=run.images.mask,
        row_keys=names.unflatten(0, shape),
        dropout=run.dropout.attention,
        dropout_key=run.dropout.key,
        layer=number,
    )
    context = context.flatten(0, 1).flatten(1)
    return _add_norm(module.output, context, queries, names, number, Site.CROSS_OUTPUT, run.dropout)


def _feed_forward(
    intermediate: nn.Module, output: nn.Module, rows: Tensor, names: Tensor, number: int, dropout: Dropout
) -> Tensor:
    inner = intermediate.intermediate_act_fn(intermediate.dense(rows))
    return _add_norm(output, inner, rows, names, number, Site.FEED_FORWARD, dropout)


def _add_norm(
    output: nn.Module, x: Tensor, residual: Tensor, names: Tensor, number: int, site: Site, dropout: Dropout
) -> Tensor:
    """LayerNorm(residual + dropout(dense(x))): how each of the three parts of a layer ends."""
    return output.LayerNorm(residual + dropout.apply(output.dense(x), names, number, site))
