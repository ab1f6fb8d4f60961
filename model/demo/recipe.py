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
from torch.nn import functional as F

from ..generation import Blip2ForConditionalGeneration
from ..pretraining import Blip2ForPreTraining
from ..train import TrainResult, train
from ..train_arguments import MAX_SEED
from . import assets
from .batches import SceneDataset, Stage1Collate, Stage2Collate, TwinBatches
from .evaluation import query_distance
from .scenes import Scene, Splits, make_splits


@dataclass(frozen=True)
class Recipe:
    """The numbers of a run.

    Attributes:
        pairs, relations_a_pair, singles: size of the training set, see `scenes.make_splits`.
        held_out: scenes in each of validation and test.
        num_query_tokens: Q, a square number.
        contrast_steps: stage 1 begins on ITC alone, for so many steps at most: see `ContrastFirst`.
        stage1_steps: steps of stage 1, the first ones included.
        stage1_warmup_steps: of the learning rate. A short warm-up teaches the things at once, and then often
            never which of them lies where.
        stage2_steps, prompt_only_steps: of the captioner and of its baseline without images.
        contrast_batch_size, stage1_batch_size, stage2_batch_size: scenes a step, while ITC is alone, in the
            rest of stage 1 and in stage 2.
        prompt_only_batch_size: the same for the baseline, which learns what captions are like in small steps.
        stage1_learning_rate, stage2_learning_rate: peaks.
        stage2_qformer_rate: what the Q-Former learns at in stage 2, as a share of the projection's.
        stage2_warmup_steps: of the learning rate, and at most half of the steps.
        encode_batch_size: pictures a forward pass of the image encoder.
    """

    pairs: int = 4600
    relations_a_pair: int = 2
    singles: int = 500
    held_out: int = 160
    num_query_tokens: int = 16
    contrast_steps: int = 300
    stage1_steps: int = 1100
    stage1_warmup_steps: int = 100
    stage2_steps: int = 700
    prompt_only_steps: int = 120
    contrast_batch_size: int = 32
    stage1_batch_size: int = 16
    stage2_batch_size: int = 8
    prompt_only_batch_size: int = 4
    stage1_learning_rate: float = 2e-4
    stage2_learning_rate: float = 1e-3
    stage2_qformer_rate: float = 0.1
    stage2_warmup_steps: int = 20
    encode_batch_size: int = 32

    def splits(self, seed: int) -> Splits:
        """The scenes of a run."""
        return make_splits(
            seed,
            pairs=self.pairs,
            relations_a_pair=self.relations_a_pair,
            singles=self.singles,
            held_out=self.held_out,
        )


FULL = Recipe()
QUICK = Recipe(
    pairs=200,
    singles=100,
    held_out=40,
    contrast_steps=20,
    stage1_steps=60,
    stage1_warmup_steps=10,
    stage2_steps=12,
    prompt_only_steps=4,
)
"""Shows that everything works; too short to learn where things are."""


WORDS = "embeddings.word_embeddings.weight"
"""The parameter of stage 1 that stays what it was in MiniLM: its gradient is that of a whole vocabulary and
would cost a third of a step."""


LEAST_DISTANCE = 0.15
"""How far queries have to be from those most like them, on average (`query_distance`). The closed forms begin
at 0.13. Asked of each query alone, matching is not learned in time: it is the mean over queries."""


@contextlib.contextmanager
def mixed_precision(enabled: bool | None = None) -> Iterator[None]:
    """Autocast to bfloat16 where that is faster (or as told), on the device torch would use."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = assets.has_fast_bf16() if enabled is None else enabled
    with torch.autocast(device, torch.bfloat16, enabled=wanted):
        yield


def queries_apart(query_hidden: Tensor) -> Tensor:
    """What is added to stage 1's loss, []: 0 while the queries of a picture differ enough.

    None of the three losses asks them to: ITC takes the best of them, ITM their mean. In some runs of so few
    steps they became one, or two groups of which neither looks at one thing alone, and stage 2 then had to
    learn from that. The root keeps the slope where they are nearly alike.

    Args:
        query_hidden: [B, Q, C], B and Q at least 2.
    """
    return F.relu(LEAST_DISTANCE**0.5 - (query_distance(query_hidden) + 1e-6).sqrt())


class ContrastFirst:
    """Steps of stage 1: ITC alone until it tells twins apart, then ITC with ITM and ITG in turn.

    Matching and generation hardly find by themselves that the order of two things matters: twins differ in it
    alone, and a verdict about them has no slope before both towers know it. The contrast finds it, and then
    the others do within a hundred steps.

    Batches of scenes that share a thing teach the contrast and keep matching from learning: they are for the
    steps of ITG (`hardens`).

    Every loss has `queries_apart` added.

    Args:
        longest: ITC is alone for so many steps at most.
        enough: until this share of a batch's images (running mean) fits its own text best. With twins not
            told apart it stays below 0.6.
    """

    def __init__(self, longest: int, enough: float = 0.8) -> None:
        self.longest, self.enough = longest, enough
        self.share, self.alone = 0.0, True

    def hardens(self, step: int) -> bool:
        """Whether scenes that share a thing shall meet in the batch of a step."""
        return not self.alone and step % 2 == 0

    def __call__(self, model: Any, batch: dict[str, Tensor], step: int) -> Any:
        self.alone = self.alone and step < self.longest and self.share < self.enough
        joined = () if self.alone else ("itm",) if step % 2 else ("itg",)
        output = model(**batch, losses=("itc", *joined))
        if self.alone:
            own = torch.arange(len(output.sim_i2t), device=output.sim_i2t.device)
            right = (output.sim_i2t.argmax(1) == own).double().mean().item()
            self.share += 0.1 * (right - self.share)
        output.loss = output.loss + queries_apart(output.query_hidden)
        return output


def hold_then_fall(done: int, length: int) -> float:
    """Learning rate as a share of its peak: 1, and over the last two fifths a straight line to 0."""
    return min(1.0, (length - done) / (0.4 * length))


def stage1_rates(recipe: Recipe) -> dict[str, Any]:
    """What stage 1 learns at, as arguments of `train`."""
    return {"learning_rate": recipe.stage1_learning_rate, "warmup_steps": recipe.stage1_warmup_steps}


def stage2_rates(recipe: Recipe) -> dict[str, Any]:
    """The same for stage 2."""
    qformer = ("qformer.", "query_tokens", "ln_vision")
    return {
        "learning_rate": recipe.stage2_learning_rate,
        "learning_rate_multipliers": dict.fromkeys(qformer, recipe.stage2_qformer_rate),
        "warmup_steps": recipe.stage2_warmup_steps,
    }


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
    """Stage 1 (paper section 3.1): ITC first, then ITM and ITG too; returns the history of all steps.

    Args:
        model: trained in place, but for `WORDS`.
        features: [n, tokens, width] of the training scenes, before ``ln_vision``.
        scenes, twins: of `Splits`.
    """
    dataset, collate = SceneDataset(features, scenes), Stage1Collate(tokenizer)
    steps, nouns = ContrastFirst(recipe.contrast_steps), [scene.nouns for scene in scenes]

    def batch_size(step: int) -> int:
        return recipe.contrast_batch_size if steps.alone else recipe.stage1_batch_size

    model.get_parameter(WORDS).requires_grad_(False)
    return train(
        model,
        dataset,
        collate=collate,
        batch_sampler=TwinBatches(twins, nouns, batch_size, seed, steps.hardens),
        max_steps=recipe.stage1_steps,
        **stage1_rates(recipe),
        schedule=hold_then_fall,
        step_function=steps,
        output_dir=output_dir,
        bf16=assets.has_fast_bf16(),
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
    batch_size: int,
    output_dir: Path | None = None,
    seed: int = 0,
    progress: bool = True,
    description: str = "stage 2",
) -> TrainResult:
    """Stage 2 (paper section 3.2): caption loss through the frozen language model; trains Q-Former and
    projection.
    """
    rates = stage2_rates(recipe)
    rates["warmup_steps"] = min(rates["warmup_steps"], steps // 2)
    return train(
        model,
        SceneDataset(features, scenes),
        collate=collate,
        batch_size=batch_size,
        max_steps=steps,
        **rates,
        schedule=hold_then_fall,
        output_dir=output_dir,
        bf16=assets.has_fast_bf16(),
        seed=(seed + 2) % (MAX_SEED + 1),
        progress=progress,
        description=description,
    )
