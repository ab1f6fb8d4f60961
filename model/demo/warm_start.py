"""Where the demo starts training: each part already looks at the right thing, and nothing more.

BLIP-2 finds in 250,000 steps how parts of a picture and words are matched. The demo has a few hundred, in which
random cross-attention learns *what* is shown but never *which of the two lies where*: to tell that, a word has to
find the query that shows it, and nothing rewards half of the way. So the new weights start from closed forms that
need the training captions and features only:

- every query looks at a cell of the picture of its own (`start_on_a_grid`);
- what it reads there is in words: ridge regression from mean features to the words of the captions
  (`start_in_words`);
- in two layers one head of the pretrained self-attention is given to looking words up: a word attends to
  the queries that show it and reads where they look (`start_looking_up`);
- in stage 2 the language projection starts as ridge regression from the queries to the language model's
  embeddings of the captions (`start_projection`).

None of them is held fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..generation import Blip2ForConditionalGeneration
from ..pretraining import Blip2ForPreTraining
from ..vision import sine_positions_2d
from .ridge import Ridge, fit_ridge

RELATIVE_PENALTY = 0.02
"""Penalty of the ridge regressions as a share of the inputs' mean squared deviation."""

LOOKUP_LEAD = 16.0
"""How far a query's score in a lookup head leads that of a text row, which would else find itself."""

SOME = 64
"""Samples from which means and scales are taken."""


@torch.no_grad()
def start_on_a_grid(model: Blip2ForPreTraining, tokens_a_side: int = 7, sharpness: float = 8.0) -> None:
    """Let each query start by looking at a part of the picture of its own.

    Query i starts as the (projected) sine position of cell i of a square grid, which is also what the keys of
    the image tokens start with. Queries that start alike stay alike: after 100 steps all of them look at the
    same things and have the same hidden states.

    Args:
        model: with a square number of queries.
        tokens_a_side: of the square grid of image tokens.
        sharpness: of the first attention maps; 8 leaves a query about 10 of 49 tokens.

    Raises:
        ValueError: a number of queries that is no square.
    """
    side, width = math.isqrt(model.config.num_query_tokens), model.config.qformer.encoder_hidden_size
    if side * side != model.config.num_query_tokens:
        raise ValueError(f"num_query_tokens: expected a square number, got {model.config.num_query_tokens}")
    hidden = model.config.qformer.hidden_size
    code = torch.randn(hidden, width) / width**0.5
    positions = sine_positions_2d(tokens_a_side, tokens_a_side, width)
    grid = (positions - positions.mean(0)).T.unflatten(1, (tokens_a_side, tokens_a_side))
    cells = F.interpolate(grid[None], size=(side, side), mode="area")[0].flatten(1)
    model.query_tokens.copy_(F.normalize(cells.T @ code.T, dim=1)[None])
    for attention in _cross_attentions(model):
        attention.attention.key.weight.copy_(code)
        attention.attention.query.weight.copy_(sharpness * torch.eye(hidden))


def start_from_captions(
    model: Blip2ForPreTraining,
    features: Tensor,
    captions: Sequence[str],
    tokenizer: Any,
    lookup_layers: Sequence[int] = (1, 3),
) -> None:
    """`start_in_words`, then `start_looking_up`, for a model that started on a grid."""
    start_in_words(model, features, captions, tokenizer)
    start_looking_up(model, features, captions, tokenizer, lookup_layers)


@torch.no_grad()
def start_in_words(
    model: Blip2ForPreTraining, features: Tensor, captions: Sequence[str], tokenizer: Any
) -> None:
    """Let what cross-attention reads start as word embeddings.

    The values of every cross-attention become the ridge regression from a picture's mean feature to the mean
    embedding of its caption's words, centred and scaled to the norm of a hidden state. The map is linear, so
    it serves each image token as well as their mean: a token shows the words of what it sees.

    Args:
        model: text embeddings pretrained.
        features: [n, tokens, width] of training pictures, before ``ln_vision``.
        captions: n texts, one a picture.
        tokenizer: of the texts.
    """
    words = model.embeddings.word_embeddings.weight
    seen = torch.cat([model.ln_vision(part.to(words)).mean(1) for part in features.split(256)])
    ridge = _fit(seen, _mean_words(words, captions, tokenizer))
    scale = _scale(ridge, model.ln_vision(features[:SOME].to(words)), model.config.qformer.hidden_size**0.5)
    for attention in _cross_attentions(model):
        _become(attention.attention.value, ridge, scale)
        attention.output.dense.weight.copy_(torch.eye(model.config.qformer.hidden_size))


@torch.no_grad()
def start_looking_up(
    model: Blip2ForPreTraining,
    features: Tensor,
    captions: Sequence[str],
    tokenizer: Any,
    layers: Sequence[int],
) -> None:
    """Give the first self-attention head of some layers to looking words up in the picture.

    Its queries and keys are the leading directions of the captions' word embeddings, so a word attends to the
    rows in which it stands: to the query tokens that read it out of the picture. One direction more tells
    query rows from text rows, or every word would find itself. Its values are where a query looks.

    Args:
        model: started on a grid and in words.
        features: [n, tokens, width] of training pictures, before ``ln_vision``.
        captions: n texts, one a picture.
        tokenizer: of the texts.
        layers: numbers of the layers, each behind the first cross-attention.
    """
    words = model.embeddings.word_embeddings.weight
    head = model.config.qformer.hidden_size // model.config.qformer.num_attention_heads
    used = sorted(
        {i for row in tokenizer(list(captions), add_special_tokens=False)["input_ids"] for i in row}
    )
    directions = _leading(words[used], head - 1, whiten=True)
    places = _leading(model.query_tokens[0], min(model.config.num_query_tokens - 1, head))
    batch = tokenizer(list(captions[:SOME]), padding=True, return_tensors="pt").to(words.device)
    real = batch["attention_mask"].bool()
    for number in layers:
        attention = model.qformer.encoder.layer[number].attention
        queries, texts = _inputs_of(model, attention, features[:SOME].to(words), batch)
        queries, texts = queries.flatten(0, 1), texts[real]
        found = directions / (texts @ directions.T).std()
        apart = queries.mean(0) - texts.mean(0)
        apart /= apart.square().sum()
        middle = apart @ (queries.mean(0) + texts.mean(0)) / 2
        own = slice(0, head)
        for side in (attention.attention.query, attention.attention.key):
            side.weight[own], side.bias[own] = 0, 0
            side.weight[: head - 1] = found
        attention.attention.query.bias[head - 1] = head**0.5
        attention.attention.key.weight[head - 1] = LOOKUP_LEAD * apart
        attention.attention.key.bias[head - 1] = -LOOKUP_LEAD * middle
        attention.attention.value.weight[own], attention.attention.value.bias[own] = 0, 0
        attention.attention.value.weight[: len(places)] = places
        attention.output.dense.weight[:, own] = 0
        attention.output.dense.weight[:, : len(places)] = places.T


@torch.no_grad()
def start_projection(
    model: Blip2ForConditionalGeneration, features: Tensor, captions: Sequence[str], tokenizer: Any
) -> None:
    """Let the soft prompt start as the language model's own embeddings of the words each query read.

    Ridge regression from the mean of a picture's queries to the mean embedding of its caption's tokens, scaled
    to the norm of an embedding (a much louder soft prompt silences the language model).

    Args:
        model: stage 2, from a trained stage 1.
        features: [n, tokens, width] of training pictures, before ``ln_vision``.
        captions: n texts, one a picture.
        tokenizer: the language model's.
    """
    words = model.language_model.get_input_embeddings().weight.float()
    device = model.query_tokens.device
    hidden = []
    for part in features.split(SOME):
        seen = model.ln_vision(part.to(device, model.ln_vision.weight.dtype))
        queries = model.query_tokens.expand(len(seen), -1, -1)
        hidden.append(model.qformer(queries, encoder_hidden_states=seen).last_hidden_state.float())
    states = torch.cat(hidden)
    ridge = _fit(states.mean(1), _mean_words(words, captions, tokenizer, add_special_tokens=False))
    norm = words.norm(dim=1).mean().item()
    _become(model.language_projection, ridge, _scale(ridge, states[:SOME], norm))


# ---------------------------------------------------------------------------------------------------- in common


def _cross_attentions(model: Blip2ForPreTraining) -> Iterator[nn.Module]:
    for layer in model.qformer.encoder.layer:
        if hasattr(layer, "crossattention"):
            yield layer.crossattention


def _mean_words(words: Tensor, captions: Sequence[str], tokenizer: Any, **options: Any) -> Tensor:
    """Mean embedding of each caption's tokens, [n, width]. What all captions share is a constant."""
    told = tokenizer(list(captions), **options)["input_ids"]
    return torch.stack([words[row].mean(0) for row in told])


def _fit(x: Tensor, y: Tensor) -> Ridge:
    return fit_ridge(x, y, RELATIVE_PENALTY * (x - x.mean(0)).double().square().sum(0).mean().item())


def _scale(ridge: Ridge, x: Tensor, norm: float) -> float:
    """What brings the centred predictions for x [..., inputs] to a norm (root mean square over the rows)."""
    predicted = (x.double() - ridge.x_mean) @ ridge.weight
    return norm / predicted.square().sum(-1).mean().sqrt().item()


def _become(linear: nn.Module, ridge: Ridge, scale: float) -> None:
    """Let a Linear compute the centred prediction times scale."""
    linear.weight.copy_(scale * ridge.weight.T)
    linear.bias.copy_(-scale * (ridge.x_mean @ ridge.weight))


def _leading(rows: Tensor, count: int, *, whiten: bool = False) -> Tensor:
    """The directions [count, width] in which rows [n, width] differ most, of length 1 or (`whiten`) such that
    the rows' coordinates have one variance.
    """
    centred = rows - rows.mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    return directions[:count] / sizes[:count, None] if whiten else directions[:count]


def _inputs_of(
    model: Blip2ForPreTraining, attention: nn.Module, features: Tensor, batch: Any
) -> tuple[Tensor, Tensor]:
    """Hidden states [n, Q, C] and [n, T, C] with which query and text rows enter a self-attention module in
    the matching pass.
    """
    entered: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    was_fused, model.use_fused = model.use_fused, False
    hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        model.multimodal_hidden(
            model.prepare_images(features),
            batch["input_ids"],
            batch["attention_mask"],
            image_index=torch.arange(len(features), device=features.device),
        )
    finally:
        hook.remove()
        model.use_fused = was_fused
    queries = model.config.num_query_tokens
    return entered[0][:, :queries], entered[0][:, queries:]
