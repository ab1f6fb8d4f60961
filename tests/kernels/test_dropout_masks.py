"""The kernels' dropout masks are the reference's to the bit: in half precision, forward and backward.

With all scores equal and one operand made of rows of an identity, a result spells the mask out. The output
and dv are 0 where a probability was dropped; the scores' gradient, which dq and dk spell out, is positive
where it was kept and negative where it was dropped.
"""

import pytest
import torch
from cross_cases import CrossCase
from self_cases import C, SelfCase, U

from blip2_kernels.mask import AttentionMask
from blip2_kernels.ops import cross_attention, self_attention
from blip2_kernels.ops.cross_attention import launch as cross_launch
from blip2_kernels.ops.self_attention.launch import tile_rows

RESULTS = ("out", "dq", "dk", "dv")
HALF = [torch.float16, torch.bfloat16]
CHOICES = [
    *((dtype, head_dim, "out") for dtype in HALF for head_dim in (64, 128)),
    *((torch.float16, 64, result) for result in RESULTS[1:]),
    *((torch.bfloat16, 128, result) for result in RESULTS[1:]),
]
"""Dtype, head dim, and the result that is looked at; the gradients in one head dim each."""


def identity(shape, place, first):
    """Rows of an identity: row i has a 1 in channel place[i] - first, if there is such a channel."""
    marks = torch.zeros(shape)
    there = (place >= first) & (place < first + shape[-1])
    index = there.nonzero(as_tuple=True)
    marks[(*index, slice(None), (place - first)[there])] = 1.0
    return marks


def operands(result, q_marks, kv_marks):
    """q, k, v and the gradient of out by which a result spells the mask out."""
    q, k = torch.zeros_like(q_marks), torch.zeros_like(kv_marks)
    v, grad = torch.zeros_like(kv_marks), torch.zeros_like(q_marks)
    if result == "out":
        v = kv_marks
    elif result == "dv":
        grad = q_marks
    else:
        v[..., 0], grad[..., 0] = 1.0, 1.0
        if result == "dk":
            q = q_marks
        else:
            k = kv_marks
    return q, k, v, grad


def spelled(call, tensors, result, dtype):
    *leaves, grad = [t.to(dtype) for t in tensors]
    leaves = [t.requires_grad_() for t in leaves]
    out = call(*leaves)
    if result == "out":
        return out.detach()
    return torch.autograd.grad(out, leaves, grad)[RESULTS.index(result) - 1]


def check(call, result, dtype, q_shape, kv_shape, q_place, kv_place):
    """`call` of q, k, v and a backend; places count an image's or a sample's rows."""
    kept, seen = 0, 0
    place = kv_place if result in ("out", "dq") else q_place
    for first in range(0, int(place.max()) + 1, q_shape[-1]):
        tensors = operands(result, identity(q_shape, q_place, first), identity(kv_shape, kv_place, first))
        got = spelled(lambda *t: call(*t, "triton"), tensors, result, dtype)
        truth = spelled(lambda *t: call(*t, "reference"), tensors, result, torch.float64)
        if result in ("out", "dv"):
            assert torch.equal(got != 0, truth != 0)
            kept, seen = kept + int((truth > 0).sum()), seen + 1
        else:
            # A row of which nothing was dropped, or all, has no gradient but rounding.
            sure = truth.abs() > 1e-6
            assert torch.equal(got.sign()[sure], truth.to(dtype).sign()[sure])
            kept, seen = kept + int((truth[sure] > 0).sum()), seen + int((truth[sure] < 0).sum())
    assert kept and seen


@pytest.mark.parametrize("longest", [8, 20, 140])
@pytest.mark.parametrize(("dtype", "head_dim", "result"), CHOICES)
def test_self_attention(dtype, head_dim, longest, result, launches):
    """Tiles of 16 rows, whose decisions are broadcast, and of 64, where they are gathered; then blocks."""
    from blip2_kernels.ops.triton_primitives import GATHER_FROM

    queries = 7
    rows = tile_rows(queries, longest)
    gathered = rows * rows // 8 >= GATHER_FROM.value
    assert gathered == (longest > 8)
    heads = 1 if longest > 100 else 2
    case = SelfCase((U, C), queries, ((longest, 3),) * 2, longest, heads=heads, head_dim=head_dim)
    layout = case.layouts()[1]
    shape = (layout.rows, case.heads, head_dim)
    is_text = torch.arange(layout.rows) >= layout.query_rows
    place = layout.row_keys % 1024 + queries * is_text

    def call(q, k, v, backend):
        options = {"dropout": 0.4, "dropout_key": torch.tensor(-5), "layer": 7, "backend": backend}
        return self_attention(q, k, v, layout, layout, AttentionMask(case.modes), **options)

    check(call, result, dtype, shape, shape, place, place)
    kernels = {launch.kernel for launch in launches}
    assert "forward_kernel" in kernels
    assert ("backward_tile_kernel" in kernels) == (longest < 100 and result != "out")
    assert ("backward_keys_kernel" in kernels) == (longest > 100 and result != "out")


@pytest.mark.parametrize(("tokens", "own"), [(20, True), (70, False)])
@pytest.mark.parametrize(("dtype", "head_dim", "result"), CHOICES)
def test_cross_attention(dtype, head_dim, tokens, own, result, launches):
    """Images of one tile of rows, whose gradients one program owns, and of several."""
    index = (0, 1) if own else (1, *(0,) * 5)
    queries = 7 if own else 33
    case = CrossCase(index, len(index), 2, tokens, num_queries=queries, heads=1, head_dim=head_dim)
    first = cross_launch.BACKWARD_SHARED.configs(0, cross_launch.key(dtype, head_dim))[0]
    assert (max(map(index.count, index)) * queries > first["BLOCK_M"]) != own
    q_shape = (case.samples, queries, case.heads, head_dim)
    kv_shape = (case.images, tokens, case.heads, head_dim)
    # Rows are told apart within their image.
    samples = torch.tensor([sum(i == image for i in index[:s]) for s, image in enumerate(index)])
    q_place = samples[:, None] * queries + torch.arange(queries)
    kv_place = torch.arange(tokens).expand(case.images, tokens)
    options = case.options() | {"dropout": 0.4, "dropout_key": torch.tensor(-5)}

    def call(q, k, v, backend):
        return cross_attention(q, k, v, backend=backend, **options)

    check(call, result, dtype, q_shape, kv_shape, q_place, kv_place)
    kernels = {launch.kernel for launch in launches}
    assert "forward_kernel" in kernels and ("backward_keys_kernel" in kernels) == (result != "out")
