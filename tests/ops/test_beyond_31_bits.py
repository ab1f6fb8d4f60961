"""The compiled operators on more than 2^31 elements: every address on the CPU is computed in 64 bits.

What is read is one row over and over, so memory holds results alone. The CUDA kernels' addresses are tested
in tests/csrc/test_far_rows.py.
"""

from pathlib import Path

import pytest
import torch
from compiled_cases import needs_extension

pytestmark = [pytest.mark.slow, needs_extension]
WIDTH = 4096
ROWS = (1 << 31) // WIDTH + 3
LOOKED_AT = [0, 1, ROWS // 2, ROWS - 4, ROWS - 3, ROWS - 1]


def needs_memory(gigabytes):
    """Skip where so much is not free."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    free = next((int(line.split()[1]) >> 20 for line in lines if line.startswith("MemAvailable")), 0)
    if free < gigabytes:
        pytest.skip(f"{gigabytes} GiB of memory are needed, {free} are free")


def row():
    return torch.randn(1, WIDTH).bfloat16()


def assert_each_is(big, small):
    assert big.shape == (ROWS, WIDTH)
    for place in LOOKED_AT:
        assert torch.equal(big[place], small[0]), place


def test_bias_gelu():
    needs_memory(6)
    ops = torch.ops.blip2_kernels
    x, grad = row(), row()
    assert_each_is(ops.bias_gelu(x.expand(ROWS, -1), None), ops.bias_gelu(x, None))
    dx, _ = ops.bias_gelu_backward(grad.expand(ROWS, -1), x.expand(ROWS, -1), None)
    assert_each_is(dx, ops.bias_gelu_backward(grad, x, None)[0])


def test_add_layer_norm():
    needs_memory(6)
    ops = torch.ops.blip2_kernels
    x, residual, grad = row(), row(), row()
    weight, bias = row()[0], row()[0]
    rest, drop = (weight, bias, None, 1e-5), (0.0, None, None, 0)
    out, mean, rstd = ops.add_layer_norm(x, residual, *rest, *drop)
    big = ops.add_layer_norm(x.expand(ROWS, -1), residual.expand(ROWS, -1), *rest, *drop)[0]
    assert_each_is(big, out)
    del big
    dx = ops.add_layer_norm_backward(grad, x, residual, weight, None, mean, rstd, *drop)[0]
    rows = (t.expand(ROWS, -1) for t in (grad, x, residual))
    statistics = (t.expand(ROWS).contiguous() for t in (mean, rstd))
    assert_each_is(ops.add_layer_norm_backward(*rows, weight, None, *statistics, *drop)[0], dx)


def test_embed_tokens():
    """The backward keeps gradients of rows in fp32 and adds them up: of three that are not 0, two are far."""
    needs_memory(10)
    ops = torch.ops.blip2_kernels
    queries, grad, weight, bias = row(), row(), row()[0], row()[0]
    tables, drop = (queries, None, None, None, None), (0.0, None, None, 0)
    out, mean, rstd = ops.embed_tokens_forward(*tables, 1, weight, bias, 1e-5, *drop, None)
    big = ops.embed_tokens_forward(*tables, ROWS, weight, bias, 1e-5, *drop, None)[0]
    assert_each_is(big, out)
    del big
    few = torch.zeros(ROWS, dtype=torch.float32)
    few[[0, -3, -1]] = rstd
    dqueries = ops.embed_tokens_backward(
        grad.expand(ROWS, -1),
        *tables,
        ROWS,
        None,
        None,
        -1,
        weight,
        mean.expand(ROWS).contiguous(),
        few,
        *drop,
    )[0]
    single = ops.embed_tokens_backward(
        grad.expand(3, -1),
        *tables,
        3,
        None,
        None,
        -1,
        weight,
        mean.expand(3).contiguous(),
        rstd.expand(3),
        *drop,
    )[0]
    assert torch.equal(dqueries, single)
