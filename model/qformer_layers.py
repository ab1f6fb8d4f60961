"""The layers of the Q-Former in plain PyTorch (BLIP-2 paper, section 3.1, figure 2).

A layer is a BERT layer with two additions: every `cross_attention_frequency`-th one lets the query rows read
the image, and query rows and text rows have feed-forward networks of their own. Names of modules and
parameters are those of transformers' `Blip2QFormerModel`, so that its state dicts load unchanged.

Nothing is fused here on purpose: this is the path that the fused encoder is compared with.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.activations import ACT2FN

from blip2_kernels.ops.philox import Site, dropout_attention, dropout_hidden


class QFormerCache(DynamicCache):
    """Keys and values of self-attention, a pair a layer, of the rows seen so far: queries first, then text.

    A transformers `DynamicCache` (`get_seq_length`, `reorder_cache`, `batch_repeat_interleave`, `crop` … are
    its own) that also remembers how many of its rows are queries, since text positions count from behind
    them.

    Attributes:
        num_queries: query rows at the front of the cache.
    """

    def __init__(self, num_queries: int = 0) -> None:
        super().__init__()
        self.num_queries = num_queries


@dataclass(frozen=True)
class DropoutContext:
    """What names every element that dropout may drop, so that all paths drop the same ones.

    Attributes:
        key: int64 [], the Philox key of the step.
        row_keys: int32 [B, L], logical names of the rows being computed.
        attended_keys: int32 [B, past + L], names of the rows self-attention looks at.
        image_keys: int32 [N], ordinals of the image tokens, or None without an image.
    """

    key: Tensor
    row_keys: Tensor
    attended_keys: Tensor
    image_keys: Tensor | None = None

    def rows(self, start: int | None, stop: int | None = None) -> "DropoutContext":
        """The same for a slice of the rows being computed."""
        return DropoutContext(self.key, self.row_keys[:, start:stop], self.attended_keys, self.image_keys)


def drop_hidden(
    hidden: Tensor, module: nn.Dropout, dropout: DropoutContext | None, layer: int, site: Site
) -> Tensor:
    """Dropout on hidden states [B, L, C] at the rate of `module`; none where `dropout` is None
    (inference)."""
    if dropout is None or module.p == 0:
        return hidden
    return dropout_hidden(hidden, module.p, dropout.key, dropout.row_keys, layer=layer, site=site)


class MultiHeadAttention(nn.Module):
    """Softmax attention of rows to rows (self) or of query rows to image tokens (cross)."""

    def __init__(self, config, layer_idx: int, is_cross_attention: bool = False) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.is_cross_attention = is_cross_attention
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        width = config.encoder_hidden_size if is_cross_attention else config.hidden_size
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(width, config.hidden_size)
        self.value = nn.Linear(width, config.hidden_size)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, L, C] to [B, heads, L, head_dim]."""
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        attended_states: Tensor,
        allowed: Tensor | None,
        cache: QFormerCache | None = None,
        dropout: DropoutContext | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            hidden_states: [B, L, C], the rows that attend.
            attended_states: [B, Lk, C or image width], whose keys and values are computed here.
            allowed: bool, broadcastable to [B, heads, L, past + Lk], True where a row may attend; None for
                all.
            cache: keys and values of earlier rows; those of `attended_states` are appended to it.
            dropout: names of the elements, or None for no dropout.

        Returns:
            [B, L, C], and the probabilities [B, heads, L, past + Lk] before dropout. A row that may attend to
            nothing gives 0, with zero gradient.
        """
        query = self.split_heads(self.query(hidden_states))
        key = self.split_heads(self.key(attended_states))
        value = self.split_heads(self.value(attended_states))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        scores = query @ key.transpose(-1, -2) * self.scaling
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if allowed is not None:
            # The lowest finite number instead of -inf: a row that may attend to nothing then has finite
            # probabilities, and zeroing those gives 0 with zero gradient instead of NaN.
            scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        probs = scores.softmax(dim=-1)
        if allowed is not None:
            probs = probs.masked_fill(~allowed, 0)
        probs = probs.to(value.dtype)

        kept = probs
        if dropout is not None and self.attention_dropout > 0:
            keys = dropout.image_keys if self.is_cross_attention else dropout.attended_keys
            site = Site.CROSS_ATTENTION if self.is_cross_attention else Site.SELF_ATTENTION
            kept = dropout_attention(
                probs,
                self.attention_dropout,
                dropout.key,
                dropout.row_keys,
                keys,
                layer=self.layer_idx,
                site=site,
            )
        context = kept @ value  # [B, heads, L, head_dim]
        return context.transpose(1, 2).flatten(2), probs


class SelfOutput(nn.Module):
    """What follows an attention: linear layer, dropout, residual, LayerNorm."""

    def __init__(self, config, layer_idx: int, site: Site) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.site = site
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor, dropout: DropoutContext | None) -> Tensor:
        hidden_states = drop_hidden(
            self.dense(hidden_states), self.dropout, dropout, self.layer_idx, self.site
        )
        return self.LayerNorm(hidden_states + residual)


class Attention(nn.Module):
    """Attention with its output block."""

    def __init__(self, config, layer_idx: int, is_cross_attention: bool = False) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config, layer_idx, is_cross_attention)
        self.output = SelfOutput(
            config, layer_idx, Site.CROSS_OUTPUT if is_cross_attention else Site.SELF_OUTPUT
        )

    def forward(
        self,
        hidden_states: Tensor,
        attended_states: Tensor,
        allowed: Tensor | None,
        cache: QFormerCache | None = None,
        dropout: DropoutContext | None = None,
    ) -> tuple[Tensor, Tensor]:
        context, probs = self.attention(hidden_states, attended_states, allowed, cache, dropout)
        return self.output(context, hidden_states, dropout), probs


class Intermediate(nn.Module):
    """First half of a feed-forward network: linear layer, activation."""

    def __init__(self, config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = (
            ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden_states))


class FeedForwardOutput(nn.Module):
    """Second half of a feed-forward network: linear layer, dropout, residual, LayerNorm."""

    def __init__(self, config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor, dropout: DropoutContext | None) -> Tensor:
        hidden_states = self.dense(hidden_states)
        hidden_states = drop_hidden(hidden_states, self.dropout, dropout, self.layer_idx, Site.FEED_FORWARD)
        return self.LayerNorm(hidden_states + residual)


class QFormerLayer(nn.Module):
    """One layer: shared self-attention, cross-attention of the query rows, a feed-forward network for each
    kind.

    Args:
        config: Q-Former configuration.
        layer_idx: number of the layer; it has cross-attention if divisible by
            `config.cross_attention_frequency`.
        has_text: whether it has the text feed-forward network.
    """

    def __init__(self, config, layer_idx: int, has_text: bool) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.has_cross_attention = layer_idx % config.cross_attention_frequency == 0
        self.attention = Attention(config, layer_idx)
        if self.has_cross_attention:
            self.crossattention = Attention(config, layer_idx, is_cross_attention=True)
        if has_text:
            self.intermediate = Intermediate(config)
            self.output = FeedForwardOutput(config, layer_idx)
        self.intermediate_query = Intermediate(config)
        self.output_query = FeedForwardOutput(config, layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        allowed: Tensor | None,
        query_length: int,
        encoder_hidden_states: Tensor | None = None,
        encoder_allowed: Tensor | None = None,
        cache: QFormerCache | None = None,
        dropout: DropoutContext | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the layer.

        Args:
            hidden_states: [B, L, C], the first `query_length` rows queries, the others text.
            allowed: bool, broadcastable to [B, heads, L, past + L], or None for all.
            query_length: number of query rows.
            encoder_hidden_states: [B, N, image width].
            encoder_allowed: bool, broadcastable to [B, heads, query_length, N], or None for all.
            cache: see `MultiHeadAttention`.
            dropout: names of the elements, or None for no dropout.

        Returns:
            [B, L, C], the self-attention probabilities and the cross-attention ones (None without).
        """
        attended, self_probs = self.attention(hidden_states, hidden_states, allowed, cache, dropout)
        cross_probs = None
        outputs = []
        if query_length > 0:
            query_dropout = dropout.rows(0, query_length) if dropout is not None else None
            queries = attended[:, :query_length]
            if self.has_cross_attention:
                queries, cross_probs = self.crossattention(
                    queries, encoder_hidden_states, encoder_allowed, dropout=query_dropout
                )
            outputs.append(self.output_query(self.intermediate_query(queries), queries, query_dropout))
        if attended.shape[1] > query_length:
            text_dropout = dropout.rows(query_length) if dropout is not None else None
            text = attended[:, query_length:]
            outputs.append(self.output(self.intermediate(text), text, text_dropout))
        return torch.cat(outputs, dim=1), self_probs, cross_probs


class QFormerEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config, has_text: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(QFormerLayer(config, i, has_text) for i in range(config.num_hidden_layers))
