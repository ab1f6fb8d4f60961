"""What surrounds the Q-Former where it reads and writes text: embeddings and language-modelling head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
from transformers.activations import ACT2FN

from blip2_kernels.checks import FLOATING, INTEGERS, check_int, check_range, check_tensor, describe

TOKEN_IDS = INTEGERS


class TextEmbeddings(nn.Module):
    """Word plus position embeddings; parameters named as in transformers' `Blip2TextEmbeddings`.

    Args:
        config: needs vocab_size, hidden_size, max_position_embeddings, pad_token_id.

    Raises:
        TypeError: a config without them.
    """

    def __init__(self, config: Blip2QFormerConfig | InstructBlipQFormerConfig) -> None:
        super().__init__()
        _check_config(config)
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def embed(self, input_ids: Tensor, position_ids: Tensor | None = None, past_length: int = 0) -> Tensor:
        """Embed token ids.

        Args:
            input_ids: int64 or int32 [B, T], values in [0, vocab_size).
            position_ids: integers [B, T] or [1, T]; default `past_length`, `past_length` + 1, …
            past_length: text tokens that came before, when decoding step by step.

        Returns:
            [B, T, C].

        Raises:
            TypeError: ids that are not integers.
            ValueError: a wrong shape, a text longer than the position table, (on the CPU) an id out of range.
        """
        check_tensor("input_ids", input_ids, ["batch", "tokens"], TOKEN_IDS)
        check_int("past_length", past_length, 0)
        batch, length = input_ids.shape
        positions = self.position_embeddings.num_embeddings
        check_range("input_ids", input_ids, self.word_embeddings.num_embeddings)
        if position_ids is None:
            if past_length + length > positions:
                raise ValueError(
                    f"input_ids: expected at most {positions} tokens (max_position_embeddings), got "
                    f"{length} behind {past_length} earlier ones"
                )
            position_ids = torch.arange(past_length, past_length + length, device=input_ids.device)[None]
        else:
            check_tensor("position_ids", position_ids, ["batch", length], TOKEN_IDS)
            if position_ids.shape[0] not in (1, batch):
                raise ValueError(
                    f"position_ids: expected [{batch} or 1, {length}], got {list(position_ids.shape)}"
                )
            check_range("position_ids", position_ids, positions)
        return self.word_embeddings(input_ids) + self.position_embeddings(position_ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        query_embeds: Tensor | None = None,
        past_length: int = 0,
    ) -> Tensor:
        """Embedded text [B, T, C], behind `query_embeds` [B, Q, C] if given: what `QFormerModel` takes.

        Arguments and errors as `embed`. With `query_embeds` alone these come back as they are.
        """
        if input_ids is None:
            if query_embeds is None:
                raise ValueError("input_ids: expected input_ids or query_embeds, got neither")
            return query_embeds
        text = self.embed(input_ids, position_ids, past_length)
        if query_embeds is None:
            return text
        check_tensor("query_embeds", query_embeds, [text.shape[0], "queries", text.shape[-1]], FLOATING)
        return torch.cat([query_embeds.to(text.dtype), text], dim=1)


class NormalizedTextEmbeddings(TextEmbeddings):
    """Embeddings inside InstructBLIP's Q-Former: LayerNorm and dropout, which also see the queries, live
    here."""

    def __init__(self, config: InstructBlipQFormerConfig) -> None:
        super().__init__(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)


class LMHeadTransform(nn.Module):
    """Linear layer, activation, LayerNorm in front of the decoder."""

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = (
            ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act
        )
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.transform_act_fn(self.dense(hidden_states)))


class LMHead(nn.Module):
    """BERT's language-modelling head, LAVIS's `cls.predictions`: `transform.dense`, `transform.LayerNorm`,
    `bias`.

    The decoder's weight is the word embedding. It is passed to `forward` instead of being registered a second
    time, so that a state dict holds it once and nothing can untie it.
    """

    def __init__(self, config: Blip2QFormerConfig) -> None:
        super().__init__()
        _check_config(config)
        self.transform = LMHeadTransform(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: Tensor, word_embeddings: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., C]; `word_embeddings` is the weight [vocab, C].

        Raises:
            TypeError, ValueError: tensors of the wrong kind or shape.
        """
        check_tensor("word_embeddings", word_embeddings, [self.bias.shape[0], "channels"], FLOATING)
        front = hidden_states.shape[:-1] if isinstance(hidden_states, Tensor) else ["..."]
        check_tensor("hidden_states", hidden_states, [*front, word_embeddings.shape[1]], FLOATING)
        return F.linear(self.transform(hidden_states), word_embeddings, self.bias)


def _check_config(config: object) -> None:
    if not isinstance(config, Blip2QFormerConfig | InstructBlipQFormerConfig) and not all(
        hasattr(config, name) for name in ("vocab_size", "hidden_size", "max_position_embeddings")
    ):
        raise TypeError(
            f"config: expected Blip2QFormerConfig or InstructBlipQFormerConfig, got {describe(config)}"
        )
    for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
        check_int(f"config.{name}", getattr(config, name), 1)


def check_text_length(name: str, ids: Tensor, positions: int) -> None:
    """Refuse token ids [B, T] with more columns than a position table has rows."""
    if ids.shape[1] > positions:
        raise ValueError(
            f"{name}: expected at most {positions} tokens (max_position_embeddings), got {ids.shape[1]}"
        )
