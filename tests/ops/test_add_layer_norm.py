"""add_layer_norm: the compiled operator against the plain sequence, and both against the truth in fp64."""

import math
import random

import pytest
import torch
from compiled_cases import ON_CPU, PAIRS, ROWS, WIDTHS, compare, needs_extension, strided, with_gradients
from tolerances import max_error

from blip2_kernels import extension
from blip2_kernels.ops import add_layer_norm
from blip2_kernels.ops.philox import Site, draw_key, hidden_keep_mask, keep_scale

NAMES = ("out", "dx", "dresidual", "dweight", "dbias", "dinput_bias")
BACKENDS = ["reference", pytest.param("csrc", marks=needs_extension)]


def draw(rows, width, x_dtype=torch.float32, dtype=torch.float32, input_bias=True):
    x, residual = torch.randn(rows, width).to(x_dtype), torch.randn(rows, width).to(dtype)
    weight, bias, input_bias_ = (torch.randn(width).to(dtype) for _ in range(3))
    return [x, residual, weight, bias, input_bias_ if input_bias else None]


def names_of(rows):
    return torch.randperm(1 << 20)[:rows].to(torch.int32) * 7 + 3


def function(backend, rows, dropout=0.0, **options):
    """add_layer_norm as a function of its five tensors, with dropout drawn once."""
    key, names = draw_key(), names_of(rows)

    def call(x, residual, weight, bias, input_bias, backend=backend):
        drop = {"dropout": dropout, "dropout_key": key, "row_keys": names}
        return add_layer_norm(
            x,
            residual,
            weight,
            bias,
            input_bias=input_bias,
            backend=backend,
            **drop,
            **{"eps": 1e-5} | options,
        )

    return call


def plain_of(call):
    return lambda *tensors: call(*tensors, backend="reference")


@needs_extension
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("x_dtype", "dtype"), PAIRS)
def test_every_dtype_width_and_row_count(x_dtype, dtype, width, rows, dropout):
    call = function("csrc", rows, dropout, layer=5, site=Site.CROSS_OUTPUT)
    compare(NAMES, call, plain_of(call), draw(rows, width, x_dtype, dtype))


@needs_extension
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("x_dtype", "dtype"), PAIRS)
def test_without_a_bias_of_the_input(x_dtype, dtype, width):
    for rows in ROWS:
        print(f"{rows} rows")
        tensors = draw(rows, width, x_dtype, dtype, input_bias=False)
        call = function("csrc", rows, 0.1 if rows == 3 else 0.0)
        compare(NAMES[:-1], call, plain_of(call), tensors)


@needs_extension
def test_random_cases(seed):
    rng = random.Random(seed)
    for _ in range(60):
        rows, width = rng.randint(0, 40), rng.randint(1, 300)
        x_dtype, dtype = rng.choice(PAIRS)
        case = (rows, width, x_dtype, dtype, rng.random() < 0.5)
        options = {
            "layer": rng.randint(0, 11),
            "site": rng.choice(list(Site)),
            "eps": rng.choice([1e-12, 1e-5, 0.1]),
        }
        print(case, options)
        call = function("csrc", rows, rng.choice([0.0, 0.01, 0.5, 0.99]), **options)
        tensors = draw(*case)
        compare([n for n in NAMES if case[-1] or n != "dinput_bias"], call, plain_of(call), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 8, 33, 768])
def test_the_dropout_mask_is_the_contract(backend, width):
    """Against the mask itself, with x so large that a single wrong decision would show."""
    rows, p, key = 50, 0.3, draw_key()
    names = names_of(rows)
    x, residual = torch.full((rows, width), 1000.0), torch.randn(rows, width)
    drop = {"dropout": p, "dropout_key": key, "row_keys": names, "layer": 3, "site": Site.FEED_FORWARD}
    ones, zeros = torch.ones(width), torch.zeros(width)
    leaf = x.clone().requires_grad_()
    out = add_layer_norm(leaf, residual, ones, zeros, eps=1e6, backend=backend, **drop)
    keep = hidden_keep_mask(key, names, width, p, layer=3, site=Site.FEED_FORWARD)
    hidden = residual + torch.where(keep, x * keep_scale(p), 0)
    assert max_error(out.detach(), torch.nn.functional.layer_norm(hidden.double(), (width,), eps=1e6)) < 1e-5
    (dx,) = torch.autograd.grad(out, leaf, torch.randn_like(out))
    assert (dx[~keep] == 0).all() and (width == 1 or (dx[keep] != 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_dropped_may_be_infinite(backend):
    x, residual, weight, bias, _ = draw(40, 16)
    key, names = draw_key(), names_of(40)
    keep = hidden_keep_mask(key, names, 16, 0.4, layer=0, site=Site.SELF_OUTPUT)
    drop = {"dropout": 0.4, "dropout_key": key, "row_keys": names}
    clean = add_layer_norm(x, residual, weight, bias, backend=backend, **drop)
    dirty = x.masked_fill(~keep, float("inf"))
    assert torch.equal(add_layer_norm(dirty, residual, weight, bias, backend=backend, **drop), clean)


@needs_extension
@pytest.mark.parametrize("width", [7, 33, 768])
@pytest.mark.parametrize(("x_dtype", "dtype"), PAIRS)
def test_rows_apart_and_unaligned(x_dtype, dtype, width):
    call = function("csrc", 9, 0.2)
    tensors = draw(9, width, x_dtype, dtype)
    direct = with_gradients(call, tensors)
    apart = [strided(t) for t in tensors[:2]] + tensors[2:]
    for name, a, b in zip(NAMES, direct, with_gradients(call, apart), strict=True):
        assert torch.equal(a, b), name
    across = [t.t().contiguous().t() for t in tensors[:2]] + [
        torch.stack([t, t], 1)[:, 0] for t in tensors[2:]
    ]
    assert not across[0].is_contiguous()
    for name, a, b in zip(NAMES, direct, with_gradients(call, across), strict=True):
        assert torch.equal(a, b), name


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_any_number_of_threads(dtype):
    tensors = draw(1000, 384, dtype, dtype)
    call = function("csrc", 1000, 0.1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(with_gradients(call, tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(NAMES, results[0], other, strict=True):
            assert torch.equal(a, b), name


@needs_extension
def test_a_constant_row_and_extreme_numbers():
    call = function("csrc", 4)
    tensors = draw(4, 33)
    tensors[0][0], tensors[1][0] = 3.0, 2.0
    tensors[4][:] = 0.25
    out, *_ = with_gradients(call, tensors)
    assert torch.equal(out[0], tensors[3])  # nothing is left of it but the bias
    tensors[0] *= 1e15
    got, plain = call(*tensors), plain_of(call)(*tensors)
    assert torch.isfinite(got).all() and max_error(got, plain) < 1e-4


@needs_extension
def test_nan_stays_in_its_row():
    x, residual, weight, bias, _ = draw(5, 40)
    clean = add_layer_norm(x, residual, weight, bias, backend="csrc")
    x[2, 7] = float("nan")
    out = add_layer_norm(x, residual, weight, bias, backend="csrc")
    assert out[2].isnan().all() and torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@needs_extension
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("input_bias", [False, True])
@pytest.mark.parametrize(("x_dtype", "dtype"), PAIRS)
def test_opcheck(x_dtype, dtype, input_bias, dropout):
    tensors = [None if t is None else t.requires_grad_() for t in draw(5, 12, x_dtype, dtype, input_bias)]
    drop = (dropout, draw_key(), names_of(5), 9) if dropout else (0.0, None, None, 9)
    torch.library.opcheck(torch.ops.blip2_kernels.add_layer_norm.default, (*tensors, 1e-5, *drop))
    x, residual, weight, _, extra = [None if t is None else t.detach() for t in tensors]
    rest = (extra, torch.randn(5), torch.rand(5))
    arguments = (torch.randn_like(residual), x, residual, weight, *rest, *drop)
    torch.library.opcheck(torch.ops.blip2_kernels.add_layer_norm_backward.default, arguments)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("x_dtype", "dtype"), [PAIRS[0], PAIRS[1], PAIRS[4]])
def test_one_graph_under_compile(x_dtype, dtype, backend):
    # Dynamo cannot trace how the reference draws a mask: the operator's dropout is traced whole.
    call = function(backend, 6, 0.2 if extension.reason() is None and backend != "reference" else 0.0)
    tensors = draw(6, 24, x_dtype, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for name, a, b in zip(
        NAMES, with_gradients(compiled, tensors), with_gradients(call, tensors), strict=True
    ):
        assert max_error(a, b) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_the_op_changes_nothing(backend):
    call = function(backend, 6)
    tensors = draw(6, 24, torch.bfloat16)
    outside = call(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(*tensors)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


@needs_extension
def test_what_needs_no_gradient_gets_none():
    x, residual, weight, bias, _ = draw(4, 8)
    out = add_layer_norm(x, residual, weight.requires_grad_(), bias, backend="csrc")
    out.sum().backward()
    assert x.grad is None and residual.grad is None and weight.grad is not None
    assert not add_layer_norm(x, residual, weight.detach(), bias, backend="csrc").requires_grad


@needs_extension
def test_the_row_in_front_of_a_far_one_is_addressed_in_64_bits():
    """Rows 2^30 elements apart: untouched pages of the storage take no memory."""
    room = torch.empty(3 << 30, dtype=torch.bfloat16)
    x = room.as_strided((3, 16), (1 << 30, 1))
    x.copy_(torch.randn(3, 16))
    residual, weight, bias = (
        torch.randn(3, 16).bfloat16(),
        torch.ones(16).bfloat16(),
        torch.zeros(16).bfloat16(),
    )
    assert torch.equal(
        add_layer_norm(x, residual, weight, bias, backend="csrc"),
        add_layer_norm(x.contiguous(), residual, weight, bias, backend="csrc"),
    )


GOOD = dict(zip(("x", "residual", "weight", "bias"), draw(3, 4), strict=False))
BAD = [
    ({"x": torch.randn(3, 5)}, ValueError, "x: expected .* [3, 4], got float32 [3, 5]"),
    ({"x": torch.randn(4)}, ValueError, "x: expected"),
    ({"x": torch.ones(3, 4, dtype=torch.int32)}, TypeError, "x: expected"),
    ({"x": torch.randn(3, 4).double()}, TypeError, "x: expected"),
    ({"residual": torch.randn(3, 4).half()}, TypeError, "x: expected float16"),
    ({"residual": torch.randn(3, 0)}, ValueError, "residual: expected at least one channel"),
    ({"residual": None}, TypeError, "residual: expected a tensor"),
    ({"weight": torch.randn(5)}, ValueError, "weight: expected float32 [4], got float32 [5]"),
    ({"bias": torch.randn(4).half()}, TypeError, "bias: expected float32 [4], got float16 [4]"),
    ({"input_bias": torch.randn(1, 4)}, ValueError, "input_bias: expected float32 [4]"),
    ({"eps": -1e-5}, ValueError, "eps: expected a finite number >= 0, got -1e-05"),
    ({"eps": math.nan}, ValueError, "eps: expected"),
    ({"eps": "small"}, TypeError, "eps: expected"),
    ({"dropout": 1.0}, ValueError, "dropout: expected a number in [0, 1), got 1.0"),
    ({"dropout": 0.5}, TypeError, "dropout_key: expected a tensor int64 [], got NoneType"),
    (
        {"dropout": 0.5, "dropout_key": draw_key()},
        TypeError,
        "row_keys: expected a tensor int32 [3], got NoneType",
    ),
    (
        {"row_keys": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        "row_keys: expected int32 [3], got int32 [2]",
    ),
    ({"site": 3}, TypeError, "site: expected a Site, got int 3"),
    ({"layer": -1}, ValueError, "layer: expected an int in"),
    ({"backend": "cuda"}, ValueError, "backend: expected one of 'auto', 'csrc', 'reference', got str 'cuda'"),
    (
        {"weight": torch.randn(4, device="meta")},
        ValueError,
        "weight: expected a tensor on cpu, got one on meta",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_refusals(changes, error, message):
    pattern = message.replace("[", r"\[").replace("]", r"\]").replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(error, match=pattern):
        add_layer_norm(**GOOD | changes)


META = object()
NAMED = ((0, "x"), (2, "weight"), (3, "bias"), (7, "dropout_key"), (8, "row_keys"))


@needs_extension
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(3, 5), "x: expected float32 [3, 4], got float32 [3, 5]"),
        (
            0,
            torch.randn(3, 4).long(),
            "x: expected float32, float16 or bfloat16 [rows, width], got int64 [3, 4]",
        ),
        (1, torch.randn(3, 4).double(), "residual: expected float32, float16 or bfloat16"),
        (1, torch.randn(3, 4, 1), "residual: expected"),
        (
            1,
            torch.randn(1, 4097).expand(3, -1),
            "residual: expected a width from 1 to 4096, got float32 [3, 4097]",
        ),
        (1, torch.randn(1, 4).expand((1 << 31) - 7, -1), "residual: expected at most 2^31 - 8 rows"),
        (2, torch.randn(3), "weight: expected float32 [4], got float32 [3]"),
        (3, torch.randn(4).half(), "bias: expected float32 [4], got float16 [4]"),
        (4, torch.randn(2, 2), "input_bias: expected float32 [4], got float32 [2, 2]"),
        (5, -1.0, "eps: expected a finite number >= 0, got -1"),
        (5, math.nan, "eps: expected"),
        (6, 1.0, "dropout: expected a number in [0, 1), got 1"),
        (6, -0.1, "dropout: expected"),
        (6, 0.5, "dropout_key: expected int64 [] where dropout > 0, got None"),
        (7, torch.zeros(2).long(), "dropout_key: expected int64 [], got int64 [2]"),
        (8, torch.zeros(4, dtype=torch.int32), "row_keys: expected int32 [3], got int32 [4]"),
        (8, torch.zeros(3).long(), "row_keys: expected int32 [3], got int64 [3]"),
        (9, -1, "place: expected an int in [0, 2^32), got -1"),
        *[(place, META, f"{name}: expected a tensor on the device of the others") for place, name in NAMED],
    ],
)
def test_the_operator_itself_refuses(place, value, message):
    """Before any launch, for callers who go around the Python function."""
    drop = (0.5, draw_key(), torch.zeros(3, dtype=torch.int32)) if place in (7, 8) else (0.0, None, None)
    arguments = [torch.randn(3, 4), torch.randn(3, 4), torch.ones(4), torch.zeros(4), None, 1e-5, *drop, 0]
    value = arguments[place].to("meta") if value is META else value
    arguments[place] = value
    with pytest.raises(RuntimeError) as caught:
        torch.ops.blip2_kernels.add_layer_norm.default.redispatch(ON_CPU, *arguments)
    assert message in str(caught.value)


@needs_extension
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(3, 5), "grad: expected float32 [3, 4], got float32 [3, 5]"),
        (0, torch.randn(3, 4).half(), "grad: expected float32 [3, 4], got float16 [3, 4]"),
        (0, META, "grad: expected a tensor on the device of the others"),
        (1, torch.randn(2, 4), "x: expected float32 [3, 4], got float32 [2, 4]"),
        (2, torch.randn(1, 4).expand((1 << 31) - 7, -1), "residual: expected at most 2^31 - 8 rows"),
        (5, torch.randn(4), "mean: expected float32 [3], got float32 [4]"),
        (6, torch.randn(3).double(), "rstd: expected float32 [3], got float64 [3]"),
        (6, META, "rstd: expected a tensor on the device of the others"),
        (7, 1.5, "dropout: expected a number in [0, 1), got 1.5"),
    ],
)
def test_the_backward_refuses(place, value, message):
    arguments = [*(torch.randn(3, 4) for _ in range(3)), torch.ones(4), None, torch.zeros(3), torch.ones(3)]
    arguments += [0.0, None, None, 0]
    arguments[place] = arguments[place].to("meta") if value is META else value
    with pytest.raises(RuntimeError) as caught:
        torch.ops.blip2_kernels.add_layer_norm_backward.default.redispatch(ON_CPU, *arguments)
    assert message in str(caught.value)


def test_a_backend_that_cannot_serve_says_why():
    tensors = draw(2, 4)
    with pytest.raises(ValueError, match=r"'csrc' cannot serve this call: .*float64"):
        add_layer_norm(*(t.double() for t in tensors[:4]), backend="csrc")
    wide = draw(2, 5000)
    with pytest.raises(ValueError, match=r"'csrc' cannot serve this call: .*up to 4096 channels, got 5000"):
        add_layer_norm(*wide[:4], backend="csrc")
    assert max_error(add_layer_norm(*wide[:4]), add_layer_norm(*wide[:4], backend="reference")) == 0
