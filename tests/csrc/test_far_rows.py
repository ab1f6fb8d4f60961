"""CUDA kernels on tensors of more than 2^31 elements, in simulation.

The last blocks of the grids run, in memory that is there only where they touch it.
"""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_yardstick

pytestmark = [pytest.mark.compiles, pytest.mark.slow]
WIDTH = 4096
ROWS = (1 << 31) // WIDTH + 3
TAIL = ROWS // -(-ROWS // 64)
"""Rows of the last of the parts that the rows fall into."""
BLOCKS = 16
"""Of a grid's side that runs along the channels: all there are."""
DROP = (0.0, None, None, 0)


@pytest.fixture
def far_end(on_host, run_last_blocks):
    """The operators, and a tensor [ROWS, WIDTH] with numbers in its last rows."""

    def draw(dtype):
        room = torch.empty(ROWS, WIDTH, dtype=dtype)
        room[-TAIL:] = torch.randn(TAIL, WIDTH).to(dtype)
        return room

    return on_host, run_last_blocks, draw


def check(function, inputs, grad, vectors, out, gradients, count=TAIL):
    """The last `count` rows of results against those of the plain function, and both against the truth."""
    results = {}
    for dtype in (inputs[0].dtype, torch.float64):
        leaves = [t[-count:].to(dtype, copy=True).requires_grad_() for t in inputs]
        plain = function(*leaves, *(v.to(dtype) for v in vectors))
        results[dtype] = [plain.detach(), *torch.autograd.grad(plain, leaves, grad[-count:].to(dtype))]
    for name, got, *expected in zip(("out", "d0", "d1"), [out, *gradients], *results.values(), strict=False):
        assert_yardstick(name, got[-count:], *expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_layer_norm(far_end, dtype):
    ops, run_last_blocks, draw = far_end
    x, residual, grad = draw(dtype), draw(dtype), draw(dtype)
    weight, bias = torch.randn(WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    run_last_blocks(TAIL)
    out, mean, rstd = ops.add_layer_norm(x, residual, weight, bias, None, 1e-5, *DROP)
    run_last_blocks(1)
    dx, *_ = ops.add_layer_norm_backward(grad, x, residual, weight, None, mean, rstd, *DROP)

    def plain(x, residual, weight, bias):
        return F.layer_norm(x + residual, (WIDTH,), weight, bias, 1e-5)

    check(plain, [x, residual], grad, [weight, bias], out, [dx, dx])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_gelu(far_end, dtype):
    ops, run_last_blocks, draw = far_end
    x, grad = draw(dtype), draw(dtype)
    run_last_blocks(BLOCKS)
    out = ops.bias_gelu(x, None)
    dx, _ = ops.bias_gelu_backward(grad, x, None)
    check(F.gelu, [x], grad, [], out, [dx])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embed_tokens(far_end, dtype):
    """Queries that are each sample's own: a table as long as the rows."""
    ops, run_last_blocks, draw = far_end
    queries, grad = draw(dtype), draw(dtype)
    weight, bias = torch.randn(WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    tables = (queries, None, None, None, None, ROWS)
    run_last_blocks(TAIL)
    out, mean, rstd = ops.embed_tokens_forward(*tables, weight, bias, 1e-5, *DROP, None)
    run_last_blocks(BLOCKS)
    rest = (None, None, -1, weight, mean, rstd, *DROP)
    dqueries, *_ = ops.embed_tokens_backward(grad, *tables, *rest)

    def plain(queries, weight, bias):
        return F.layer_norm(queries, (WIDTH,), weight, bias, 1e-5)

    check(plain, [queries], grad, [weight, bias], out, [dqueries], BLOCKS)
