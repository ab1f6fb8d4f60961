"""bias_gelu: the compiled operator against the plain sequence, and both against the truth in fp64."""

import math
import random

import pytest
import torch
from compiled_cases import (
    DTYPES,
    ON_CPU,
    PAIRS,
    ROWS,
    WIDTHS,
    compare,
    needs_extension,
    strided,
    with_gradients,
)
from tolerances import max_error

from blip2_kernels.ops import bias_gelu

NAMES = ("out", "dx", "dbias")
BACKENDS = ["reference", pytest.param("csrc", marks=needs_extension)]


def draw(rows, width, dtype=torch.float32, bias_dtype=torch.float32, bias=True):
    return [(2 * torch.randn(rows, width)).to(dtype), torch.randn(width).to(bias_dtype) if bias else None]


def call(backend):
    return lambda x, bias: bias_gelu(x, bias, backend=backend)


@needs_extension
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("dtype", "bias_dtype"), PAIRS)
def test_every_dtype_width_and_row_count(dtype, bias_dtype, width, rows):
    compare(NAMES, call("csrc"), call("reference"), draw(rows, width, dtype, bias_dtype))


@needs_extension
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_bias(dtype, width, rows):
    compare(NAMES[:2], call("csrc"), call("reference"), draw(rows, width, dtype, bias=False))


@needs_extension
def test_random_cases(seed):
    rng = random.Random(seed)
    for _ in range(60):
        bias = rng.random() < 0.5
        case = (rng.randint(0, 40), rng.randint(1, 300), *rng.choice(PAIRS), bias)
        print(case)
        compare(NAMES[: 2 + bias], call("csrc"), call("reference"), draw(*case))


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_fine_grid(dtype):
    """Value and slope from the far tail through the bend: no worse than torch's own, and 0 where it is 0."""
    x = torch.linspace(-14, 14, 200_001, dtype=torch.float64).to(dtype)[None]
    compare(NAMES[:2], call("csrc"), call("reference"), [x, None])
    far = torch.tensor([[-100.0, -40.0, 40.0, 100.0]], dtype=dtype)
    out, dx = with_gradients(lambda x, _: bias_gelu(x, backend="csrc"), [far, None])
    assert out.tolist() == [[0.0, 0.0, 40.0, 100.0]] and (dx[0, :2] == 0).all() and (dx[0, 2:] != 0).all()


@needs_extension
def test_the_small_tail_keeps_its_relative_accuracy():
    x = torch.linspace(-12, -1, 1001)[None]
    truth = x.double() * torch.special.erfc(-x.double() / math.sqrt(2)) / 2
    out = bias_gelu(x, backend="csrc")
    assert ((out - truth) / truth).abs().max() < 2e-5


@needs_extension
@pytest.mark.parametrize("width", [1, 7, 33, 768])
@pytest.mark.parametrize(("dtype", "bias_dtype"), PAIRS)
def test_rows_apart_and_unaligned(dtype, bias_dtype, width):
    x, bias = draw(9, width, dtype, bias_dtype)
    direct = with_gradients(call("csrc"), [x, bias])
    across = [x.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0]]
    for other in ([strided(x), bias], across):
        for name, a, b in zip(NAMES, direct, with_gradients(call("csrc"), other), strict=True):
            assert torch.equal(a, b), name


@needs_extension
def test_the_same_bits_with_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    tensors = draw(1000, 384)
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(with_gradients(call("csrc"), tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@needs_extension
def test_nan_stays_where_it_is():
    x, bias = draw(4, 40)
    clean = bias_gelu(x, bias, backend="csrc")
    x[1, 3] = float("nan")
    out = bias_gelu(x, bias, backend="csrc")
    assert out[1, 3].isnan() and out.isnan().sum() == 1
    assert torch.equal(out.nan_to_num(0), clean.masked_fill(out.isnan(), 0))


@needs_extension
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bias_dtype"), PAIRS)
def test_opcheck(dtype, bias_dtype, bias):
    x, bias = (None if t is None else t.requires_grad_() for t in draw(5, 12, dtype, bias_dtype, bias))
    torch.library.opcheck(torch.ops.blip2_kernels.bias_gelu.default, (x, bias))
    x, bias = x.detach(), None if bias is None else bias.detach()
    torch.library.opcheck(torch.ops.blip2_kernels.bias_gelu_backward.default, (torch.randn_like(x), x, bias))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("dtype", "bias_dtype"), [PAIRS[0], PAIRS[1], PAIRS[4]])
def test_one_graph_under_compile(dtype, bias_dtype, backend):
    tensors = draw(6, 24, dtype, bias_dtype)
    torch._dynamo.reset()
    compiled = torch.compile(call(backend), fullgraph=True, backend="aot_eager")
    results = (with_gradients(f, tensors) for f in (compiled, call(backend)))
    for name, a, b in zip(NAMES, *results, strict=True):
        assert max_error(a, b) < 1e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_around_the_op_changes_nothing(backend):
    tensors = draw(6, 24, torch.bfloat16)
    outside = call(backend)(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(backend)(*tensors)
    assert inside.dtype == torch.bfloat16 and torch.equal(inside, outside)


@needs_extension
def test_a_far_row_is_addressed_in_64_bits():
    """Rows 2^30 elements apart: untouched pages of the storage take no memory."""
    x = torch.empty(3 << 30, dtype=torch.bfloat16).as_strided((3, 16), (1 << 30, 1))
    x.copy_(torch.randn(3, 16))
    assert torch.equal(bias_gelu(x, backend="csrc"), bias_gelu(x.contiguous(), backend="csrc"))


X = torch.randn(3, 4)
BAD = [
    ((None, None), TypeError, r"x: expected a tensor"),
    ((X[0], None), ValueError, r"x: expected .* \[rows, width\], got float32 \[4\]"),
    ((X.long(), None), TypeError, r"x: expected"),
    ((X[:, :0], None), ValueError, r"x: expected at least one channel"),
    ((X, torch.randn(3)), ValueError, r"bias: expected .* \[4\], got float32 \[3\]"),
    ((X, torch.randn(4).half()), TypeError, r"bias: expected float32"),
    ((X, torch.randn(4, device="meta")), ValueError, r"bias: expected a tensor on cpu"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        bias_gelu(*arguments)


@needs_extension
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.double(), None), "x: expected float32, float16 or bfloat16 [rows, width], got float64 [3, 4]"),
        ((X[:1].expand((1 << 31) - 7, -1), None), "x: expected at most 2^31 - 8 rows"),
        ((X[:, :0], None), "x: expected a width from 1 to"),
        ((X, torch.randn(3)), "bias: expected float32 [4], got float32 [3]"),
        ((X, torch.randn(4).half()), "bias: expected float32 [4], got float16 [4]"),
        ((X, torch.randn(4, device="meta")), "bias: expected a tensor on the device of the others"),
    ],
)
def test_the_operator_itself_refuses(arguments, message):
    """In both directions, before any launch."""
    ops = torch.ops.blip2_kernels
    for operator, grad in ((ops.bias_gelu, ()), (ops.bias_gelu_backward, (torch.randn(3, 4),))):
        with pytest.raises(RuntimeError) as caught:
            operator.default.redispatch(ON_CPU, *grad, *arguments)
        assert message in str(caught.value)


@needs_extension
@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.randn(3, 5), "grad: expected float32 [3, 4], got float32 [3, 5]"),
        (torch.randn(3, 4).half(), "grad: expected float32 [3, 4], got float16 [3, 4]"),
        (torch.randn(3, 4, device="meta"), "grad: expected a tensor on the device of the others"),
    ],
)
def test_the_backward_refuses(grad, message):
    with pytest.raises(RuntimeError) as caught:
        torch.ops.blip2_kernels.bias_gelu_backward.default.redispatch(ON_CPU, grad, X, None)
    assert message in str(caught.value)


def test_a_backend_that_cannot_serve_says_why():
    with pytest.raises(ValueError, match=r"'csrc' cannot serve this call: .*float64"):
        bias_gelu(X.double(), backend="csrc")
