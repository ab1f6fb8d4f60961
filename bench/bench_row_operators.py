"""The compiled operators on rows of a Q-Former, beside the same in eager PyTorch and compiled by torch.

bench/row_ops.py looks at them more closely on a CPU, on one thread.
"""

from collections.abc import Callable
from functools import partial

import torch
from cases import FULL, NAMED, OURS, SHORT, Case, Setting, Spec, Way, operator_case
from torch import Tensor
from torch.nn import functional as F

from blip2_kernels import extension
from blip2_kernels.layout import TokenLayout
from blip2_kernels.ops import add_layer_norm, bias_gelu, embed_tokens

CHANNELS, QUERIES, PADDED, VOCABULARY, PLACES = 768, 32, 32, 30523, 512
CAPTIONS = (4, 10, 14, 20)
PEERS = (OURS, "eager", "compiled")


def bench_row_operators(timed):
    timed()


def ways(setting: Setting, run: Callable[..., Tensor], plain: Callable[..., Tensor]) -> dict[str, Way | str]:
    missing = extension.device_reason(setting.device)
    compiled = setting.without_compiler() or Way(
        torch.compile(plain, dynamic=False, fullgraph=True), counted=False
    )
    return {OURS: missing or Way(partial(run, "csrc")), "eager": Way(plain), "compiled": compiled}


def matrix_case(
    setting: Setting,
    run: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    rows: int,
    width: int,
    backward: bool,
    *,
    matrices: int,
    vectors: int,
) -> Case:
    """`run(backend, *tensors)` of so many [rows, width], read once, and [width]; out is written once. The
    backward is counted as reading them again with grad, and writing a gradient of each."""
    dtype, device = setting.dtype, setting.device
    matrix = rows * width * dtype.itemsize
    shapes = [(rows, width)] * matrices + [(width,)] * vectors
    return operator_case(
        setting,
        lambda: [torch.randn(shape, device=device, dtype=dtype) for shape in shapes],
        partial(run, "reference"),
        ways(setting, run, plain),
        backward=backward,
        moved=((matrices + 1) * matrix, (2 * matrices + 1) * matrix),
        operations=(0, 0),
        shape={"rows": rows, "width": width},
    )


def norm_case(rows: int, backward: bool, setting: Setting, width: int = CHANNELS) -> Case:
    def run(backend: str, x, residual, weight, bias, input_bias) -> Tensor:
        return add_layer_norm(x, residual, weight, bias, input_bias=input_bias, backend=backend)

    def plain(x, residual, weight, bias, input_bias) -> Tensor:
        return F.layer_norm(x + input_bias + residual, (width,), weight, bias, 1e-12)

    return matrix_case(setting, run, plain, rows, width, backward, matrices=2, vectors=3)


def gelu_case(rows: int, backward: bool, setting: Setting, width: int = 4 * CHANNELS) -> Case:
    def run(backend: str, x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(x, bias, backend=backend)

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    return matrix_case(setting, run, plain, rows, width, backward, matrices=1, vectors=1)


def embed_case(samples: int, backward: bool, setting: Setting, width: int = CHANNELS) -> Case:
    """Shared queries and packed captions; the backward also writes a row of zeros for every unseen word."""
    device, dtype = torch.device(setting.device), setting.dtype
    lengths = torch.tensor(CAPTIONS).repeat(-(-samples // len(CAPTIONS)))[:samples]
    layout = TokenLayout.from_attention_masks(
        QUERIES, [torch.arange(PADDED) < lengths[:, None]], device=device
    )
    vocabulary = setting.few(VOCABULARY, 500)
    ids = torch.randint(1, vocabulary, (samples, PADDED), device=device)
    source = layout.texts[0].source

    def run(backend: str, queries, words, positions, weight, bias) -> Tensor:
        tables = (queries, [ids], words, positions, weight, bias)
        return embed_tokens(*tables, layout, padding_idx=0, backend=backend)

    def plain(queries, words, positions, weight, bias) -> Tensor:
        text = F.embedding(ids.flatten()[source], words, 0) + F.embedding(source % PADDED, positions)
        rows = torch.cat([queries.expand(samples, -1, -1).flatten(0, 1), text])
        return F.layer_norm(rows, (width,), weight, bias, 1e-12)

    row = width * dtype.itemsize
    read = (QUERIES + layout.texts[0].rows + PADDED) * row
    shapes = [(1, QUERIES, width), (vocabulary, width), (PLACES, width), (width,), (width,)]
    return operator_case(
        setting,
        lambda: [torch.randn(shape, device=device, dtype=dtype) for shape in shapes],
        partial(run, "reference"),
        ways(setting, run, plain),
        backward=backward,
        moved=(read + layout.rows * row, read + (layout.rows + QUERIES + vocabulary + PLACES) * row),
        operations=(0, 0),
        shape={"batch": samples, "width": width},
    )


def spec(build: Callable[..., Case], cpu: int, cuda: int = SHORT) -> Spec:
    return Spec("row operators", build, PEERS, cpu=cpu, cuda=cuda)


CASES = {
    f"{name}-{size}{ending}": spec(partial(build, size, backward), cpu, cuda)
    for name, build, size, cpu, cuda in (
        ("add_layer_norm", norm_case, 1024, SHORT, SHORT),
        ("add_layer_norm", norm_case, 4096, FULL, NAMED),
        ("add_layer_norm", norm_case, 16384, NAMED, SHORT),
        ("bias_gelu", gelu_case, 1024, SHORT, SHORT),
        ("bias_gelu", gelu_case, 4096, FULL, NAMED),
        ("bias_gelu", gelu_case, 16384, NAMED, SHORT),
        ("embed_tokens", embed_case, 32, SHORT, NAMED),
        ("embed_tokens", embed_case, 100, FULL, SHORT),
    )
    for ending, backward in (("", False), ("-backward", True))
}
