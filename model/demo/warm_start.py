"""Where the demo starts training: closed forms in place of random numbers, for want of steps.

BLIP-2 learns in 250,000 steps to match parts of a picture with words. The demo has a few hundred, so its new
weights start from what the training captions and features give by themselves:

- every query looks at a cell of the picture of its own (`start_on_a_grid`);
- what it reads there is in words: ridge regression from mean features to the words of the captions
  (`start_in_words`);
- in stage 2 the language projection is ridge regression from what the queries have become to the language
  model's words for what each tells of (`start_projection`).

None of them is held fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..generation import Blip2ForConditionalGeneration
from ..pretraining import Blip2ForPreTraining
from ..vision import sine_positions_2d
from .evaluation import Texts, query_hidden
from .ridge import Ridge, fit_ridge
from .scenes import Scene

RELATIVE_PENALTY = 0.02
"""Penalty of the ridge regressions as a share of the inputs' mean squared deviation."""

SOME = 64
"""Samples from which scales are taken."""

ENOUGH = 3000
"""Samples from which the language projection is fitted."""

RELATION_TO_THING = 0.5
"""Norm of the words for the relation beside that of the words for the thing that a query tells of."""


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


@torch.no_grad()
def start_in_words(
    model: Blip2ForPreTraining, features: Tensor, captions: Sequence[str], tokenizer: Any
) -> None:
    """Let what cross-attention reads start as word embeddings.

    The values of every cross-attention become the ridge regression from a picture's mean feature to the mean
    embedding of its caption's words, centred and scaled to the norm of a hidden state. The map is linear, so
    it serves each image token as well as their mean: a token shows the words of what it sees.

    What text attends to is words too: queries start with the mean state of text tokens (`_resemble_text`).

    Args:
        model: text embeddings pretrained.
        features: [n, tokens, width] of training pictures, before ``ln_vision``.
        captions: n texts, one a picture.
        tokenizer: of the texts.
    """
    words = model.embeddings.word_embeddings.weight
    seen = torch.cat([model.ln_vision(part.to(words)).mean(1) for part in features.split(256)])
    ridge = _fit(seen, _mean_words(words, tokenizer(list(captions))))
    some = model.ln_vision(features[:SOME].to(words))
    scale = _scale(ridge, some, model.config.qformer.hidden_size**0.5)
    for attention in _cross_attentions(model):
        _become(attention.attention.value, ridge, scale)
        attention.output.dense.weight.copy_(torch.eye(model.config.qformer.hidden_size))
    _resemble_text(model, some, Texts.of(captions[:SOME], tokenizer, words.device))


def _resemble_text(model: Blip2ForPreTraining, seen: Tensor, texts: Texts) -> None:
    """Let the queries' states behind every layer have the mean that those of text tokens have.

    The heads come from a text encoder and look at what resembles text. Without this, text tokens pay the
    queries a tenth of their attention at first; the contrast, in which they do not meet, may leave it so, and
    then neither matching nor generation learns from them.
    """
    text, mask = model.embeddings(texts.input_ids), texts.attention_mask
    read = model.qformer(text, mask, query_length=0, output_hidden_states=True).hidden_states
    queries = model.query_tokens.expand(len(seen), -1, -1)
    for index, layer in enumerate(model.qformer.encoder.layer, 1):
        states = model.qformer(queries, encoder_hidden_states=seen, output_hidden_states=True).hidden_states
        layer.output_query.LayerNorm.bias += read[index][mask.bool()].mean(0) - states[index].mean((0, 1))


@torch.no_grad()
def start_projection(
    model: Blip2ForConditionalGeneration,
    stage1: Blip2ForPreTraining,
    features: Tensor,
    scenes: Sequence[Scene],
    tokenizer: Any,
) -> None:
    """Let each query's soft prompt start as the language model's words for what the query tells of.

    Stage 1 has taken the queries away from their cells. A query tells of that one of a picture's two things,
    in reading order, which a ridge regression finds better in its states. The projection becomes one ridge
    regression for all queries, from their states to the words of that thing and, more quietly, those of the
    relation. It is scaled to the norm of an embedding: a much louder soft prompt silences the language model.

    Args:
        model: stage 2.
        stage1: the trained stage 1 it comes from, in eval mode.
        features: [n, tokens, width] of training pictures, before ``ln_vision``.
        scenes: n, of which those of two things are used.
        tokenizer: the language model's.
    """
    words = model.language_model.get_input_embeddings().weight.float()
    chosen = [index for index, scene in enumerate(scenes) if len(scene.things) == 2][:ENOUGH]
    told = [scenes[index].in_reading_order() for index in chosen]
    things = [_meanings(words, tokenizer, [scene.nouns[place] for scene in told]) for place in (0, 1)]
    relation = _meanings(words, tokenizer, [str(scene.relation) for scene in told])
    parts = torch.tensor(chosen).split(SOME)
    states = torch.cat([query_hidden(stage1, features[part].to(words)) for part in parts])
    read = torch.stack([min(things, key=partial(_left_over, query)) for query in states.unbind(1)], dim=1)
    read = read + RELATION_TO_THING * relation[:, None]
    ridge = _fit(states.flatten(0, 1), read.flatten(0, 1))
    scale = _scale(ridge, states[:SOME], words.norm(dim=1).mean().item())
    _become(model.language_projection, ridge, scale)


def _left_over(x: Tensor, y: Tensor) -> float:
    """Squared error a row of ridge regression, fitted on one half of the rows and judged on the other."""
    half = len(x) // 2
    return (_fit(x[:half], y[:half])(x[half:]) - y[half:]).square().sum(1).mean().item()


# ------------------------------------------------------------------------------------------------ in common


def _cross_attentions(model: Blip2ForPreTraining) -> Iterator[nn.Module]:
    for layer in model.qformer.encoder.layer:
        if hasattr(layer, "crossattention"):
            yield layer.crossattention


def _mean_words(words: Tensor, texts: Any) -> Tensor:
    """Mean embedding of the tokens of each tokenised text, [n, width]. What all texts share is a constant."""
    return torch.stack([words[row].mean(0) for row in texts["input_ids"]])


def _meanings(words: Tensor, tokenizer: Any, phrases: Sequence[str]) -> Tensor:
    """The words of n phrases, [n, width], without what all have in common and with norm 1 on average."""
    texts = tokenizer([f" {phrase}" for phrase in phrases], add_special_tokens=False)
    told = _mean_words(words, texts)
    told = told - told.mean(0)
    return told / _norm(told).clamp_min(torch.finfo(told.dtype).tiny)


def _norm(rows: Tensor) -> Tensor:
    """Root mean square of the norms of rows [..., width]: []."""
    return rows.square().sum(-1).mean().sqrt()


def _fit(x: Tensor, y: Tensor) -> Ridge:
    return fit_ridge(x, y, RELATIVE_PENALTY * (x - x.mean(0)).double().square().sum(0).mean().item())


def _scale(ridge: Ridge, x: Tensor, norm: float) -> float:
    """What brings the centred predictions for x [..., inputs] to a norm."""
    return norm / _norm((x.double() - ridge.x_mean) @ ridge.weight).item()


def _become(linear: nn.Module, ridge: Ridge, scale: float) -> None:
    """Let a Linear compute the centred prediction times scale."""
    linear.weight.copy_(scale * ridge.weight.T)
    linear.bias.copy_(-scale * (ridge.x_mean @ ridge.weight))
