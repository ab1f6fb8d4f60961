"""What the run leaves behind besides figures: metrics.json, captions.md and a summary on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import replaced_file
from .scenes import Scene, parse_caption

CREDIT = (
    "Pictures are composed of drawings by OpenMoji, the open-source emoji and icon project "
    "(https://openmoji.org), licence CC BY-SA 4.0; the composed pictures are shared under the same licence."
)


def write_text(path: Path, text: str) -> Path:
    """Write a file in UTF-8, whole or not at all."""
    with replaced_file(path) as partial:
        partial.write_bytes(text.encode())
    return path


def rounded(value: Any, digits: int = 4) -> Any:
    """The same structure with every float rounded to significant digits."""
    if isinstance(value, Mapping):
        return {key: rounded(entry, digits) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry, digits) for entry in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def write_metrics(metrics: Mapping[str, Any], path: Path) -> Path:
    return write_text(path, json.dumps(rounded(metrics), indent=2) + "\n")


def write_captions(
    scenes: Sequence[Scene],
    generated: Sequence[str],
    from_other_images: Sequence[str],
    pictures: Sequence[str],
    path: Path,
    shown: int = 24,
) -> Path:
    """captions.md: held-out pictures, what they show, and what was generated.

    Args:
        scenes: held-out scenes.
        generated: caption of each scene's own picture.
        from_other_images: caption generated for the picture that took its place in the shuffled control.
        pictures: file name of each shown picture, relative to ``path``.
        shown: how many, with pictures; the rest follow as a plain list.
    """
    lines = [
        "# Captions of pictures the model never saw",
        "",
        "Neither these pictures nor these pairs of things occur in training. ✓ right things and relation · "
        "◐ right things, wrong relation · ✗ wrong things.",
        "",
        "| picture | truth | generated | | from another picture (control) |",
        "|---|---|---|---|---|",
    ]
    marks = [mark(caption, scene) for caption, scene in zip(generated, scenes, strict=True)]
    rows = list(zip(scenes, generated, marks, from_other_images, strict=True))
    for (scene, caption, verdict, other), picture in zip(rows[:shown], pictures, strict=False):
        lines.append(
            f"| ![]({picture}) | {scene.caption()} | {_cell(caption)} | {verdict} | {_cell(other)} |"
        )
    lines += ["", f"## The other {max(0, len(rows) - shown)}", "", "| truth | generated | |", "|---|---|---|"]
    lines += [
        f"| {scene.caption()} | {_cell(caption)} | {verdict} |" for scene, caption, verdict, _ in rows[shown:]
    ]
    return write_text(path, "\n".join([*lines, "", CREDIT, ""]))


def mark(caption: str, scene: Scene) -> str:
    """✓ things and relation right, ◐ things right, ✗ neither."""
    told = parse_caption(caption)
    return "✓" if told.is_true_of(scene) else "◐" if told.names_the_things_of(scene) else "✗"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) or "(nothing)"


def summary(metrics: Mapping[str, Any]) -> str:
    """The figures that matter, each beside what it is to be compared with."""
    stage1, captions, zero = metrics["held_out"], metrics["captions"], metrics["zero_shot"]
    retrieval, relation, itm = stage1["retrieval"], stage1["relation_of_four"], stage1["itm_accuracy"]

    loss = captions["loss"]

    def r1(name: str, of: Mapping[str, Any] = retrieval) -> str:
        return f"{of[name]['image_to_text']['R@1']:.2f} / {of[name]['text_to_image']['R@1']:.2f}"

    rows = [
        (
            f"retrieval R@1 of {stage1['scenes']} (image→text / text→image)",
            r1("itc"),
            f"then ITM {r1('itc_then_itm')} · ridge {r1('ridge')} · chance {1 / stage1['scenes']:.3f}",
        ),
        (
            "the right one of four relations, by ITM",
            f"{relation['itm']:.2f}",
            f"ITC {relation['itc']:.2f} · ridge {relation['ridge']:.2f} · chance 0.25",
        ),
        (
            "match or not, against the relation swapped",
            f"{itm['against_relation_swapped']:.2f}",
            f"hardest other caption {itm['against_hardest_caption_of_another_scene']:.2f} · chance 0.5",
        ),
        (
            "how far queries are from those most like them",
            f"{stage1['query_distance']:.2f}",
            "0: each has its like",
        ),
        (
            "generated captions: both things right",
            f"{captions['generated']['concepts_right']:.2f}",
            f"shuffled images {captions['shuffled_images']['concepts_right']:.2f}",
        ),
        (
            "generated captions: relation right too",
            f"{captions['generated']['relation_right']:.2f}",
            f"shuffled images {captions['shuffled_images']['relation_right']:.2f}",
        ),
        (
            "caption loss (nats a token)",
            f"{loss['true_image']:.2f}",
            f"shuffled image {loss['shuffled_image']:.2f} · no image {loss['prompt_only']:.2f}",
        ),
        (
            f"things never trained on: R@1 of {zero['scenes']}",
            r1("itc", zero["retrieval"]),
            f"ridge {r1('ridge', zero['retrieval'])} · chance {1 / zero['scenes']:.3f}",
        ),
        (
            "largest difference, fused and plain path",
            f"{max(metrics['fused_against_plain'].values()):.1e}",
            "fp32",
        ),
    ]
    return "\n".join(f"  {what:<58} {value:>12}   {beside}" for what, value, beside in rows)
