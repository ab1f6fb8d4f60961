"""Both paths learn the same: the demo's training on the plain and on the fused path, side by side.

The demo's stages on its scenes, with dropout. Every path starts from the same weights and sees the same
batches, negatives and dropout masks; steps are taken in turn, so that whatever else the machine does slows
all of them alike.

Whether the paths learn the same is judged in fp64. Training amplifies rounding, between two runs of one path
as between two paths, and what fp32 rounds away is large within twenty steps. fp32 is there for its times and
its curve, and so is, where bfloat16 is faster, the fused path under autocast.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip2_kernels.checks import check_int

from ..data.batches import ShuffledBatches
from ..generation import Blip2ForConditionalGeneration
from ..progress import ProgressBar
from . import assets, figures, pipeline, recipe, report, warm_start
from .batches import SceneDataset, Stage1Collate, Stage2Collate, TwinBatches
from .side_by_side import Learner, summarise, train_in_turn

LIMIT = 1e-3
"""By how much a loss of the fused path may differ from the plain path's in fp64, relative to it, ..."""

COMPARED_STEPS = 20
"""... in so many first steps."""

BATCH = 8
"""Scenes a step: fp64 is slow, and smaller batches show the same."""

STAGE2_RATES = {"learning_rate": 1e-4, "warmup_steps": 100}
"""The paper's peak, and a new projection. From the demo's closed forms and at its rates a step of stage 2
makes any difference ten to a hundred times larger: after a dozen steps nothing is left of fp64."""

DROPOUT = 0.1
"""Of hidden states and attention probabilities, as in the paper's Q-Former; the demo itself has none."""


@dataclass(frozen=True)
class Variant:
    """A path and what it computes in.

    Attributes:
        use_fused: which path.
        dtype: of weights, features and the optimizer's state.
        autocast: whether the forward pass runs under autocast to bfloat16.
    """

    use_fused: bool
    dtype: torch.dtype = torch.float32
    autocast: bool = False

    @property
    def language_model_dtype(self) -> torch.dtype:
        """What the frozen language model computes in."""
        return torch.bfloat16 if self.autocast else self.dtype


PLAIN, FUSED, FUSED_BF16 = "plain, fp32", "fused, fp32", "fused, bf16"
PLAIN_FP64, FUSED_FP64 = "plain, fp64", "fused, fp64"
VARIANTS = {
    PLAIN: Variant(use_fused=False),
    FUSED: Variant(use_fused=True),
    FUSED_BF16: Variant(use_fused=True, autocast=True),
    PLAIN_FP64: Variant(use_fused=False, dtype=torch.float64),
    FUSED_FP64: Variant(use_fused=True, dtype=torch.float64),
}
REFERENCES = {FUSED: PLAIN, FUSED_BF16: PLAIN, FUSED_FP64: PLAIN_FP64}
"""What each is compared with."""


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
    sees one. Stage 2 starts on every path from what stage 1 became on the plain one in fp32.

    Args:
        output_dir: made if it does not exist; results of an earlier comparison are replaced.
        steps: of each stage and path, at least 1.
        quick, seed, cache_dir, progress: as for `pipeline.run`.

    Returns:
        The content of ``paths.json``: `stages`, of each stage what `summarise` gives, and how it came about.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.
        ImportError: a package of the demo is missing; all are named.
        PathsDifferError: in fp64 a loss of the first 20 steps differs by more than 1e-3 of its value. Picture
            and figures are written before.
    """
    output, cache = pipeline.check_arguments(output_dir, quick, seed, cache_dir, progress)
    check_int("steps", steps, 1)
    assets.check_installed()
    output.mkdir(parents=True, exist_ok=True)
    plan = recipe.QUICK if quick else recipe.FULL
    results: dict[str, Any] = {
        "steps": steps,
        "compared_steps": COMPARED_STEPS,
        "limit": LIMIT,
        "seed": seed,
        "quick": quick,
        "recipe": asdict(plan),
        "batch_size": BATCH,
        "dropout": DROPOUT,
        "environment": {
            "torch": torch.__version__,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
        },
        "stages": {},
    }
    for stage in _stages(plan, seed, cache, progress):
        learners = {
            name: Learner(model, autocast=VARIANTS[name].autocast, **stage.rates)
            for name, model in stage.models.items()
        }
        batches = itertools.islice(stage.batches, steps)
        with ProgressBar(f"{stage.title}, a step of each path", steps, enabled=progress) as bar:
            curves = train_in_turn(learners, batches, seed=seed, on_step=bar.update)
        results["stages"][stage.title] = summarise(curves, REFERENCES, COMPARED_STEPS)
        report.write_text(output / "paths.json", json.dumps(results, indent=1) + "\n")
        figures.draw_paths(
            {name: curves_of(paths) for name, paths in results["stages"].items()}, output / "paths.png"
        )
    print_table(results["stages"])
    for title, paths in results["stages"].items():
        difference = paths[FUSED_FP64]["largest_difference"]
        if not difference <= LIMIT:
            raise PathsDifferError(
                f"{title}: expected each loss of the fused path within {LIMIT:g} of the plain path's in the "
                f"first {COMPARED_STEPS} steps in fp64, got {difference:.2g}; see {output}/paths.png"
            )
    return results


@dataclass(frozen=True)
class Stage:
    """A stage as every variant trains it.

    Attributes:
        title: of the stage.
        models: by the name of the variant, with equal weights.
        batches: of the demo's scenes, in the order of this seed.
        rates: as `Learner` takes them.
    """

    title: str
    models: dict[str, Any]
    batches: Iterator[dict[str, Tensor]]
    rates: dict[str, Any]


def _stages(plan: recipe.Recipe, seed: int, cache: Path, progress: bool) -> Iterator[Stage]:
    """Both stages. The second goes on with what the first one's plain model in fp32 has become by then."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = plan.splits(seed)
    features = pipeline.encode(splits, cache, plan.encode_batch_size, progress).train
    dataset, captions = SceneDataset(features, splits.train), [scene.caption() for scene in splits.train]

    tokenizer = assets.load_text_tokenizer()
    start: Any = assets.load_stage1(plan.num_query_tokens, seed=seed, dropout=DROPOUT).to(device)
    warm_start.start_in_words(start, features, captions, tokenizer)
    start.get_parameter(recipe.WORDS).requires_grad_(False)
    models = copies(start)
    nouns = [scene.nouns for scene in splits.train]
    twins = TwinBatches(splits.twins, nouns, lambda step: BATCH, seed)
    batches = told_batches(dataset, twins, Stage1Collate(tokenizer), seed, device)
    yield Stage("stage 1", models, batches, recipe.stage1_rates(plan))

    language_model, tokenizer = assets.load_language_model(cache, torch.float32)
    stage1 = models[PLAIN].eval()
    del models, start
    start = Blip2ForConditionalGeneration.from_pretraining(stage1, language_model.to(device))
    shuffled = epoch_after_epoch(ShuffledBatches(len(dataset), BATCH, seed=seed))
    batches = told_batches(dataset, shuffled, Stage2Collate(tokenizer), seed, device)
    yield Stage("stage 2", copies(start, language_model), batches, STAGE2_RATES)


def copies(start: Any, language_model: nn.Module | None = None) -> dict[str, Any]:
    """A copy of a model in fp32 for each variant that runs here; one frozen language model for all that
    compute in its dtype."""
    models, language_models = {}, {torch.float32: language_model}
    for name, variant in VARIANTS.items():
        if variant.autocast and not assets.has_fast_bf16():
            continue
        shared = {}
        if language_model is not None:
            dtype = variant.language_model_dtype
            if dtype not in language_models:
                language_models[dtype] = copy.deepcopy(language_model).to(dtype)
                if dtype == torch.float64:
                    keep_fp64(language_models[dtype])
            shared[id(language_model)] = language_models[dtype]
        model = copy.deepcopy(start, memo=shared)
        if variant.dtype != torch.float32:  # which would widen a language model in bf16
            model.to(variant.dtype)
        model.use_fused = variant.use_fused
        models[name] = model
    return models


def keep_fp64(language_model: Any) -> None:
    """Let a Llama-like model compute in fp64 what transformers rounds to fp32 whatever the dtype: norms,
    softmax and its loss."""
    language_model.set_attn_implementation("sdpa")
    language_model.loss_function = _next_token_loss
    for parent in list(language_model.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)


def _next_token_loss(logits: Tensor, labels: Tensor, vocab_size: int, **unused: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def epoch_after_epoch(batches: ShuffledBatches) -> Iterator[list[int]]:
    """The indices of all batches, without an end."""
    for epoch in itertools.count():
        batches.set_epoch(epoch)
        yield from batches


def told_batches(
    dataset: SceneDataset, indices: Iterable[list[int]], collate: Any, seed: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """The batches of a training from this seed."""
    random.seed(seed)  # of the side that a caption is told from
    for some in indices:
        batch = collate([dataset[index] for index in some])
        yield {name: value.to(device) for name, value in batch.items()}


def curves_of(stage: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    """The loss of every step, by path; the one that the others are judged by first."""
    shown = [name for name in (PLAIN_FP64, FUSED_FP64, FUSED, FUSED_BF16) if name in stage]
    return {name: [row["loss"] for row in stage[name]["curve"]] for name in shown}


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
                f"{path['largest_difference']:.1e}" if name in REFERENCES else "",
                f"{path['seconds_a_step']:.3f}",
                f"{path['times_as_fast']:.2f}",
                end_section=name == [*paths][-1],
            )
    console = Console()
    console.print(table)
    note = f"largest of any loss in the first {COMPARED_STEPS} steps, relative to the plain path's"
    console.print(f"* {note} in fp64, else in fp32; times: medians", soft_wrap=True)
