"""Both paths learn the same: the demo's training on the plain and on the fused path, side by side.

Every path starts from the same weights and sees the same batches, negatives and dropout masks; steps are
taken in turn, so that whatever else the machine does slows all of them alike. Where bfloat16 is native, the
fused path under autocast runs beside them.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import ShuffledBatches
from ..generation import Blip2ForConditionalGeneration
from ..progress import ProgressBar
from . import assets, figures, pipeline, recipe, report, warm_start
from .batches import SceneDataset, Stage1Collate, Stage2Collate, TwinBatches
from .side_by_side import Learner, summarise, train_in_turn

LIMIT = 1e-3
"""By how much a loss of the fused path may differ from the plain path's, relative to it, ..."""

COMPARED = {"stage 1": 20, "stage 2": 10}
"""... in so many first steps. Later ones amplify rounding, between two runs of one path as between two paths,
and through a frozen language model sooner: see `docs/decisions.md`."""

DROPOUT = 0.1
"""Of hidden states and attention probabilities, as in the paper's Q-Former; the demo itself has none."""

BATCH, LEARNING_RATE, WARMUP_STEPS = 8, 1e-4, 100
"""Of both stages: the paper's peak rate, behind a warm-up that few comparisons see the end of. On the demo's
own batches and rates rounding grows into the loss within ten steps."""

PLAIN, FUSED, FUSED_BF16 = "plain, fp32", "fused, fp32", "fused, bf16"


class PathsDifferError(RuntimeError):
    """The fused path did not learn what the plain path learns."""


def compare(
    output_dir: str | Path = "runs/demo",
    steps: int = 20,
    quick: bool = False,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train both stages on both paths, with dropout and all losses in every step; compare losses and times.

    Prints a table and writes ``paths.png`` and ``paths.json`` into ``output_dir``. Uses a GPU where torch
    sees one. Stage 2 starts on every path from what stage 1 became on the plain one, and a new projection.

    Args:
        output_dir: made if it does not exist; results of an earlier comparison are replaced.
        steps: of each stage and path, at least 1.
        quick, seed, cache_dir, progress: as for `pipeline.run`.

    Returns:
        The content of ``paths.json``: `stages`, of each stage what `summarise` gives, and how it came about.

    Raises:
        ImportError: a package of the demo is missing; all are named.
        ValueError: fewer steps than one.
        PathsDifferError: in fp32 a loss of the first 20 steps of stage 1 or 10 of stage 2 differs by more
            than 1e-3 of its value. Figure and figures are written before.
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    assets.check_installed()
    output, cache = Path(output_dir), Path(cache_dir) if cache_dir is not None else assets.default_cache_dir()
    output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "steps": steps,
        "compared_steps": COMPARED,
        "limit": LIMIT,
        "seed": seed,
        "quick": quick,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": WARMUP_STEPS,
        "dropout": DROPOUT,
        "environment": {
            "torch": torch.__version__,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
        },
        "stages": {},
    }
    for title, models, batches in _stages(quick, seed, cache, progress):
        learners = {
            name: Learner(
                model, learning_rate=LEARNING_RATE, warmup_steps=WARMUP_STEPS, autocast=name == FUSED_BF16
            )
            for name, model in models.items()
        }
        with ProgressBar(f"{title}, a step of each path", steps, enabled=progress) as bar:
            curves = train_in_turn(learners, itertools.islice(batches, steps), seed=seed, on_step=bar.update)
        results["stages"][title] = summarise(curves, COMPARED[title])
        report.write_text(output / "paths.json", json.dumps(results, indent=1) + "\n")
        figures.draw_paths(
            {name: curves_of(stage) for name, stage in results["stages"].items()}, output / "paths.png"
        )
    print_table(results["stages"])
    for title, stage in results["stages"].items():
        difference = stage[FUSED]["largest_difference"]
        if not difference <= LIMIT:
            raise PathsDifferError(
                f"{title}: expected each loss of the fused path within {LIMIT:g} of the plain path's in the "
                f"first {COMPARED[title]} steps, got {difference:.2g}; see {output}/paths.png"
            )
    return results


Stage = tuple[str, dict[str, Any], Iterator[dict[str, Tensor]]]


def _stages(quick: bool, seed: int, cache: Path, progress: bool) -> Iterator[Stage]:
    """Title, model of each path and batches. Stage 2 goes on with what stage 1's plain model has become by
    then."""
    plan = recipe.QUICK if quick else recipe.FULL
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = plan.splits(seed)
    features = pipeline.encode(splits, cache, plan.encode_batch_size, progress).train
    dataset, captions = SceneDataset(features, splits.train), [scene.caption() for scene in splits.train]

    tokenizer = assets.load_text_tokenizer()
    start: Any = assets.load_stage1(plan.num_query_tokens, seed=seed, dropout=DROPOUT).to(device)
    warm_start.start_in_words(start, features, captions, tokenizer)
    start.get_parameter(recipe.WORDS).requires_grad_(False)
    models, twins = copies(start), TwinBatches(splits.twins, BATCH, seed)
    batches = told_batches(dataset, twins, Stage1Collate(tokenizer), seed, device)
    yield "stage 1", models, batches

    language_model, tokenizer = assets.load_language_model(cache, torch.float32)
    stage1 = models[PLAIN].eval()
    start = Blip2ForConditionalGeneration.from_pretraining(stage1, language_model.to(device))
    shuffled = ShuffledBatches(len(dataset), BATCH, seed=seed)
    batches = told_batches(dataset, shuffled, Stage2Collate(tokenizer), seed, device)
    yield "stage 2", copies(start, language_model), batches


def copies(start: Any, language_model: nn.Module | None = None) -> dict[str, Any]:
    """A model for each path, all with the same weights; the frozen language model is shared, but for bf16,
    which has one in bf16."""
    models = {}
    for name in (PLAIN, FUSED, FUSED_BF16) if assets.has_fast_bf16() else (PLAIN, FUSED):
        shared = {}
        if language_model is not None:
            half = copy.deepcopy(language_model).bfloat16() if name == FUSED_BF16 else language_model
            shared[id(language_model)] = half
        models[name] = copy.deepcopy(start, memo=shared)
        models[name].use_fused = name != PLAIN
    return models


def told_batches(
    dataset: SceneDataset, sampler: Any, collate: Any, seed: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The batches of a training from this seed, epoch after epoch."""
    random.seed(seed)  # of the side that a caption is told from
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for indices in sampler:
            batch = collate([dataset[index] for index in indices])
            yield {name: value.to(device) for name, value in batch.items()}


def curves_of(stage: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """The loss of every step, by path."""
    return {name: [row["loss"] for row in path["curve"]] for name, path in stage.items()}


def print_table(stages: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """What each path came to, on the terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "", "path", title=f"Both paths from the same seed, dropout {DROPOUT:g}", box=SIMPLE, padding=(0, 0)
    )
    table.columns[1].no_wrap = True
    for column in ("first loss", "last loss", "difference*", "s a step", "times as fast"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage, paths in stages.items():
        for name, path in paths.items():
            table.add_row(
                stage if name == PLAIN else "",
                name,
                f"{path['curve'][0]['loss']:.4f}",
                f"{path['curve'][-1]['loss']:.4f}",
                "" if name == PLAIN else f"{path['largest_difference']:.1e}",
                f"{path['seconds_a_step']:.3f}",
                f"{path['times_as_fast']:.2f}",
                end_section=name == [*paths][-1],
            )
    console = Console()
    console.print(table)
    steps = " and ".join(f"{count} ({stage})" for stage, count in COMPARED.items())
    note = f"largest of any loss in the first {steps} steps, relative to the plain path's; times: medians"
    console.print(f"* {note}", soft_wrap=True)
