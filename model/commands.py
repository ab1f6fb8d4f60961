"""The commands of `blip2-kernels`; :func:`~blip2_kernels.model.cli.main` runs them and reports errors."""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .command_options import (
    Accumulate,
    Augment,
    BatchSize,
    Beta2,
    Bf16,
    CacheDir,
    Captions,
    CheckpointArgument,
    Clip,
    Device,
    Epochs,
    FinalRate,
    Fused,
    ImageRoot,
    ManifestArgument,
    OutputOption,
    Rate,
    Resume,
    SaveEvery,
    Seed,
    SkipFaults,
    Steps,
    Warmup,
    WeightDecay,
    Workers,
)
from .conversion.command import convert, load_check

app = typer.Typer(
    help="BLIP-2: train, caption, retrieve. `demo` shows all of it on pictures that pip installs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(convert)
app.command()(load_check)
train_app = typer.Typer(help="Train on your own images.", no_args_is_help=True)
app.add_typer(train_app, name="train")


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """The option is taken out by `main` before typer sees it; it stands here for --help."""


@app.command()
def version() -> None:
    """Show the versions of this package and of what it runs on."""
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    typer.echo(f"blip2-kernels {importlib.metadata.version('blip2-kernels')}")
    typer.echo(f"torch {torch.__version__}, transformers {transformers.__version__}, GPU: {gpu}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Say what works here: the environment, and every operator's backends with a small self-test of each.

    Ends with 1 where a backend ran and failed; one that cannot serve here, and says why, is no failure.
    """
    from blip2_kernels.doctor import print_report

    raise typer.Exit(print_report(as_json))


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A short run that learns little.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of scenes, weights and order.")] = 0,
    output: Annotated[Path, typer.Option(help="Where figures, captions and metrics go.")] = Path("runs/demo"),
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")
    ] = None,
    use_fused: Annotated[
        bool, typer.Option("--use-fused/--no-use-fused", help="Run the fused encoder.")
    ] = True,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where image features and the dequantised LLM are kept.")
    ] = None,
    compare_paths: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS", min=1, help="Only train so many steps on both paths; compare losses, times."
        ),
    ] = None,
) -> None:
    """Train both stages on pictures that pip installs, and caption pictures never seen."""
    if device == "cpu":
        # Before torch looks: every part of the demo takes what it sees.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    where = _device(device)
    from blip2_kernels.checks import check_folder

    for name, folder in (("output", output), ("cache_dir", cache_dir)):
        if folder is not None:
            check_folder(name, folder)
    from .demo import compare, run
    from .memory import keep_freed_memory

    if where == "cpu":
        keep_freed_memory()
    if compare_paths is not None:
        compare(output_dir=output, steps=compare_paths, quick=quick, seed=seed, cache_dir=cache_dir)
        return
    run(output_dir=output, quick=quick, seed=seed, use_fused=use_fused, cache_dir=cache_dir)


def _checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the newest one in a run's folder."""
    from .checkpoints import MANIFEST, latest_checkpoint

    if (path / MANIFEST).is_file():
        return path
    found = latest_checkpoint(path)
    if found is None:
        raise FileNotFoundError(f"checkpoint: expected a checkpoint or a folder of checkpoints, got {path}")
    return found


def _device(name: str | None) -> str:
    import torch

    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU that torch sees for cuda, got none")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _dataset(
    manifest: Path, image_root: Path | None, skip_faults: bool, vision: Any, cache_dir: Path | None,
    captions: str, augment: bool, seed: int, device: str,
) -> Any:  # fmt: skip
    """The training images, as pixels or as cached features; says what it leaves out."""
    from .data.image_text import ImageTextDataset, RandomResizedCrop
    from .data.manifest import read_manifest
    from .progress import ProgressBar

    read = read_manifest(manifest, image_root=image_root, on_fault="skip" if skip_faults else "raise")
    if cache_dir is None:
        dataset = ImageTextDataset(
            read,
            preprocess=vision.preprocess,
            captions=captions,
            augment=RandomResizedCrop() if augment else None,
            seed=seed,
        )
    else:
        from .feature_cache import FeatureCache

        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        with ProgressBar("image features", len(read.images), enabled=_is_main()) as bar:
            dataset = ImageTextDataset(
                read,
                feature_cache=FeatureCache(cache_dir, vision.to(device)),
                captions=captions,
                augment=RandomResizedCrop() if augment else None,
                seed=seed,
                progress=lambda done, total: bar.update(done),
            )
    _say(dataset.summary())
    return dataset


def _is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _say(text: str) -> None:
    if _is_main():
        typer.echo(text, err=True)


def _schedule(
    steps: int | None, epochs: float | None, warmup: int | None, samples: int, batch: int
) -> dict[str, Any]:
    """`max_steps`, `epochs` and `warmup_steps` of a run; ten epochs if neither is given."""
    from blip2_kernels.checks import check_finite

    if steps is not None and epochs is not None:
        raise ValueError(f"steps, epochs: expected one of them, got {steps} and {epochs}")
    if steps is None and epochs is None:
        epochs = 10.0
    if epochs is not None:
        check_finite("epochs", epochs, above=0)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    length = steps if steps is not None else int((epochs or 0) * (samples // (batch * ranks)))
    return {
        "max_steps": steps,
        "epochs": epochs,
        "warmup_steps": min(2000, length // 10) if warmup is None else warmup,
    }


def _run(model: Any, dataset: Any, collate: Any, output: Path, resume: bool, **options: Any) -> None:
    from .checkpoints import latest_checkpoint
    from .distributed import end_process_group
    from .memory import keep_freed_memory
    from .train import train

    if options["device"] == "cpu":
        keep_freed_memory()
    found = latest_checkpoint(output) if resume else None
    if resume and found is None:
        _say(f"no checkpoint in {output} yet: starting anew")
    betas = (0.9, options.pop("beta2"))
    result = train(
        model, dataset, collate=collate, output_dir=output, resume_from=found, betas=betas, **options
    )
    last = result.history[-1] if result.history else {}
    parts = ", ".join(f"{name} {value:.4f}" for name, value in last.items() if name.startswith("loss"))
    _say(dataset.summary())
    _say(f"{result.steps} steps in {result.seconds:.0f} s; {parts}")
    if _is_main() and result.checkpoints:
        typer.echo(result.checkpoints[-1])
    end_process_group()


def _vision_spec(vision: Any, name: str, layer: int | None) -> dict[str, Any]:
    from .pipeline import EFFICIENTNET

    where = name if name == EFFICIENTNET else str(Path(name).resolve())
    return {"name": where, "layer": layer, "fingerprint": vision.fingerprint()}


@train_app.command("stage1")
def train_stage1(
    manifest: ManifestArgument,
    output: OutputOption,
    vision: Annotated[
        str | None, typer.Option(help="Image encoder: a transformers model folder or efficientnet-lite0.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a BERT-like tokenizer; default: that of --bert.")
    ] = None,
    bert: Annotated[Path | None, typer.Option(help="BERT folder that the Q-Former starts from.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="Stage-1 checkpoint to start from, in place of --bert.")
    ] = None,
    vision_layer: Annotated[
        int | None, typer.Option(help="Hidden state to read, e.g. -2; default: the last.")
    ] = None,
    qformer_config: Annotated[
        Path | None,
        typer.Option(help="JSON file with fields of Blip2QFormerConfig that differ from BERT-base."),
    ] = None,
    num_query_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Learned queries an image.")] = 32,
    max_text_length: Annotated[int, typer.Option(min=2, help="Tokens a caption at most.")] = 32,
    embedding_width: Annotated[
        int, typer.Option(min=1, help="Width in which image and text are compared.")
    ] = 256,
    image_root: ImageRoot = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = 64,
    learning_rate: Rate = 1e-4,
    min_learning_rate: FinalRate = 1e-5,
    warmup: Warmup = None,
    weight_decay: WeightDecay = 0.05,
    beta2: Beta2 = 0.98,
    clip: Clip = 1.0,
    accumulate: Accumulate = 1,
    bf16: Bf16 = False,
    seed: Seed = 0,
    device: Device = None,
    workers: Workers = 0,
    save_every: SaveEvery = None,
    resume: Resume = False,
    use_fused: Fused = True,
    cache_dir: CacheDir = None,
    captions: Captions = "each",
    augment: Augment = False,
    skip_faults: SkipFaults = False,
) -> None:
    """Representation learning: contrast, matching and grounded generation (paper section 3.1).

    The newest checkpoint's folder is printed at the end. Several GPUs: `torchrun --nproc-per-node=N -m
    blip2_kernels.model.cli train stage1 …`.
    """
    import torch

    from .data.collate import CaptionCollator
    from .pipeline import build_stage1, load_tokenizer, load_trained, load_vision
    from .pretrained import read_json

    where = _device(device)
    torch.manual_seed(seed)
    if init is not None:
        trained = load_trained(_checkpoint(init), use_fused=use_fused)
        if trained.stage != 1:
            raise ValueError("init: expected a checkpoint of stage 1, got one of stage 2")
        if bert is not None or vision is not None or tokenizer is not None:
            raise ValueError("init: expected it without --bert, --vision and --tokenizer, which it brings")
        model, words, folder = trained.model.train(), trained.tokenizer, Path(trained.config["tokenizer"])
        spec = trained.config["vision"]
    else:
        source = tokenizer or bert
        if source is None:
            raise ValueError("tokenizer: expected --tokenizer, --bert or --init, got none of them")
        if vision is None:
            raise ValueError("vision: expected --vision (or --init, which brings its own), got neither")
        words, folder = load_tokenizer(source), source
        encoder = load_vision({"name": vision, "layer": vision_layer})
        spec = _vision_spec(encoder, vision, vision_layer)
        model = build_stage1(
            encoder,
            words,
            bert=bert,
            qformer=read_json("qformer_config", qformer_config) if qformer_config else None,
            num_query_tokens=num_query_tokens,
            max_text_length=max_text_length,
            embedding_width=embedding_width,
            use_fused=use_fused,
        )
    dataset = _dataset(
        manifest, image_root, skip_faults, model.vision_model, cache_dir, captions, augment, seed, where
    )
    _run(
        model,
        dataset,
        CaptionCollator(words, model.config.max_text_length),
        output,
        resume,
        **_schedule(steps, epochs, warmup, len(dataset), batch_size),
        batch_size=batch_size,
        learning_rate=learning_rate,
        min_learning_rate=min_learning_rate,
        weight_decay=weight_decay,
        beta2=beta2,
        max_grad_norm=clip,
        gradient_accumulation_steps=accumulate,
        bf16=bf16,
        seed=seed,
        device=where,
        num_workers=workers,
        save_every=save_every,
        description="stage 1",
        checkpoint_config={
            "stage": 1,
            "model": model.config.to_dict(),
            "vision": spec,
            "tokenizer": str(Path(folder).resolve()),
        },
    )


@train_app.command("stage2")
def train_stage2(
    manifest: ManifestArgument,
    output: OutputOption,
    stage1: Annotated[Path, typer.Option(help="Stage-1 checkpoint (or the --output of its training).")],
    language_model: Annotated[
        Path, typer.Option(help="Folder of a causal or encoder-decoder language model.")
    ],
    prompt: Annotated[str, typer.Option(help="Stands before every caption, unsupervised.")] = "a photo of",
    max_text_length: Annotated[int, typer.Option(min=2, help="Tokens a caption at most.")] = 32,
    image_root: ImageRoot = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = 64,
    learning_rate: Rate = 1e-4,
    min_learning_rate: FinalRate = 5e-5,
    warmup: Warmup = None,
    weight_decay: WeightDecay = 0.05,
    beta2: Beta2 = 0.98,
    clip: Clip = 1.0,
    accumulate: Accumulate = 1,
    bf16: Bf16 = False,
    seed: Seed = 0,
    device: Device = None,
    workers: Workers = 0,
    save_every: SaveEvery = None,
    resume: Resume = False,
    use_fused: Fused = True,
    cache_dir: CacheDir = None,
    captions: Captions = "each",
    augment: Augment = False,
    skip_faults: SkipFaults = False,
) -> None:
    """Generative learning through a frozen language model (paper section 3.2), from a stage-1 checkpoint.

    The newest checkpoint's folder is printed at the end.
    """
    import torch

    from .data.collate import GenerationCollator
    from .generation import Blip2ForConditionalGeneration
    from .pipeline import load_language_model, load_tokenizer, load_trained

    where = _device(device)
    torch.manual_seed(seed)
    first = load_trained(_checkpoint(stage1), use_fused=use_fused)
    if first.stage != 1:
        raise ValueError("stage1: expected a checkpoint of stage 1, got one of stage 2")
    words = load_tokenizer(language_model)
    model = Blip2ForConditionalGeneration.from_pretraining(first.model, load_language_model(language_model))
    dataset = _dataset(
        manifest, image_root, skip_faults, model.vision_model, cache_dir, captions, augment, seed, where
    )
    collate = GenerationCollator(
        words, prompt=prompt, max_text_length=max_text_length, encoder_decoder=model.is_encoder_decoder
    )
    _run(
        model.train(),
        dataset,
        collate,
        output,
        resume,
        **_schedule(steps, epochs, warmup, len(dataset), batch_size),
        batch_size=batch_size,
        learning_rate=learning_rate,
        min_learning_rate=min_learning_rate,
        weight_decay=weight_decay,
        beta2=beta2,
        max_grad_norm=clip,
        gradient_accumulation_steps=accumulate,
        bf16=bf16,
        seed=seed,
        device=where,
        num_workers=workers,
        save_every=save_every,
        description="stage 2",
        checkpoint_config={
            "stage": 2,
            "model": model.config.to_dict(),
            "vision": first.config["vision"],
            "tokenizer": str(language_model.resolve()),
            "language_model": str(language_model.resolve()),
            "prompt": prompt,
        },
    )


@app.command()
def caption(
    checkpoint: CheckpointArgument,
    images: Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option(help="Words to go on from; default: those of the training.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest caption in tokens.")] = 30,
    num_beams: Annotated[int, typer.Option(min=1, help="Width of the beam search.")] = 1,
    device: Device = None,
    use_fused: Fused = True,
) -> None:
    """Caption images with a checkpoint of either stage: one line an image, its path, a tab, the caption.

    Images that cannot be decoded are named on stderr; the exit code is 1 if there were any.
    """
    found, where = _checkpoint(checkpoint), _device(device)
    from .pipeline import caption_images, load_trained

    trained = load_trained(found, device=where, use_fused=use_fused)
    texts = caption_images(
        trained, list(images), prompt=prompt, max_new_tokens=max_new_tokens, num_beams=num_beams
    )
    for path, text in zip(images, texts, strict=True):
        if text is not None:
            typer.echo(f"{path}\t{text}")
    if broken := [str(path) for path, text in zip(images, texts, strict=True) if text is None]:
        raise ValueError(f"{len(broken)} of {len(images)} images cannot be decoded: {', '.join(broken)}")


@app.command()
def score(
    checkpoint: CheckpointArgument,
    manifest: ManifestArgument,
    image_root: ImageRoot = None,
    limit: Annotated[int, typer.Option(min=1, help="Images at most.")] = 1000,
    rerank: Annotated[
        int, typer.Option(min=0, help="Candidates a query to re-rank by matching; 0 for none.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images, texts or pairs at a time.")] = 32,
    device: Device = None,
    use_fused: Fused = True,
    skip_faults: SkipFaults = False,
) -> None:
    """Retrieval of a stage-1 checkpoint on a manifest, as JSON: recall at 1, 5, 10 beside chance."""
    from .data.manifest import read_manifest

    # What is cheap to find wrong comes before the slow imports.
    found, where = _checkpoint(checkpoint), _device(device)
    read = read_manifest(manifest, image_root=image_root, on_fault="skip" if skip_faults else "raise")
    from .pipeline import load_trained, retrieval_scores
    from .progress import ProgressBar

    trained = load_trained(found, device=where, use_fused=use_fused)
    if trained.stage != 1:
        raise ValueError("checkpoint: expected one of stage 1, which compares images and texts, got stage 2")
    with ProgressBar("image features") as bar:
        result = retrieval_scores(
            trained.model, trained.tokenizer, read, limit=limit, rerank=rerank, batch_size=batch_size,
            progress=lambda done, total: bar.update(done),
        )  # fmt: skip
    typer.echo(json.dumps(result, indent=2))
