"""Calls that the cases of the other files leave out, each found by a fault that nothing else noticed."""

from dataclasses import replace

import cross_cases
import pytest
import self_cases
import torch
from cross_cases import CrossCase
from self_cases import B, C, SelfCase, U
from tolerances import assert_yardstick

from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask
from blip2_kernels.ops import cross_attention, latent_attention, launching, self_attention
from blip2_kernels.ops.cross_attention.triton import op as cross_op
from blip2_kernels.ops.philox import LANES, Site, philox_4x32_10
from blip2_kernels.ops.self_attention.triton import op as self_op

STEP = 2**30 + 64
"""Elements: a stride that fits 32 bits, while twice as much does not."""


def spread(t: torch.Tensor, *extra: int) -> torch.Tensor:
    """The same values in a larger tensor, with other strides: `extra` places more in each dimension."""
    larger = t.new_empty([n + more for n, more in zip(t.shape, extra, strict=True)])
    return larger[tuple(slice(n) for n in t.shape)].copy_(t)


def far_apart(t: torch.Tensor, dim: int) -> torch.Tensor:
    """The same values with STEP elements between neighbours along one dimension; few pages exist."""
    strides = list(t.contiguous().stride())
    strides[dim] = STEP
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True))
    return torch.as_strided(torch.empty(span, dtype=t.dtype), t.shape, strides).copy_(t)


def bits(call, tensors, grad) -> list[torch.Tensor]:
    """Output and gradients of a call."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def self_call(case: SelfCase):
    """A call of `self_attention`, and q, k, v and grad of its size."""
    layout = case.layouts()[0]
    tensors = [torch.randn(layout.rows, case.heads, case.head_dim).to(case.dtype) for _ in range(4)]

    def call(q, k, v):
        return self_attention(q, k, v, layout, layout, AttentionMask(case.modes), backend="triton")

    return call, tensors


def cross_call(case: CrossCase):
    """A call of `cross_attention`, and q, k, v and grad of its size."""
    q, k, v = (t.contiguous() for t in case.tensors(torch.Generator().manual_seed(0)))

    def call(q, k, v):
        return cross_attention(q, k, v, backend="triton", **case.options())

    return call, [q, k, v, torch.randn(q.shape).to(q.dtype)]


# ------------------------------------------------------------------------------- every tensor has its strides


@pytest.mark.parametrize("longest", [9, 100])
def test_self_attention_reads_each_tensor_by_its_own_strides(longest):
    case = SelfCase((U, C), 5, ((longest, 3),) * 2, longest, heads=2, head_dim=16, dtype=torch.float16)
    call, tensors = self_call(case)
    spaced = [spread(t, 0, i, 8 * i) for i, t in enumerate(tensors, 1)]
    assert_same_bits(bits(call, tensors[:3], tensors[3]), bits(call, spaced[:3], spaced[3]))


@pytest.mark.parametrize("index", [None, (1, 0, 1, 1, 1, 1)], ids=["own", "shared"])
def test_cross_attention_reads_each_tensor_by_its_own_strides(index):
    samples = 2 if index is None else len(index)
    case = CrossCase(index, samples, 2, 40, num_queries=33, head_dim=16, dtype=torch.float16)
    call, tensors = cross_call(case)
    spaced = [spread(t, 0, i, 2 * i, 8 * i) for i, t in enumerate(tensors, 1)]
    assert_same_bits(bits(call, tensors[:3], tensors[3]), bits(call, spaced[:3], spaced[3]))


# ------------------------------------------------------------------------------------ products beyond 32 bits


Q, K, V, GRAD = range(4)


@pytest.mark.parametrize("which", [Q, K, V, GRAD], ids=["q", "k", "v", "grad"])
@pytest.mark.parametrize("longest", [5, 40])
def test_self_attention_heads_whose_product_with_a_stride_passes_2_to_the_31(which, longest):
    case = SelfCase((B,), 4, ((longest,),), longest, heads=3, head_dim=16, dtype=torch.float32)
    call, tensors = self_call(case)
    far = [far_apart(t, 1) if i == which else t for i, t in enumerate(tensors)]
    assert_same_bits(bits(call, tensors[:3], tensors[3]), bits(call, far[:3], far[3]))


@pytest.mark.parametrize(
    ("which", "dim"),
    [
        *((Q, 0), (K, 0), (K, 1), (V, 0), (V, 1), (GRAD, 0)),
        *((Q, 1), (Q, 2), (K, 2), (V, 2), (GRAD, 1), (GRAD, 2)),
    ],
)
def test_cross_attention_indices_whose_product_with_a_stride_passes_2_to_the_31(which, dim):
    case = CrossCase((2, 0, 1), 3, 3, 3, num_queries=3, heads=3, head_dim=16, dtype=torch.float16)
    call, tensors = cross_call(case)
    far = [far_apart(t, dim) if i == which else t for i, t in enumerate(tensors)]
    assert_same_bits(bits(call, tensors[:3], tensors[3]), bits(call, far[:3], far[3]))


@pytest.mark.parametrize("operand", ["q", "features"])
def test_latent_attention_rows_whose_product_with_a_stride_passes_2_to_the_31(operand):
    q, features = torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    expected = latent_attention(q, features, scale=0.5, backend="triton")
    if operand == "q":
        got = latent_attention(far_apart(q, 1), features, scale=0.5, backend="triton")
    else:
        got = latent_attention(q, far_apart(features, 1), scale=0.5, backend="triton")
    assert torch.equal(got, expected)


# --------------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("modes", [(U,), (U, C)], ids=["alone", "pair"])
@pytest.mark.parametrize("select", ["all", "first"])
def test_unimodal_texts_that_attend_without_the_queries(modes, select):
    """Then a text begins at other rows on the attending side than on the attended one."""
    case = SelfCase(modes, 5, ((3, 7, 1),) * len(modes), 8, select=select, queries_attend=False, head_dim=16)
    tensors = case.tensors(torch.Generator().manual_seed(0))
    got, plain = (self_cases.run(case, tensors, backend) for backend in ("triton", "reference"))
    truth = self_cases.run(case, tensors, "reference", torch.float64)
    for name, *values in zip("oqkv", got, plain, truth, strict=True):
        assert_yardstick(name, *values)


@pytest.mark.parametrize("modes", [(B,), (U,)], ids=["joint", "unimodal"])
def test_a_row_that_sees_one_key_has_no_gradient_for_it(modes):
    """Its probability is 1 whatever the score; what is left of grad's product with out is out's rounding."""
    case = SelfCase(modes, 0, ((1, 140),), 140, dtype=torch.bfloat16, dropout=0.1)
    tensors = case.tensors(torch.Generator().manual_seed(0))
    _, dq, dk, _ = self_cases.run(case, tensors, "triton")
    plain = self_cases.run(case, tensors, "reference")
    for got, expected in ((dq[:1], plain[1][:1]), (dk[:1], plain[2][:1])):
        assert_yardstick("gradient", got, expected, torch.zeros_like(got).double())


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("modes", [(B,), (U, C)], ids=["bidirectional", "pair"])
def test_the_last_rows_of_a_text_behind_a_gap(modes):
    """Five queries, three rows that do not exist, and a text that ends just behind the border of a block."""
    lengths = ((121, 59, 90),) * len(modes)
    case = SelfCase(modes, 5, lengths, 121, heads=1, head_dim=16, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        own = replace(case, dtype=dtype)
        tensors = own.tensors(torch.Generator().manual_seed(0))
        got, plain = (self_cases.run(own, tensors, backend) for backend in ("triton", "reference"))
        truth = self_cases.run(own, tensors, "reference", torch.float64)
        for name, *values in zip("oqkv", got, plain, truth, strict=True):
            assert_yardstick(name, *values)


@pytest.mark.parametrize("visible", ["lengths", "mask"])
def test_two_chunks_without_a_visible_token(visible):
    case = CrossCase(None, 2, 2, 1030, num_queries=3, heads=1, head_dim=16)
    options = {"image_lengths": torch.tensor([0, 1030], dtype=torch.int32)}
    if visible == "mask":
        options = {"image_mask": torch.arange(1030)[None, :] >= torch.tensor([[2000], [1026]])}
    tensors = case.tensors(torch.Generator().manual_seed(0))
    got, plain = (cross_cases.run(case, tensors, backend, **options) for backend in ("triton", "reference"))
    truth = cross_cases.run(case, tensors, "reference", torch.float64, **options)
    for name, *values in zip("oqkv", got, plain, truth, strict=True):
        assert (values[0][0] == 0).all()
        assert_yardstick(name, *values)


def test_more_samples_than_the_grouping_kernel_looks_at_together():
    index = torch.randint(0, 3, (2500,), dtype=torch.int32)
    groups, _ = cross_op._group(torch.empty(2500, 1, 1, 16), 3, index, 32)
    assert torch.equal(groups.order.long(), torch.sort(index, stable=True).indices)
    assert groups.start.tolist() == [0, *torch.bincount(index).cumsum(0).tolist()]


def test_an_image_s_tokens_split_among_programs_with_several_heads(monkeypatch):
    # Two heads and four splits share a divisor: no wrong order of the two covers all pairs.
    case = CrossCase((0, 1) + (1,) * 5, 7, 2, 60, num_queries=33, heads=2, head_dim=16)
    tensors = case.tensors(torch.Generator().manual_seed(0))
    whole = cross_cases.run(case, tensors, "triton")
    monkeypatch.setattr(launching, "processors", lambda device: 10_000)
    assert_same_bits(whole, cross_cases.run(case, tensors, "triton"))


def test_an_element_whose_number_is_the_threshold_is_kept():
    layout = TokenLayout.from_attention_masks(8, samples=1)
    zero, place = torch.zeros(1, dtype=torch.int64), torch.full((1,), 7 * LANES + Site.SELF_ATTENTION)
    words = philox_4x32_10((layout.row_keys[:1].long(), zero, zero, place), torch.tensor(5))
    q, marks = torch.zeros(8, 1, 16), torch.eye(8, 16)[:, None]
    for lane in range(LANES):
        number = int(words[lane // 2]) >> 16 * (lane % 2) & 0xFFFF
        for level, kept in ((number, True), (number + 1, False)):
            options = {"dropout": level / 65536, "dropout_key": torch.tensor(5), "layer": 7}
            out = self_attention(q, q, marks, layout, layout, AttentionMask(), backend="triton", **options)
            assert bool(out[0, 0, lane] != 0) == kept


def constants_of_a_launch(monkeypatch, call) -> dict:
    """The constexprs of the first kernel that a call would launch; nothing is."""

    class Launched(Exception):
        pass

    def launch(kernel, grid, args, constants, config):
        raise Launched(constants)

    monkeypatch.setattr(launching, "launch", launch)
    with pytest.raises(Launched) as caught:
        call()
    return caught.value.args[0]


def test_self_attention_s_offsets_are_wide_where_only_out_is(monkeypatch):
    """An expanded q reaches nowhere, but out is as large as it looks."""
    q = torch.zeros(128, dtype=torch.float16).expand(2**24, 2, 128)
    sizes = self_op.Sizes(2**19, q_queries=32, kv_queries=32, need_backward=0)
    rows = self_op.Rows(torch.empty(0), torch.empty(0))
    options = (*rows, None, [*sizes], 0.1, 0.0, 0)
    constants = constants_of_a_launch(monkeypatch, lambda: self_op._run_forward(q, q, q, *options))
    assert constants["WIDE"]


def test_cross_attention_s_offsets_are_wide_where_only_out_is(monkeypatch):
    x = torch.zeros(128, dtype=torch.float16).expand(2**24 + 1, 1, 1, 128)
    options = (None, None, None, None, 0.1, 0.0, 0, False)
    constants = constants_of_a_launch(monkeypatch, lambda: cross_op._run_forward(x, x, x, *options))
    assert constants["WIDE"]
