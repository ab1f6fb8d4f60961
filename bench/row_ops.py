"""add_layer_norm, bias_gelu and embed_tokens on the CPU: compiled against the plain PyTorch sequence.

    python bench/row_ops.py [--pairs 31] [--threads 1 2] [--dtype float32] [--only NAME] [--json FILE]

Results are compared first. Then calls are timed in turn: compiled, plain, and a copy of as many bytes as the
operator has to read and write, which is the roofline (into memory that is there: an operator's new pages come
on top). Medians with p20 and p80, and the median of the ratios in a round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from about import about
from measure import Timing
from torch import Tensor

from blip2_kernels import extension
from blip2_kernels.layout import TokenLayout
from blip2_kernels.ops import add_layer_norm, bias_gelu, embed_tokens
from blip2_kernels.ops.philox import draw_key

ROWS = 4096
VOCABULARY = 30523
AIMS = {"add_layer_norm forward": 1.5, "add_layer_norm forward + backward": 1.3, "bias_gelu forward": 1.2}
"""Ratios that were asked for, in fp32 with a bias."""


@dataclass(frozen=True)
class Case:
    """A call `run(backend, *tensors)`.

    Attributes:
        label: what is printed.
        aim: key of AIMS without the direction; "" where there is none.
        rows: of the output, whose channels are those of the last tensor.
        read: matrices as large as the output that a forward reads, and a backward reads again.
        gradients: elements of the gradients of matrices and tables.
    """

    label: str
    aim: str
    run: Callable[..., Tensor]
    tensors: list[Tensor]
    rows: int
    read: int
    gradients: int

    @property
    def width(self) -> int:
        return self.tensors[-1].shape[-1]

    def moved(self, backward: bool) -> int:
        """Bytes that no implementation can do without: each matrix read once, and results written."""
        elements = (self.read + 1) * self.rows * self.width
        if backward:  # the output's gradient too, and the inputs again
            elements += (self.read + 1) * self.rows * self.width + self.gradients
        return elements * self.tensors[0].element_size()


def norm(backend: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *extra: Tensor) -> Tensor:
    input_bias = extra[0] if extra else None
    return add_layer_norm(x, residual, weight, bias, input_bias=input_bias, backend=backend)


def gelu(backend: str, x: Tensor, *bias: Tensor) -> Tensor:
    return bias_gelu(x, *bias, backend=backend)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for name, function, width, matrices, vectors in (
        ("add_layer_norm", norm, 768, 2, 3),
        ("bias_gelu", gelu, 3072, 1, 1),
    ):
        for with_bias in (False, True):
            shapes = [(ROWS, width)] * matrices + [(width,)] * (vectors - 1 + with_bias)
            tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
            label = f"{name} {ROWS} x {width} {'with' if with_bias else 'no'} bias"
            # Without dropout x and the residual have one gradient.
            yield Case(label, name if with_bias else "", function, tensors, ROWS, matrices, ROWS * width)
    for batch in (32, 100):
        for dropout in (0.0, 0.1):
            lengths = torch.randint(6, 19, (batch, 1))  # 12 tokens on average
            layout = TokenLayout.from_attention_masks(32, [torch.arange(32) < lengths])
            ids = [torch.randint(1, VOCABULARY, (batch, 32))]
            drop = {"dropout": dropout, "dropout_key": draw_key()}

            def embed(
                backend: str,
                queries: Tensor,
                words: Tensor,
                positions: Tensor,
                weight: Tensor,
                bias: Tensor,
                given: tuple = (ids, layout, drop),
            ) -> Tensor:
                ids, layout, drop = given
                tables = (queries, ids, words, positions, weight, bias)
                return embed_tokens(*tables, layout, padding_idx=0, backend=backend, **drop)

            shapes = [(1, 32, 768), (VOCABULARY, 768), (512, 768), (768,), (768,)]
            tensors = [torch.randn(shape).to(dtype) for shape in shapes]
            label = f"embed_tokens {batch} x (32 + 12) x 768, dropout {dropout}"
            yield Case(label, "", embed, tensors, layout.rows, 1, sum(t.numel() for t in tensors[:3]))


def compute(case: Case, backend: str, tensors: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    if grad is None:
        with torch.no_grad():
            return [case.run(backend, *tensors)]
    leaves = [t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(case.run(backend, *leaves), leaves, grad))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""The processor's own time, of all threads, leaves out what others on a busy machine take."""


def milliseconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    begin = clock()
    run()
    return (clock() - begin) * 1e3


def measure(case: Case, backward: bool, pairs: int, clock: str) -> dict[str, object]:
    """Figures of a case in one direction, its results compared first."""
    dtype = case.tensors[0].dtype
    grad = torch.randn(case.rows, case.width, dtype=dtype) if backward else None
    # Against the plain sequence in fp32: in half precision it adds up rows less exactly than 2%.
    exact = [t.float() for t in case.tensors], None if grad is None else grad.float()
    both = compute(case, "csrc", case.tensors, grad), compute(case, "reference", *exact)
    for got, truth in zip(*both, strict=True):
        if not (got - truth).abs().max() <= 0.02 * truth.abs().max():
            raise SystemExit(f"{case.label}: wrong results, not timed")
    moved = case.moved(backward)
    source = torch.randn(moved // 8)
    target = torch.empty_like(source)
    runs = {
        "compiled": lambda: compute(case, "csrc", case.tensors, grad),
        "plain": lambda: compute(case, "reference", case.tensors, grad),
        "copy": lambda: target.copy_(source),
    }
    rounds = [{name: milliseconds(run, CLOCKS[clock]) for name, run in runs.items()} for _ in range(pairs)]
    timings = {name: Timing.of([times[name] for times in rounds]) for name in runs}
    direction = "forward + backward" if backward else "forward"
    return {
        "case": case.label,
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "clock": clock,
        "aim": AIMS.get(f"{case.aim} {direction}") if dtype == torch.float32 else None,
        "ratio": statistics.median(times["plain"] / times["compiled"] for times in rounds),
        "of_copy": statistics.median(times["copy"] / times["compiled"] for times in rounds),
        "moved_bytes": moved,
        "copy_gb_per_s": moved / timings["copy"].median / 1e6,
        "ms": {name: timing.json() for name, timing in timings.items()},
    }


def line(found: dict) -> str:
    times = ", ".join(
        f"{name} {t['median']:.2f} ms [{t['p20']:.2f}, {t['p80']:.2f}]" for name, t in found["ms"].items()
    )
    aim = f" (aim {found['aim']})" if found["aim"] else ""
    how = f"{found['direction']}, {found['threads']} thread(s), {found['clock']} time"
    roof = f"{found['of_copy']:.0%} of a copy's {found['copy_gb_per_s']:.1f} GB/s"
    return f"{found['case']}, {how}: {found['ratio']:.2f} x{aim}; {roof}; {times}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=31, help="rounds, default 31")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="default 1")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for a machine that others use")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose label begins so")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    if extension.reason() is not None:
        raise SystemExit(extension.reason())
    torch.manual_seed(0)
    facts = about(device="cpu") | {"instructions": torch.backends.cpu.get_cpu_capability()}
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    found = []
    for case in cases(getattr(torch, arguments.dtype)):
        if not case.label.startswith(arguments.only):
            continue
        for backward in (False, True):
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                found.append(measure(case, backward, arguments.pairs, arguments.clock))
                print(line(found[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"about": facts, "figures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
