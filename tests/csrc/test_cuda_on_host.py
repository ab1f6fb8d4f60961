"""The CUDA kernels, run on the host: against the plain operators, and on the harness's own terms."""

import random

import pytest
import torch
from compiled_cases import DTYPES, PAIRS, WIDTHS, strided, with_gradients
from tolerances import assert_yardstick

from blip2_kernels.ops import add_layer_norm, bias_gelu
from blip2_kernels.ops.embed_tokens.reference import embed_tokens_reference
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


EMBED_NAMES = ("out", "dqueries", "dwords", "dpositions", "dweight", "dbias")


def embed_on_host(ops, tensors, ids, query_rows, dropout, key, names, padding_idx=-1, errors=None):
    """Flat arguments: of token and position ids either both are given, or the words are the text itself."""
    queries, words, positions, weight, bias = tensors
    inputs = (queries, words, positions, *ids, query_rows)
    drop = (dropout, key, names, 5) if dropout else (0.0, None, None, 5)
    out, mean, rstd = ops.embed_tokens_forward(*inputs, weight, bias, 1e-5, *drop, errors)
    orders = [None if t is None else t.argsort(stable=True) for t in ids]
    rest = (weight, mean, rstd, *drop)
    found = ops.embed_tokens_backward(output_gradient(out), *inputs, *orders, padding_idx, *rest)
    wanted = zip(found, tensors, strict=True)
    return [out, *(gradient for gradient, tensor in wanted if tensor is not None)]


def draw_embed(queries, text_rows, width, dtype, *, embedded=False):
    """Tensors and ids; words recur, one of them in most rows."""
    shapes = [(queries, width), (text_rows if embedded else 7, width), (5, width), (width,), (width,)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    if not queries:
        tensors[0] = None
    if embedded:
        tensors[2] = None
        return tensors, (None, None)
    words = torch.where(torch.rand(text_rows) < 0.5, 2, torch.randint(0, 7, (text_rows,)))
    return tensors, (words, torch.randint(0, 5, (text_rows,)))


def check_embed(
    ops, queries, samples, text_rows, width, dtype, dropout, *, apart=False, embedded=False, padding=-1
):
    tensors, ids = draw_embed(queries, text_rows, width, dtype, embedded=embedded)
    if apart:
        tensors[:3] = [None if t is None else strided(t) for t in tensors[:3]]
    query_rows = queries * samples
    key, names = draw_key(), torch.randperm(1 << 20)[: query_rows + text_rows].to(torch.int32) * 5 + 1

    def plain(queries, words, positions, weight, bias):
        options = {"query_rows": query_rows, "padding_idx": None if padding < 0 or embedded else padding}
        drop = {
            "dropout": dropout,
            "dropout_key": key,
            "row_keys": names,
            "layer": 0,
            "site": Site.EMBEDDINGS,
        }
        given = options | drop
        return embed_tokens_reference(queries, words, positions, *ids, weight, bias, eps=1e-5, **given)

    got = embed_on_host(ops, tensors, ids, query_rows, dropout, key, names, padding)
    reference = with_gradients(plain, tensors)
    truth = with_gradients(plain, [None if t is None else t.double() for t in tensors], dtype)
    results = ["out", *(n for n, t in zip(EMBED_NAMES[1:], tensors, strict=True) if t is not None)]
    for name, *values in zip(results, got, reference, truth, strict=True):
        assert_yardstick(name, *values)


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
    first = embed_on_host(on_host, tensors, *arguments)
    apart = [strided(t) for t in tensors[:3]] + tensors[3:]
    assert apart[0].stride(0) * 2 % 16 != 0
    for other in (tensors, apart):
        for name, a, b in zip(EMBED_NAMES, first, embed_on_host(on_host, other, *arguments), strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("which", [0, 1])
def test_embed_ids_out_of_range(on_host, which):
    """The nearest row that there is, no gradient of any, and the flag."""
    tensors, ids = draw_embed(0, 6, 24, torch.float32)
    wrong, errors = [t.clone() for t in ids], torch.zeros(1, dtype=torch.int32)
    wrong[which][[1, 4]] = torch.tensor([-3, 1 << 40])
    right = [t.clone() for t in wrong]
    right[which] = right[which].clamp(0, len(tensors[1 + which]) - 1)
    clean = embed_on_host(on_host, tensors, right, 0, 0.0, None, None, errors=errors)
    assert errors.item() == 0
    out, *gradients = embed_on_host(on_host, tensors, wrong, 0, 0.0, None, None, errors=errors)
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
