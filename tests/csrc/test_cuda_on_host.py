"""The CUDA kernels, run on the host: against the plain operators, and on the harness's own terms."""

import random

import pytest
import torch
from compiled_cases import PAIRS, WIDTHS, strided, with_gradients
from tolerances import assert_yardstick

from blip2_kernels.ops import add_layer_norm, bias_gelu
from blip2_kernels.ops.philox import LANES, Site, draw_key

pytestmark = pytest.mark.slow
NORM_NAMES = ("out", "dx", "dresidual", "dweight", "dbias", "dinput_bias")


def output_gradient(out):
    """The one that `with_gradients` takes."""
    generator = torch.Generator().manual_seed(out.numel())
    return torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)


def norm_on_host(ops, tensors, dropout, key, names, place):
    x, residual, weight, bias, input_bias = tensors
    drop = (dropout, key, names, place) if dropout else (0.0, None, None, place)
    out, mean, rstd = ops.add_layer_norm(x, residual, weight, bias, input_bias, 1e-5, *drop)
    saved = (x, residual, weight, input_bias, mean, rstd)
    dx, dresidual, *sums = ops.add_layer_norm_backward(output_gradient(out), *saved, *drop)
    if dresidual.shape != residual.shape:
        dresidual = dx
    return [out, dx, dresidual, *(sums if input_bias is not None else sums[:2])]


def check_norm(ops, rows, width, dtypes, dropout, *, apart=False, input_bias=True):
    x, residual = (torch.randn(rows, width).to(dtype) for dtype in dtypes)
    vectors = [torch.randn(width).to(dtypes[1]) for _ in range(3)]
    tensors = [x, residual, *vectors[:2], vectors[2] if input_bias else None]
    if apart:
        tensors[:2] = [strided(t) for t in tensors[:2]]
    key, names = draw_key(), torch.randperm(1 << 20)[:rows].to(torch.int32) * 5 + 1
    drop = {"dropout": dropout, "dropout_key": key, "row_keys": names, "layer": 4, "site": Site.FEED_FORWARD}

    def plain(x, residual, weight, bias, input_bias):
        vectors = (weight, bias)
        given = {"input_bias": input_bias, "eps": 1e-5, "backend": "reference"} | drop
        return add_layer_norm(x, residual, *vectors, **given)

    got = norm_on_host(ops, tensors, dropout, key, names, 4 * LANES + Site.FEED_FORWARD)
    reference = with_gradients(plain, tensors)
    truth = with_gradients(plain, [None if t is None else t.double() for t in tensors], dtypes[1])
    names_of_results = NORM_NAMES if input_bias else NORM_NAMES[:-1]
    for name, *values in zip(names_of_results, got, reference, truth, strict=True):
        assert_yardstick(name, *values)


def check_gelu(ops, rows, width, dtypes, *, bias=True):
    x, b = (2 * torch.randn(rows, width)).to(dtypes[0]), torch.randn(width).to(dtypes[1]) if bias else None
    out = ops.bias_gelu(x, b)
    dx, dbias = ops.bias_gelu_backward(output_gradient(out), x, b)

    def plain(x, b):
        return bias_gelu(x, b, backend="reference")

    reference = with_gradients(plain, [x, b])
    truth = with_gradients(plain, [x.double(), None if b is None else b.double()], dtypes[0])
    for name, *values in zip(
        ("out", "dx", "dbias"), [out, dx, dbias][: 2 + bias], reference, truth, strict=False
    ):
        assert_yardstick(name, *values)


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
    first, second = (norm_on_host(on_host, *arguments) for _ in range(2))
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
    for name, a, b in zip(
        NORM_NAMES, *(norm_on_host(on_host, t, *drop) for t in (tensors, apart)), strict=True
    ):
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
