"""The interpreter guard: bf16, tf32, integers and Triton's own library compute as on a GPU."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton

from harness import interpreter
from harness.faults import RawBfloat16, SmallDot

if not interpreter.available():
    pytest.skip("a GPU is visible: kernels are compiled in this process", allow_module_level=True)

with interpreter.switched_on():
    from harness import toys


@pytest.fixture(autouse=True)
def guard():
    with interpreter.guard():
        yield


def assert_identical(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def cast(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    target = torch.empty_like(source, dtype=dtype)
    toys.cast[(-(-source.numel() // 1024),)](source, target, source.numel(), BLOCK=1024)
    return target


@pytest.mark.parametrize("value, rounded", [
    (1 + 2**-8, 1.0),  # halfway, to even
    (1 + 3 * 2**-8, 1 + 2**-6),  # halfway, to even
    (1 + 2**-8 + 2**-20, 1 + 2**-7),
    (-1 - 3 * 2**-8, -1 - 2**-6),
    (3.4e38, float("inf")),
    (float("-inf"), float("-inf")),
    (2.0**-133, 2.0**-133),  # the smallest subnormal
    (2.0**-134, 0.0),
])  # fmt: skip
def test_casts_to_bf16_round_to_nearest_even(value, rounded):
    assert cast(torch.tensor([value]), torch.bfloat16).item() == rounded


def test_casts_to_and_from_bf16_are_those_of_torch():
    random_bits = torch.randint(-(2**31), 2**31, (5000,)).to(torch.int32).view(torch.float32)
    assert_identical(cast(random_bits, torch.bfloat16), random_bits.to(torch.bfloat16))
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1]).to(torch.int32).view(torch.float32)
    assert cast(nans, torch.bfloat16).isnan().all()
    every_bf16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    for dtype in (torch.float32, torch.float16):
        assert_identical(cast(every_bf16, dtype), every_bf16.to(dtype))
    integers = torch.arange(-3000, 3000, dtype=torch.int32)
    assert_identical(cast(integers, torch.bfloat16), integers.to(torch.bfloat16))
    assert_identical(
        cast(integers.to(torch.bfloat16), torch.int32), integers.to(torch.bfloat16).to(torch.int32)
    )


def product(a: torch.Tensor, b: torch.Tensor, precision: str = "ieee") -> torch.Tensor:
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n)
    toys.product[(1,)](a, b, out, M=m, N=n, K=k, PRECISION=precision)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_multiplies_the_values(dtype):
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    torch.testing.assert_close(product(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_dot_cuts_fp32_to_tf32_where_it_is_asked_to():
    one = torch.eye(16)
    values = torch.full((16, 16), 1 + 2.0**-10 + 2.0**-11 + 2.0**-12)  # ten bits of mantissa and two more
    assert_identical(product(one, values, "tf32"), torch.full((16, 16), 1 + 2.0**-10))
    assert_identical(product(values, one, "tf32"), torch.full((16, 16), 1 + 2.0**-10))
    assert_identical(product(one, values, "ieee"), values)
    assert_identical(product(one, values, "tf32x3"), values)
    nan = torch.full((16, 16), 0x7F800001, dtype=torch.int32).view(torch.float32)  # infinity, if it were cut
    assert torch.isnan(product(torch.ones(16, 16), nan, "tf32")).all()


@pytest.mark.parametrize("what", ["add", "negate", "compare", "abs of difference", "fma", "sum", "atomic"])
def test_bf16_arithmetic_is_refused(what):
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(RawBfloat16, match=r"^raw, program \(0, 0, 0\): .* on bf16 values"):
        toys.raw[(1,)](x, torch.empty_like(x), WHAT=what)
    toys.raw[(1,)](x.float(), torch.empty(16), WHAT=what)


@pytest.mark.parametrize("what", ["clamp", "cumsum"])
def test_bf16_arithmetic_is_right_where_triton_casts_itself(what):
    """Triton 3.6 casts to fp32 here, Triton 3.9 leaves it to the kernel."""
    x = torch.ones(16, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    try:
        toys.raw[(1,)](x, out, WHAT=what)
    except RawBfloat16:
        assert triton.__version__ >= "3.7"
    else:
        assert_identical(out, x if what == "clamp" else x.cumsum(0))


def test_bf16_values_may_be_cast_and_then_used():
    x = torch.full((16,), 3.0, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    toys.raw[(1,)](x, out, WHAT="cast")
    assert_identical(out, x + 1)


@pytest.mark.parametrize("m, n, k", [(8, 16, 16), (16, 8, 16), (16, 16, 8)])
def test_a_small_dot_is_refused(m, n, k):
    with pytest.raises(SmallDot, match=f"{m}x{k} times {k}x{n}"):
        product(torch.ones(m, k), torch.ones(k, n))


def test_philox_is_philox():
    # The known answers of Random123 for zeros, for ones and for digits of pi.
    counters = torch.tensor([[0] * 4, [0xFFFFFFFF] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]])
    keys = [(0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0xA4093822, 0x299F31D0)]
    expected = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    for counter, key, words in zip(counters, keys, expected, strict=True):
        out = torch.empty(4, 4, dtype=torch.int64)
        toys.random_words[(1,)](*key, counter.repeat(4, 1), out)
        assert out.tolist() == [words] * 4


def test_the_library_computes_and_wraps_without_warnings():
    x = torch.randn(32)
    out = torch.empty(2 * 32 + 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toys.library[(1,)](x, out, N=32)
    wrapped = ((torch.arange(32) + 2**31 - 1) * 4 + 8) % 2**32
    ends = [x.max(), x.sum(), x.argmax().float(), torch.tensor(17.0), (wrapped.sum() % 2**32).float()]
    torch.testing.assert_close(out, torch.cat([x.cumsum(0), x.softmax(0), torch.stack(ends)]))


def test_extremes_are_computed_without_warnings():
    out = torch.empty(4)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        toys.extremes[(1,)](torch.full((4,), float("inf")), out)
    assert out[:3].isnan().all() and out[3].item() == 1.0
