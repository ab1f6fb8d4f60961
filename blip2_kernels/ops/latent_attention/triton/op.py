"""The registered operator of latent attention, and the launches behind it."""

import math
from typing import Any

import torch
from torch import Tensor

from ....device_errors import error_flag
from ... import launching
from ...image_arguments import visibility
from ...library import define
from .. import launch

LOG2_E = 1.0 / math.log(2.0)


def supports(q: Tensor, features: Tensor) -> str | None:
    """None where the kernels can serve, else the reason."""
    return launching.supports({"q": q, "features": features})


def latent_attention_triton(
    q: Tensor,
    features: Tensor,
    image_index: Tensor | None,
    image_lengths: Tensor | None,
    image_mask: Tensor | None,
    *,
    scale: float,
) -> Tensor:
    """See `latent_attention`; `image_index` is None where sample s looks at image s."""
    visible = image_lengths
    if image_mask is not None:
        visible = (image_mask != 0).to(torch.uint8)
    return _forward(q, features, image_index, visible, scale)


def _run(
    q: Tensor, features: Tensor, image_index: Tensor | None, visible: Tensor | None, scale: float
) -> Tensor:
    samples, rows, _ = q.shape
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    index = image_index.contiguous() if image_index is not None else None
    seen = visible.contiguous() if visible is not None else None
    columns = max(1, _tiles(features.shape[1], launch.COLUMNS)) * launch.COLUMNS
    at_once = min(samples, max(1, launch.WORKSPACE // (rows * columns)))
    scores = q.new_empty((at_once, rows, columns), dtype=torch.float32)
    probs = q.new_empty((at_once, rows, columns))
    for first in range(0, samples, at_once):
        some = slice(first, first + at_once)
        own = some if index is None else slice(None)
        part = None if index is None else index[some]
        visible_part = None if seen is None else seen[own]
        _run_samples(q[some], features[own], part, visible_part, scale, scores, probs, out[some])
    return out


def _run_samples(
    q: Tensor,
    features: Tensor,
    index: Tensor | None,
    visible: Tensor | None,
    scale: float,
    scores: Tensor,
    probs: Tensor,
    out: Tensor,
) -> None:
    """Write `out` [S, R, width]; `scores` and `probs` are work memory for at least as many samples."""
    (samples, rows, width), (images, tokens), columns = q.shape, features.shape[:2], scores.shape[2]
    architecture, key = launching.architecture(q.device), launch.key(q.dtype, rows, width)
    sizes = (images, tokens, rows, columns, width)
    constants: dict[str, Any] = {
        "INDEXED": index is not None,
        "VISIBLE": visibility(visible),
        "WIDE": launching.wide(q[:1], features[:1], scores[:1]),
        "PRECISION": launching.input_precision(q.dtype),
    }

    def run_scores(config: launching.Config) -> None:
        from .kernels import scores_kernel

        strides = (*launching.strides(q), *launching.strides(features))
        args = (q, features, scores, index, visible, error_flag(q.device), *sizes, *strides, scale * LOG2_E)
        tiles = _tiles(rows, config["BLOCK_R"]) * _tiles(columns, config["BLOCK_N"])
        even = {"EVEN_WIDTH": width % config["BLOCK_K"] == 0}
        launching.launch(scores_kernel, (samples * tiles,), args, constants | even, config)

    def run_softmax(config: launching.Config) -> None:
        from .kernels import softmax_kernel

        grid = (_tiles(samples * rows, config["BLOCK_R"]),)
        launching.launch(softmax_kernel, grid, (scores, probs, samples * rows, columns), {}, config)

    def run_output(config: launching.Config) -> None:
        from .kernels import output_kernel

        args = (probs, features, out, index, visible, *sizes, *launching.strides(features))
        tiles = _tiles(rows, config["BLOCK_R"]) * _tiles(width, config["BLOCK_W"])
        even = {"EVEN_WIDTH": width % config["BLOCK_W"] == 0}
        launching.launch(output_kernel, (samples * tiles,), args, constants | even, config)

    for name, table, table_key, run in (
        ("scores", launch.SCORES, key, run_scores),
        ("softmax", launch.SOFTMAX, launch.softmax_key(columns), run_softmax),
        ("output", launch.OUTPUT, key, run_output),
    ):
        configs = table.configs(architecture, table_key)
        compiled_for = (q.dtype, table_key, *constants.values())
        launching.first_that_fits(f"latent_attention ({name})", q.device, compiled_for, configs, run)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _fake(q: Tensor, features: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


_forward = define(
    "latent_attention(Tensor q, Tensor features, Tensor? image_index, Tensor? visible, float scale)"
    " -> Tensor",
    _run,
    _fake,
)
