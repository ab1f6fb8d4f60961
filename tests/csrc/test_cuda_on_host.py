"""The CUDA kernels, run on the host: against the plain operators, and on the harness's own terms."""

import random

import pytest
import torch
from compiled_cases import DTYPES, PAIRS, WIDTHS, strided
from operator_checks import (
    EMBED_NAMES,
    NORM_NAMES,
    check_embed,
    check_gelu,
    check_norm,
    draw_embed,
    embed,
    norm,
)

from blip2_kernels.ops.philox import draw_key

pytestmark = [pytest.mark.compiles, pytest.mark.slow]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embed_every_dtype_and_width(on_host, dtype, width):
    check_embed(on_host, 2, 2, 5, width, dtype, 0.1)
    check_embed(on_host, 1, 1, 1, width, dtype, 0.0, embedded=True)
    check_embed(on_host, 0, 0, 3, width, dtype, 0.0)


def test_embed_random_cases(on_host, seed):
    rng = random.Random(seed)
    for _ in range(100):
        queries, samples, text_rows, width = (
            rng.randint(*ends) for ends in ((0, 5), (0, 4), (1, 40), (1, 1100))
        )
        dtype, dropout = rng.choice(DTYPES), rng.choice([0.0, 0.01, 0.5])
        options = {
            "apart": rng.random() < 0.3,
            "embedded": rng.random() < 0.2,
            "padding": rng.choice([-1, 2]),
        }
        print(queries, samples, text_rows, width, dtype, dropout, options)
        check_embed(on_host, queries, samples, text_rows, width, dtype, dropout, **options)


def test_embed_long_lists(on_host):
    """A word in hundreds of rows, whose sum the warps of a block share."""
    check_embed(on_host, 3, 150, 700, 24, torch.float32, 0.1)


def test_embed_repeated_aligned_and_unaligned_runs_give_the_same_bits(on_host):
    tensors, ids = draw_embed(3, 60, 96, torch.float16)
    arguments = (ids, 12, 0.3, draw_key(), torch.arange(72, dtype=torch.int32))
    first = embed(on_host, tensors, *arguments)
    apart = [strided(t) for t in tensors[:3]] + tensors[3:]
    assert apart[0].stride(0) * 2 % 16 != 0
    for other in (tensors, apart):
        for name, a, b in zip(EMBED_NAMES, first, embed(on_host, other, *arguments), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("which", [0, 1])
def test_embed_ids_out_of_range(on_host, which):
    """The nearest row that there is, no gradient of any, and the flag."""
    tensors, ids = draw_embed(0, 6, 24, torch.float32)
    wrong, errors = [t.clone() for t in ids], torch.zeros(1, dtype=torch.int32)
    wrong[which][[1, 4]] = torch.tensor([-3, 1 << 40])
    right = [t.clone() for t in wrong]
    right[which] = right[which].clamp(0, len(tensors[1 + which]) - 1)
    clean = embed(on_host, tensors, right, 0, 0.0, None, None, errors=errors)
    assert errors.item() == 0
    out, *gradients = embed(on_host, tensors, wrong, 0, 0.0, None, None, errors=errors)
    assert torch.equal(out, clean[0]) and errors.item() == 1
    assert torch.equal(gradients[1 - which], clean[2 - which])
    assert torch.isfinite(gradients[which]).all() and not torch.equal(gradients[which], clean[1 + which])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtypes", PAIRS)
def test_every_dtype_and_width(on_host, dtypes, width):
    rows = 3 if width > 1024 else 11
    check_norm(on_host, rows, width, dtypes, 0.1)
    check_norm(on_host, 1, width, dtypes, 0.0)
    check_gelu(on_host, rows, width, dtypes)


def test_random_cases(on_host, seed):
    rng = random.Random(seed)
    for _ in range(100):
        rows, width, dtypes = rng.randint(0, 13), rng.randint(1, 1100), rng.choice(PAIRS)
        dropout, apart, bias = rng.choice([0.0, 0.01, 0.5]), rng.random() < 0.3, rng.random() < 0.5
        print(rows, width, dtypes, dropout, apart, bias)
        check_norm(on_host, rows, width, dtypes, dropout, apart=apart, input_bias=bias)
        check_gelu(on_host, rows, width, dtypes, bias=bias)


def test_many_rows_fall_into_parts(on_host):
    check_norm(on_host, 1500, 24, (torch.float32, torch.float32), 0.1)
    check_gelu(on_host, 1500, 24, (torch.float32, torch.float32))


def test_repeated_runs_give_the_same_bits(on_host):
    tensors = [torch.randn(600, 40), torch.randn(600, 40), *(torch.randn(40) for _ in range(3))]
    arguments = (tensors, 0.3, draw_key(), torch.arange(600, dtype=torch.int32), 9)
    first, second = (norm(on_host, *arguments) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_aligned_and_unaligned_rows_give_the_same_bits(on_host):
    """Loads of 16 bytes and of one number."""
    tensors = [
        torch.randn(6, 96).half(),
        torch.randn(6, 96).half(),
        *(torch.randn(96).half() for _ in range(3)),
    ]
    drop = (0.3, draw_key(), torch.arange(6, dtype=torch.int32), 9)
    apart = [strided(t) for t in tensors[:2]] + tensors[2:]
    assert apart[0].stride(0) * 2 % 16 != 0
    for name, a, b in zip(NORM_NAMES, *(norm(on_host, t, *drop) for t in (tensors, apart)), strict=True):
        assert torch.equal(a, b), name


def test_every_number_in_half_precision_is_converted_as_torch_does(on_host):
    """A row of one channel normalises to 0, so `out` is the bias: a conversion there and back."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        numbers = every.view(dtype)
        wide = on_host.bias_gelu(torch.full((1, 1 << 16), 300.0), numbers.float().nan_to_num(1, 2, -100))
        assert wide.isfinite().all()
        rest = (torch.zeros(1, 4096, dtype=dtype),) * 2, torch.zeros(4096, dtype=dtype)
        for part in numbers.split(4096):
            out = on_host.add_layer_norm(*rest[0], rest[1], part, None, 1e-5, 0.0, None, None, 0)[0][0]
            same = (out == part) | (out.isnan() & part.isnan())
            assert same.all(), part[~same]
