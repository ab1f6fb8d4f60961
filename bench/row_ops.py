"""add_layer_norm, bias_gelu and embed_tokens, compiled against the plain PyTorch sequence, on one thread.

    python bench/row_ops.py [--pairs 15] [--dtype float32] [--only embed_tokens]

Medians over interleaved pairs, of the times and of the ratio in a pair; the results are compared first.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from blip2_kernels import extension
from blip2_kernels.layout import TokenLayout
from blip2_kernels.ops import add_layer_norm, bias_gelu, embed_tokens
from blip2_kernels.ops.philox import draw_key

ROWS = 4096
VOCABULARY = 30523
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


def cases(dtype: torch.dtype) -> Iterator[tuple[str, str, Callable, list[Tensor], int]]:
    """What is printed of a case, the operator where an aim holds for it, its call, tensors and rows."""
    for name, function, width, matrices, vectors in (
        ("add_layer_norm", norm, 768, 2, 3),
        ("bias_gelu", gelu, 3072, 1, 1),
    ):
        for with_bias in (False, True):
            shapes = [(ROWS, width)] * matrices + [(width,)] * (vectors - 1 + with_bias)
            tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
            label = f"{name} {ROWS} x {width} {'with' if with_bias else 'no'} bias"
            yield label, name if with_bias else "", function, tensors, ROWS
    for batch in (32, 100):
        for dropout in (0.0, 0.1):
            lengths = torch.randint(6, 19, (batch, 1))  # 12 tokens on average
            mask = torch.arange(32) < lengths
            layout, key = TokenLayout.from_attention_masks(32, [mask]), draw_key()
            ids = [torch.randint(1, VOCABULARY, (batch, 32))]
            shapes = [(1, 32, 768), (VOCABULARY, 768), (512, 768), (768,), (768,)]
            drop = {"dropout": dropout, "dropout_key": key}

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

            label = f"embed_tokens {batch} x (32 + 12) x 768, dropout {dropout}"
            yield label, "", embed, [torch.randn(shape).to(dtype) for shape in shapes], layout.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose label begins so")
    arguments = parser.parse_args()
    if extension.reason() is not None:
        raise SystemExit(extension.reason())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {dtype}, 1 thread")
    for label, name, function, tensors, rows in cases(dtype):
        if not label.startswith(arguments.only):
            continue
        width = tensors[-1].shape[-1]
        for direction, grad in (
            ("forward", None),
            ("forward + backward", torch.randn(rows, width, dtype=dtype)),
        ):
            # Against the plain sequence in fp32: in half precision it adds up rows less exactly than 2%.
            exact = [t.float() for t in tensors], None if grad is None else grad.float()
            both = compute(function, "csrc", tensors, grad), compute(function, "reference", *exact)
            for got, truth in zip(*both, strict=True):
                assert (got - truth).abs().max() <= 0.02 * truth.abs().max(), label
            pairs = [
                (seconds(function, "csrc", tensors, grad), seconds(function, "reference", tensors, grad))
                for _ in range(arguments.pairs)
            ]
            ours, plain = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            aim = AIMS.get(f"{name} {direction}")
            print(
                f"{label}, {direction}: {ours:.2f} ms, plain {plain:.2f} ms, {ratio:.2f} x"
                + (f" (aim {aim})" if aim else "")
            )


if __name__ == "__main__":
    main()
