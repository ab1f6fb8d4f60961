"""The arguments and options that several commands of `blip2-kernels` share."""

from pathlib import Path
from typing import Annotated

import typer

MANIFEST_HELP = (
    "JSON lines, JSON, CSV or TSV with `image` and `caption`, or a folder of images with .txt files."
)

ManifestArgument = Annotated[Path, typer.Argument(help=MANIFEST_HELP, show_default=False)]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of checkpoints and history.", show_default=False)
]
ImageRoot = Annotated[
    Path | None, typer.Option(help="What image paths are relative to; default: the manifest.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data, in place of --steps.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pairs a step and GPU.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
FinalRate = Annotated[float, typer.Option(help="Learning rate at the end of the cosine.")]
Warmup = Annotated[
    int | None,
    typer.Option(min=0, help="Steps of linear warm-up; default: 2000, at most a tenth of the run."),
]
WeightDecay = Annotated[float, typer.Option(help="AdamW's.")]
Beta2 = Annotated[float, typer.Option(help="AdamW's second beta.")]
Clip = Annotated[float, typer.Option(help="Clip gradients to this norm; 0 does not.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Batches a step; adds gradients, not negatives.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of weights, order and dropout.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU where there is one.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images.")]
SaveEvery = Annotated[
    int | None, typer.Option(min=1, help="Steps between checkpoints; default: one at the end.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output.")]
Fused = Annotated[bool, typer.Option("--use-fused/--no-use-fused", help="Run the fused encoder.")]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Encode each image once and keep its features here; default: encode in every step."),
]
Captions = Annotated[str, typer.Option(help="each: a sample a caption; random: a sample an image.")]
Augment = Annotated[bool, typer.Option("--augment", help="Random crops of at least half the picture.")]
SkipFaults = Annotated[bool, typer.Option("--skip-faults", help="Leave faulty manifest lines out.")]
CheckpointArgument = Annotated[
    Path, typer.Argument(help="A checkpoint folder, or the --output of a training.", show_default=False)
]
