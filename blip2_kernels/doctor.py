"""What works here, what falls back, and why: `blip2-kernels doctor`, or `python -m blip2_kernels.doctor`.

Every backend of every operator is asked to compute something small, and its result and gradients are compared
with the reference's.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import extension
from .checks import check_device, describe
from .layout import TokenLayout
from .mask import AttentionMask, MaskMode
from .ops import (
    add_layer_norm,
    bias_gelu,
    cross_attention,
    embed_tokens,
    image_text_similarity,
    latent_attention,
    self_attention,
)

TOLERANCE = 1e-2
"""Of a self-test, relative to the largest number: tf32 passes, a wrong kernel does not."""


@dataclass(frozen=True)
class Finding:
    """What a backend of an operator did on a device.

    Attributes:
        op, backend, device: names.
        works: whether it ran and gave the reference's numbers.
        reason: "works", or why it falls back, or what went wrong.
        healthy: False where it ran and failed; falling back is healthy.
    """

    op: str
    backend: str
    device: str
    works: bool
    reason: str
    healthy: bool


@dataclass(frozen=True)
class Case:
    """A small call of an operator: `run(backend, *tensors)`, with tensors of these shapes."""

    run: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    backends: tuple[str, ...]
    gradients: bool = True


def _cases(device: torch.device) -> dict[str, Case]:
    text = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    layout = TokenLayout.from_attention_masks(3, [text], device=device)
    mask = AttentionMask((MaskMode.MULTIMODAL_CAUSAL,))
    rows, attention = (layout.rows, 2, 16), ("triton", "torch", "reference")
    compiled = ("csrc", "reference")

    def norm(
        backend: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, extra: Tensor
    ) -> Tensor:
        return add_layer_norm(x, residual, weight, bias, input_bias=extra, backend=backend)

    ids = [torch.tensor([[1, 4, 1, 0], [3, 1, 0, 0]], device=device)]

    def embed(
        backend: str, queries: Tensor, words: Tensor, positions: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        return embed_tokens(queries, ids, words, positions, weight, bias, layout, backend=backend)

    return {
        "self_attention": Case(
            lambda backend, q, k, v: self_attention(q, k, v, layout, layout, mask, backend=backend),
            (rows, rows, rows),
            ("triton", "csrc", "torch", "reference"),
        ),
        "cross_attention": Case(
            lambda backend, q, k, v: cross_attention(q, k, v, backend=backend),
            ((2, 3, 2, 16), (2, 5, 2, 16), (2, 5, 2, 16)),
            attention,
        ),
        "latent_attention": Case(
            lambda backend, q, features: latent_attention(q, features, scale=0.2, backend=backend),
            ((2, 6, 32), (2, 5, 32)),
            attention,
            gradients=False,
        ),
        "image_text_similarity": Case(
            lambda backend, image, text: image_text_similarity(image, text, backend=backend),
            ((2, 3, 16), (4, 16)),
            attention,
        ),
        "add_layer_norm": Case(norm, ((5, 24), (5, 24), (24,), (24,), (24,)), compiled),
        "embed_tokens": Case(embed, ((1, 3, 24), (5, 24), (4, 24), (24,), (24,)), compiled),
        "bias_gelu": Case(
            lambda backend, x, bias: bias_gelu(x, bias, backend=backend), ((5, 24), (24,)), compiled
        ),
    }


def _results(case: Case, backend: str, tensors: list[Tensor]) -> list[Tensor]:
    if not case.gradients:
        with torch.no_grad():
            return [case.run(backend, *tensors)]
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = case.run(backend, *leaves)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def examine(devices: list[str] | None = None) -> list[Finding]:
    """Try every backend of every operator.

    Args:
        devices: such as ["cpu", "cuda"]; default the CPU, and the GPU where torch sees one.

    Returns:
        A finding a device, operator and backend.

    Raises:
        TypeError, ValueError: no list of devices, or one that is not here.
    """
    if devices is None:
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if isinstance(devices, str) or not isinstance(devices, Sequence):
        raise TypeError(f"devices: expected a list of devices, got {describe(devices)}")
    for device in devices:
        check_device("devices", device)
    findings = []
    for device in devices:
        for op, case in _cases(torch.device(device)).items():
            generator = torch.Generator().manual_seed(0)
            tensors = [torch.randn(shape, generator=generator).to(device) for shape in case.shapes]
            expected = _results(case, "reference", tensors)
            for backend in case.backends:
                made = partial(Finding, op, backend, device)
                findings.append(_examine(made, case, backend, tensors, expected))
    return findings


def _examine(
    made: Callable[..., Finding], case: Case, backend: str, tensors: list[Tensor], expected: list[Tensor]
) -> Finding:
    try:
        results = _results(case, backend, tensors)
    except ValueError as refusal:
        return made(works=False, reason=str(refusal).split(": ", 2)[-1], healthy=True)
    except Exception as error:  # whatever a broken driver or compiler raises is what is to be told
        return made(works=False, reason=f"{type(error).__name__}: {error}", healthy=False)
    for got, wanted in zip(results, expected, strict=True):
        bound = TOLERANCE * max(float(wanted.abs().max()), 1e-3)
        if not float((got - wanted).abs().max()) <= bound:
            return made(works=False, reason="gives other numbers than the reference", healthy=False)
    return made(works=True, reason="works", healthy=True)


def report() -> dict[str, Any]:
    """Everything, as what JSON can hold: `environment` (torch's own report), `extension`, `findings`."""
    from torch.utils.collect_env import get_pretty_env_info

    return {
        "environment": get_pretty_env_info(),
        "extension": {
            "library": str(extension.LIBRARY),
            **{device: extension.device_reason(device) or "works" for device in ("cpu", "cuda")},
        },
        "findings": [asdict(finding) for finding in examine()],
    }


def as_text(found: dict[str, Any]) -> str:
    """A report for people."""
    lines = [found["environment"], "", "The compiled extension"]
    lines += [f"  {name:8} {value}" for name, value in found["extension"].items()]
    lines += ["", "Operators (backend auto takes the first that works)"]
    for finding in found["findings"]:
        name = f"{finding['op']:22} {finding['backend']:10} {finding['device']:5}"
        lines.append(f"  {name} {'' if finding['healthy'] else 'FAILED: '}{finding['reason']}")
    return "\n".join(lines)


def print_report(as_json: bool) -> int:
    """Print a report; the exit status: 1 where a backend ran and failed, else 0."""
    found = report()
    print(json.dumps(found, indent=2) if as_json else as_text(found))
    return int(not all(finding["healthy"] for finding in found["findings"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="blip2_kernels.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    sys.exit(print_report(parser.parse_args().json))
