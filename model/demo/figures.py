"""The demo's pictures: losses over the steps, retrieval at a glance, what each query looks at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..atomic import replaced_file
from .drawing import draw
from .scenes import Scene

INK, PALE, RIGHT, WRONG = "#22303c", "#8795a1", "#1f9d6b", "#c8553d"
COLOURS = {"loss_itc": "#3b6fb6", "loss_itm": "#d1495b", "loss_itg": "#2a9d8f", "loss": "#6d597a"}
NAMES = {
    "loss_itc": "contrastive (ITC)",
    "loss_itm": "matching (ITM)",
    "loss_itg": "generation (ITG)",
    "loss": "captions through the language model",
}
CREDIT = "Drawings: OpenMoji, CC BY-SA 4.0"


def _plots() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 10,
            "axes.edgecolor": PALE,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "figure.facecolor": "white",
        }
    )
    return pyplot


def _save(pyplot: Any, figure: Any, path: Path, dpi: int) -> Path:
    """Whole or not at all, and small: most of these pictures are flat colours."""
    from PIL import Image

    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, dpi=dpi, bbox_inches="tight", pad_inches=0.15)
    finally:
        pyplot.close(figure)
    with Image.open(drawn) as picture:
        flat = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with replaced_file(path) as partial:
        flat.save(partial, "PNG", optimize=True)
    return path


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred running mean over at most ``window`` values, shorter at both ends; same length."""
    array = np.asarray(values, np.float64)
    total = np.concatenate([[0.0], np.cumsum(array)])
    index = np.arange(len(array))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(array))
    return (total[high] - total[low]) / (high - low)


def draw_curves(
    stage1: Sequence[Mapping[str, float]],
    stage2: Sequence[Mapping[str, float]],
    prompt_only: Sequence[Mapping[str, float]],
    path: Path,
) -> Path:
    """Losses of both stages over their steps: thin as measured, thick as running means."""
    pyplot = _plots()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(1.5, 1))

    def line(axes: Any, rows: Sequence[Mapping[str, float]], part: str, label: str, colour: str) -> None:
        steps = [row["step"] for row in rows if part in row]
        values = [row[part] for row in rows if part in row]
        if values:
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
            axes.plot(
                steps, smooth(values, max(3, len(values) // 15)), color=colour, linewidth=2, label=label
            )

    for part in ("loss_itc", "loss_itm", "loss_itg"):
        line(left, stage1, part, NAMES[part], COLOURS[part])
    full = start_of_matching(stage1)
    if full is not None and full > 1:
        left.axvline(full, color=PALE, linewidth=1, linestyle=":")
        left.annotate(
            "ITM and ITG join",
            (full, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            va="top",
            color=PALE,
            fontsize=9,
        )
    left.set(title="Stage 1: learning what and where", xlabel="step", ylabel="loss")
    line(right, stage2, "loss", "with the picture", COLOURS["loss"])
    line(right, prompt_only, "loss", "without (baseline)", PALE)
    right.set(title="Stage 2: captions through SmolLM2", xlabel="step")
    values = [row[part] for row in stage1 for part in NAMES if part in row and part != "loss"]
    left.set_ylim(top=1.2 * np.quantile(values, 0.98))  # a loss that joins late starts high above the others
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e4e8eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.93))
    figure.tight_layout(w_pad=3)
    return _save(pyplot, figure, path, 130)


def draw_paths(stages: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> Path:
    """Loss over the steps, a panel a stage: the first path broad and pale, so that those on it can be seen.

    Args:
        stages: by title, then by name of the path, the loss of each step.
    """
    pyplot = _plots()
    figure, panels = pyplot.subplots(1, len(stages), figsize=(11, 4), squeeze=False)
    looks = (
        {"color": "#b9c4cd", "linewidth": 7, "solid_capstyle": "round"},
        {"color": COLOURS["loss_itc"], "linewidth": 2},
        {"color": COLOURS["loss_itg"], "linewidth": 2, "linestyle": (0, (1, 1.5))},
        {"color": COLOURS["loss_itm"], "linewidth": 1.4, "linestyle": (0, (3, 2))},
    )
    for axes, (title, curves) in zip(panels[0], stages.items(), strict=True):
        for (name, losses), look in zip(curves.items(), looks, strict=False):
            axes.plot(range(1, len(losses) + 1), losses, label=name, **look)
        axes.set(title=title[:1].upper() + title[1:], xlabel="step", ylabel="loss")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color="#e4e8eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
    figure.tight_layout(w_pad=3)
    return _save(pyplot, figure, path, 110)


def start_of_matching(stage1: Sequence[Mapping[str, float]]) -> float | None:
    """First step with a matching loss; None if there is none."""
    return next((row["step"] for row in stage1 if "loss_itm" in row), None)


def draw_retrieval(
    scores: Tensor, scenes: Sequence[Scene], path: Path, rows: int = 5, columns: int = 5
) -> Path:
    """Captions and the pictures found for them.

    Args:
        scores: [images, texts]; text i describes image i.
        scenes: of the images.
        rows: captions shown (evenly spread over the scenes).
        columns: pictures shown for each, best first.
    """
    pyplot = _plots()
    rows, columns = min(rows, len(scenes)), min(columns, len(scenes))
    shown = np.linspace(0, len(scenes) - 1, rows).round().astype(int)
    figure, grid = pyplot.subplots(
        rows,
        columns + 1,
        figsize=(1.9 + 1.55 * columns, 1.68 * rows + 0.6),
        squeeze=False,
        width_ratios=(1.45, *[1] * columns),
        gridspec_kw={"wspace": 0.08, "hspace": 0.12},
    )
    for line, query in zip(grid, shown, strict=True):
        line[0].axis("off")
        caption = scenes[query].caption()
        line[0].text(0.95, 0.5, f"“{_wrap(caption)}”", ha="right", va="center", fontsize=11.5)
        best = scores[:, query].topk(columns).indices.tolist()
        for axes, found in zip(line[1:], best, strict=True):
            axes.imshow(draw(scenes[found]))
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(
                    visible=True,
                    color=RIGHT if found == query else "#d7dde2",
                    linewidth=4 if found == query else 1,
                )
    for place, axes in enumerate(grid[0][1:], start=1):
        axes.set_title({1: "best match"}.get(place, f"{place}."), fontsize=10, color=PALE)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.04, top=0.95)
    figure.text(0.99, 0.012, CREDIT, ha="right", fontsize=7.5, color=PALE)
    return _save(pyplot, figure, path, 110)


def _wrap(caption: str) -> str:
    """One thing a line: "a banana / left of / a car"."""
    for words in (" left of ", " right of ", " above ", " below "):
        caption = caption.replace(words, f"\n{words.strip()} ")
    return caption


def attention_maps(model: Any, features: Tensor, layer: int | None = None) -> Tensor:
    """What the queries look at: cross-attention of one layer, averaged over its heads.

    Args:
        model: a stage-1 or stage-2 model.
        features: [images, tokens, width], before ``ln_vision``.
        layer: with cross-attention; default the last.

    Returns:
        fp32 [images, queries, tokens], each row sums to 1.
    """
    layers = model.qformer.encoder.layer
    with_images = [i for i, block in enumerate(layers) if hasattr(block, "crossattention")]
    module = layers[with_images[-1] if layer is None else layer].crossattention.attention
    caught: list[Tensor] = []
    hooks = [
        part.register_forward_hook(lambda _m, _i, out: caught.append(out))
        for part in (module.query, module.key)
    ]
    was, model.use_fused = model.use_fused, False
    try:
        with torch.no_grad():
            images = model.ln_vision(features.float())
            queries = model.query_tokens.expand(len(features), -1, -1)
            model.qformer(queries, encoder_hidden_states=images)
    finally:
        model.use_fused = was
        for hook in hooks:
            hook.remove()
    heads = model.config.qformer.num_attention_heads
    query, key = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in caught)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.softmax(-1).mean(1)


def draw_attention(maps: Tensor, scenes: Sequence[Scene], path: Path, queries: int = 16) -> Path:
    """Each picture, then where its most telling queries look.

    Args:
        maps: [images, queries, tokens], a square grid of tokens.
        scenes: of the images.
        queries: shown a picture: those whose maps are the most different from one another.
    """
    pyplot = _plots()
    queries = min(queries, maps.shape[1])
    figure, grid = pyplot.subplots(
        len(scenes),
        queries + 1,
        figsize=(1.35 * (queries + 1), 1.62 * len(scenes) + 0.5),
        squeeze=False,
        gridspec_kw={"wspace": 0.05, "hspace": 0.22},
    )
    side = round(maps.shape[-1] ** 0.5)
    chosen = spread_out(maps.mean(0) if len(maps) == 1 else maps.transpose(0, 1).flatten(1), queries)
    for line, scene, of_scene in zip(grid, scenes, maps, strict=True):
        picture = np.asarray(draw(scene), np.float32) / 255
        line[0].imshow(picture)
        line[0].set_title(scene.caption(), fontsize=9, loc="left", pad=4)
        grey = picture.mean(-1, keepdims=True).repeat(3, -1) * 0.45 + 0.5
        for axes, query in zip(line[1:], chosen, strict=True):
            heat = of_scene[query].view(1, 1, side, side)
            size = (picture.shape[0], picture.shape[1])
            heat = F.interpolate(heat, size=size, mode="bicubic", align_corners=False)[0, 0].clamp(min=0)
            weight = (heat / heat.max()).numpy()[..., None] ** 0.8
            glow = pyplot.get_cmap("inferno")(0.25 + 0.7 * weight[..., 0])[..., :3]
            axes.imshow(np.clip(picture * weight * 0.45 + glow * weight * 0.55 + grey * (1 - weight), 0, 1))
        for axes in line:
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(visible=True, color="#d7dde2")
    for axes, query in zip(grid[0][1:], chosen, strict=True):
        axes.set_title(f"query {query}", fontsize=8.5, color=PALE, loc="right")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.035, top=0.95)
    figure.text(0.99, 0.008, CREDIT, ha="right", fontsize=7.5, color=PALE)
    return _save(pyplot, figure, path, 110)


def spread_out(rows: Tensor, count: int) -> list[int]:
    """Indices of ``count`` rows that lie far apart, in ascending order: the first is the most peaked, then
    each the one farthest from those taken."""
    taken = [int(rows.square().sum(1).argmax())]
    while len(taken) < count:
        nearest = torch.cdist(rows, rows[taken]).amin(1)
        nearest[taken] = -1
        taken.append(int(nearest.argmax()))
    return sorted(taken)
