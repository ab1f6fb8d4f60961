"""The baseline every learned figure stands beside: ridge regression from mean-pooled image features to
sentence embeddings.

It needs no training loop and sees the same frozen features and the same captions, so what the Q-Former adds
is the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .evaluation import retrieval


@dataclass(frozen=True)
class Ridge:
    """``y ≈ (x - x_mean) @ weight + y_mean``, the minimum of the squared error plus ``penalty`` times the
    squared weights.

    Attributes:
        weight: fp64 [inputs, outputs].
        x_mean: fp64 [inputs].
        y_mean: fp64 [outputs].
    """

    weight: Tensor
    x_mean: Tensor
    y_mean: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Predictions fp64 [n, outputs] for x [n, inputs]."""
        return (x.double() - self.x_mean) @ self.weight + self.y_mean


def fit_ridge(x: Tensor, y: Tensor, penalty: float) -> Ridge:
    """Fit in closed form.

    Args:
        x: [n, inputs].
        y: [n, outputs].
        penalty: > 0, on the squared weights; the intercept is free.

    Raises:
        ValueError: sizes that differ, or a penalty that is not positive.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"x, y: expected [n, inputs] and [n, outputs], got {list(x.shape)} and {list(y.shape)}"
        )
    if not penalty > 0:
        raise ValueError(f"penalty: expected a positive number, got {penalty}")
    x, y = x.double(), y.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    gram = centred.T @ centred
    gram.diagonal().add_(penalty)
    weight = torch.linalg.solve(gram, centred.T @ (y - y_mean))
    return Ridge(weight, x_mean, y_mean)


def pooled(features: Tensor) -> Tensor:
    """Mean over the tokens of [n, tokens, width], fp32."""
    return features.float().mean(1)


def scores(ridge: Ridge, features: Tensor, embeddings: Tensor) -> Tensor:
    """Cosines fp64 [images, texts] of the predicted and the true sentence embeddings, both centred on
    training's.
    """
    predicted = F.normalize(ridge(pooled(features)) - ridge.y_mean, dim=-1)
    return predicted @ F.normalize(embeddings.double() - ridge.y_mean, dim=-1).T


def choose_penalty(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    penalties: Sequence[float] = (1, 10, 100, 1000),
) -> Ridge:
    """The fit whose predictions retrieve best (R@1, image to text) on the validation split.

    Args:
        train, validation: (features [n, tokens, width], embeddings [n, outputs]).
    """
    x, y = pooled(train[0]), train[1]
    fits = [fit_ridge(x, y, penalty) for penalty in penalties]
    return max(fits, key=lambda ridge: retrieval(scores(ridge, *validation))["image_to_text"]["R@1"])


@torch.no_grad()
def sentence_embeddings(
    captions: Sequence[str], encoder: Any, tokenizer: Any, batch_size: int = 256
) -> Tensor:
    """Mean-pooled last hidden states of a frozen BERT, as MiniLM was trained to be read: fp32 [n, width]."""
    rows = []
    for start in range(0, len(captions), batch_size):
        batch = tokenizer(list(captions[start : start + batch_size]), padding=True, return_tensors="pt")
        hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        rows.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(rows)
