"""add_layer_norm and bias_gelu, compiled against the plain PyTorch sequence, on one thread.

    python bench/row_ops.py [--pairs 15] [--dtype float32]

Medians over interleaved pairs, of the times and of the ratio in a pair; the results are compared first.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from blip2_kernels import extension
from blip2_kernels.ops import add_layer_norm, bias_gelu

ROWS = 4096
AIMS = {"add_layer_norm forward": 1.5, "add_layer_norm forward + backward": 1.3, "bias_gelu forward": 1.2}
"""Ratios that were asked for, in fp32 with a bias."""


def norm(backend: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, *extra: Tensor) -> Tensor:
    input_bias = extra[0] if extra else None
    return add_layer_norm(x, residual, weight, bias, input_bias=input_bias, backend=backend)


def gelu(backend: str, x: Tensor, *bias: Tensor) -> Tensor:
    return bias_gelu(x, *bias, backend=backend)


def compute(function: Callable, backend: str, tensors: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    if grad is None:
        with torch.no_grad():
            return [function(backend, *tensors)]
    leaves = [t.detach().requires_grad_() for t in tensors]
    return list(torch.autograd.grad(function(backend, *leaves), leaves, grad))


def seconds(*call: object) -> float:
    begin = time.perf_counter()
    compute(*call)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    if extension.reason() is not None:
        raise SystemExit(extension.reason())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {dtype}, 1 thread")
    for name, function, width, matrices, vectors in (
        ("add_layer_norm", norm, 768, 2, 3),
        ("bias_gelu", gelu, 3072, 1, 1),
    ):
        for with_bias in (False, True):
            shapes = [(ROWS, width)] * matrices + [(width,)] * (vectors - 1 + with_bias)
            tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
            for direction, grad in (
                ("forward", None),
                ("forward + backward", torch.randn(ROWS, width, dtype=dtype)),
            ):
                both = [compute(function, backend, tensors, grad) for backend in ("csrc", "reference")]
                for got, plain in zip(*both, strict=True):
                    assert (got - plain).abs().max() <= 0.02 * plain.abs().max(), name
                pairs = [
                    (
                        seconds(function, "csrc", tensors, grad),
                        seconds(function, "reference", tensors, grad),
                    )
                    for _ in range(arguments.pairs)
                ]
                ours, plain = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
                ratio = statistics.median(b / a for a, b in pairs)
                aim = AIMS.get(f"{name} {direction}") if with_bias else None
                print(
                    f"{name} {ROWS} x {width} {'with' if with_bias else 'no'} bias, {direction}: "
                    f"{ours:.2f} ms, plain {plain:.2f} ms, {ratio:.2f} x" + (f" (aim {aim})" if aim else "")
                )


if __name__ == "__main__":
    main()
