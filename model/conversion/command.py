"""`blip2-kernels convert` and `blip2-kernels load-check`."""

from pathlib import Path
from typing import Annotated

import typer

FormatHelp = "lavis, transformers or blip2_kernels"
SourceArgument = Annotated[
    Path, typer.Argument(help="The checkpoint: a file or a folder.", show_default=False)
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(help="config.json of transformers' model, where the checkpoint's shapes do not tell it."),
]
VisionOption = Annotated[
    Path | None, typer.Option(help="File of the image encoder that LAVIS leaves out (eva_vit_g.pth).")
]
LanguageOption = Annotated[
    Path | None, typer.Option(help="transformers folder of the language model that LAVIS leaves out.")
]


def convert(
    source: SourceArgument,
    to: Annotated[str, typer.Option("--to", help=FormatHelp + ".", show_default=False)],
    source_format: Annotated[
        str | None, typer.Option("--from", help=FormatHelp + "; default: what the source looks like.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File (lavis) or folder to write.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    vision: VisionOption = None,
    language_model: LanguageOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List renames, leftovers and shape clashes; write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands at --output.")] = False,
) -> None:
    """Convert a BLIP-2 or InstructBLIP checkpoint between LAVIS, transformers and this package.

    Every tensor keeps its value and dtype. What a format has no place for travels in a file of its own, so
    that the way back loses nothing. The source is mapped, never loaded whole.
    """
    if output is None and not dry_run:
        raise ValueError("output: expected a path (or --dry-run), got None")
    if output is not None and not dry_run:
        if output.exists() and not overwrite and (output.is_file() or any(output.iterdir())):
            raise ValueError(f"output: expected a new path (or --overwrite), got {output}, which exists")
        if output.exists() and output.is_dir() == (to == "lavis"):
            raise ValueError(f"output: expected a {'file' if to == 'lavis' else 'folder'}, got {output}")
    from blip2_kernels.model.progress import ProgressBar

    from .containers import guess_format
    from .convert import convert as write
    from .convert import plan_conversion

    form = source_format or guess_format(source)
    conversion = plan_conversion(
        source, form, to, config=config, vision=vision, language_model=language_model
    )
    plan = conversion.plan
    if dry_run or output is None:
        for line in plan.lines():
            typer.echo(line)
        raise typer.Exit(1 if plan.problems else 0)
    with ProgressBar("convert", 200) as bar:
        # First half: looking for weights that are no numbers; second half: writing.
        def tell(step: str, done: int, total: int) -> None:
            percent = 100 * done // max(total, 1)
            bar.update(
                percent + 100 * (step == "write"), f"{step} {done / 2**30:.2f} of {total / 2**30:.2f} GiB"
            )

        write(conversion, output, progress=tell)
    parts = [f"{plan.kind}: {len(plan.renames)} tensors"]
    parts += [f"{len(plan.carried)} carried"] if plan.carried else []
    parts += [f"{len(plan.left_out)} left out"] if plan.left_out else []
    parts += [f"without {', '.join(plan.absent)}"] if plan.absent else []
    typer.echo(f"{output}: {', '.join(parts)}")


def load_check(
    path: SourceArgument,
    path_format: Annotated[
        str | None, typer.Option("--format", help=FormatHelp + "; default: what the path looks like.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="What it was converted from; default: the path itself.")
    ] = None,
    source_format: Annotated[
        str | None, typer.Option("--from", help="Format of --source; default: what it looks like.")
    ] = None,
    config: ConfigOption = None,
    vision: VisionOption = None,
    language_model: LanguageOption = None,
) -> None:
    """Run our fused model on a checkpoint and the plain path of its source, on the same random input.

    One line an output, with the largest difference as a share of the largest number. Ends with 1 where one
    is too large.
    """
    from .check import check_loading
    from .containers import guess_format

    results = check_loading(
        path,
        path_format or guess_format(path),
        source=source,
        source_format=None if source is None else source_format or guess_format(source),
        config=config,
        vision=vision,
        language_model=language_model,
    )
    for result in results:
        typer.echo(f"{result.name}: {result.difference:.1e} {'ok' if result.agrees else 'DIFFERS'}")
    if wrong := [result.name for result in results if not result.agrees]:
        raise ValueError(f"path: expected the outputs of its source, got others in {', '.join(wrong)}")
