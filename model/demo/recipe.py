"""How the demo trains: its numbers as data, and the two stages.

Tuned on the validation scenes; the test scenes were looked at for the report only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..generation import Blip2ForConditionalGeneration
from ..pretraining import Blip2ForPreTraining
from ..train import TrainResult, train
from .assets import has_fast_bf16
from .batches import SceneDataset, Stage1Collate, Stage2Collate, TwinBatches
from .scenes import Scene


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run.

    Attributes:
        pairs, relations_a_pair, singles: size of the training set, see `scenes.make_splits`.
        held_out: scenes in each of validation and test.
        num_query_tokens: Q.
        lookup_layers: self-attention layers in which words start looking themselves up, see `warm_start`.
        steps_without_itm: first steps of stage 1, on ITC and ITG: matching is no use before the things are
            known.
        steps_between_itm: after them ITM, the dearest of the losses, joins in every so many steps.
        stage1_steps: steps of stage 1, the first ones included.
        itc_weights: of the contrast, before and after `steps_without_itm`. At full weight its maximum over the
            queries pulls all of them to the whole picture before any has learned its part of it.
        stage2_steps, prompt_only_steps: of the captioner and of its baseline without images.
        twin_share: probability that ITM's negative differs by the relation alone.
        stage1_batch_size, stage2_batch_size: scenes a step.
        stage1_learning_rate, stage2_learning_rate: peaks.
        stage2_qformer_rate: what the Q-Former learns at in stage 2, as a share of the projection's.
        encode_batch_size: pictures a forward pass of the image encoder.
    """

    pairs: int = 1250
    relations_a_pair: int = 2
    singles: int = 500
    held_out: int = 160
    num_query_tokens: int = 16
    lookup_layers: tuple[int, ...] = (1, 3)
    steps_without_itm: int = 160
    steps_between_itm: int = 2
    stage1_steps: int = 440
    itc_weights: tuple[float, float] = (0.1, 0.3)
    stage2_steps: int = 180
    prompt_only_steps: int = 90
    twin_share: float = 0.5
    stage1_batch_size: int = 32
    stage2_batch_size: int = 32
    stage1_learning_rate: float = 2e-4
    stage2_learning_rate: float = 1e-3
    stage2_qformer_rate: float = 0.1
    encode_batch_size: int = 32


FULL = Recipe()
QUICK = Recipe(
    pairs=200,
    singles=100,
    held_out=40,
    steps_without_itm=20,
    stage1_steps=60,
    stage2_steps=12,
    prompt_only_steps=4,
)
"""Shows that everything works; too short to learn where things are."""


@contextlib.contextmanager
def mixed_precision(enabled: bool | None = None) -> Iterator[None]:
    """Autocast to bfloat16 where that is native (or as told), on the device torch would use."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, torch.bfloat16, enabled=has_fast_bf16() if enabled is None else enabled):
        yield


def train_stage1(
    model: Blip2ForPreTraining,
    features: Tensor,
    scenes: tuple[Scene, ...],
    twins: tuple[int, ...],
    tokenizer: Any,
    recipe: Recipe,
    *,
    output_dir: Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Stage 1 (paper section 3.2): ITC + ITG first, then ITM too; returns the history of all steps.

    Args:
        model: trained in place.
        features: [n, tokens, width] of the training scenes, before ``ln_vision``.
        scenes, twins: of `Splits`.
    """
    dataset, collate = SceneDataset(features, scenes, twins), Stage1Collate(tokenizer, recipe.twin_share)

    model.embeddings.word_embeddings.weight.requires_grad_(False)

    def weights(step: int) -> dict[str, float]:
        later = step - recipe.steps_without_itm
        parts = {"loss_itc": recipe.itc_weights[later >= 0], "loss_itg": 1.0}
        if later >= 0 and later % recipe.steps_between_itm == 0:
            parts["loss_itm"] = 1.0
        return parts

    def step_function(model: Any, batch: dict[str, Tensor], step: int) -> Any:
        return model(**batch, losses=[name.removeprefix("loss_") for name in weights(step)])

    return train(
        model,
        dataset,
        collate=collate,
        batch_sampler=TwinBatches(twins, recipe.stage1_batch_size, seed),
        max_steps=recipe.stage1_steps,
        learning_rate=recipe.stage1_learning_rate,
        warmup_steps=min(30, recipe.stage1_steps // 4),
        loss_weights=weights,
        step_function=step_function,
        output_dir=output_dir,
        bf16=has_fast_bf16(),
        seed=seed,
        progress=progress,
        description="stage 1",
    ).history


def train_stage2(
    model: Blip2ForConditionalGeneration,
    features: Tensor,
    scenes: tuple[Scene, ...],
    collate: Stage2Collate,
    recipe: Recipe,
    *,
    steps: int,
    output_dir: Path | None = None,
    seed: int = 0,
    progress: bool = True,
    description: str = "stage 2",
) -> TrainResult:
    """Stage 2 (paper section 3.3): caption loss through the frozen language model; trains Q-Former and
    projection.
    """
    rate = recipe.stage2_qformer_rate
    return train(
        model,
        SceneDataset(features, scenes),
        collate=collate,
        batch_size=recipe.stage2_batch_size,
        max_steps=steps,
        learning_rate=recipe.stage2_learning_rate,
        learning_rate_multipliers={"qformer.": rate, "query_tokens": rate, "ln_vision": rate},
        warmup_steps=min(20, steps // 2),
        output_dir=output_dir,
        bf16=has_fast_bf16(),
        seed=seed + 2,
        progress=progress,
        description=description,
    )
