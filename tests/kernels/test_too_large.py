"""Configurations that do not fit a GPU: the next one serves, with the same results, or all are named."""

import cross_cases
import pytest
import self_cases
import torch
from cross_cases import CrossCase
from self_cases import B, C, SelfCase, U
from tolerances import assert_yardstick
from triton.runtime.errors import OutOfResources

from blip2_kernels.ops import launching
from blip2_kernels.ops.cross_attention import launch as cross_launch
from blip2_kernels.ops.self_attention import launch as self_launch

HALF = torch.float16


@pytest.fixture
def refused(monkeypatch):
    """Which launches do not fit, and which were tried.

    Set `refused.where` to a function of a kernel's name, its constants and its configuration.
    """

    class Refused:
        def __init__(self):
            self.where = lambda kernel, constants, config: False
            self.tried, self.constants = [], []

    found, launch = Refused(), launching.launch

    def refuse(kernel, grid, args, constants, config):
        name = getattr(kernel, "fn", kernel).__name__
        found.tried.append((name, config))
        found.constants.append(constants)
        if found.where(name, constants, config):
            raise OutOfResources(300_000, 101_376, "shared memory")
        launch(kernel, grid, args, constants, config)

    monkeypatch.setattr(launching, "launch", refuse)
    monkeypatch.setattr(launching, "_too_large", {})
    return found


def check(module, case):
    tensors = case.tensors(torch.Generator().manual_seed(0))
    got, plain = (module.run(case, tensors, backend) for backend in ("triton", "reference"))
    truth = module.run(case, tensors, "reference", torch.float64)
    for name, *values in zip(("out", "dq", "dk", "dv"), got, plain, truth, strict=True):
        assert_yardstick(f"{name} of {case}", *values)
    return got


def tried(refused, kernel, number):
    """The block sizes of a kernel's launches so far, by one of their names."""
    return [config[number] for name, config in refused.tried if name == kernel]


ONE_TILE = {
    "queries": SelfCase((), lengths=(), head_dim=16, dtype=HALF),
    "joint": SelfCase((B,), 32, ((9, 31),), 31, head_dim=16, dtype=torch.bfloat16),
    "pair with dropout": SelfCase((U, C), 5, ((40, 9),) * 2, 40, head_dim=16, dtype=HALF, dropout=0.2),
    "rows attend alone": SelfCase((U, C), 5, ((40, 9),) * 2, 40, select="first", head_dim=16, dtype=HALF),
    "fp32": SelfCase((B,), 5, ((9, 3),), 9, head_dim=16),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", ONE_TILE.values(), ids=ONE_TILE)
def test_a_forward_tile_that_does_not_fit_goes_by_blocks(case, refused):
    refused.where = lambda kernel, constants, config: bool(constants.get("ONE_TILE"))
    check(self_cases, case)
    kernels = [kernel for kernel, _ in refused.tried]
    assert kernels == ["forward_kernel", "forward_kernel", "backward_tile_kernel"]
    block = self_launch.FORWARD.configs(0, self_launch.block_key(case.dtype, case.head_dim))[0]
    assert refused.tried[1][1] is block


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", ONE_TILE.values(), ids=ONE_TILE)
def test_a_backward_tile_that_does_not_fit_goes_by_blocks(case, refused):
    """A tile's forward keeps no log-sum-exp, so the forward runs by blocks first."""
    refused.where = lambda kernel, constants, config: kernel == "backward_tile_kernel"
    check(self_cases, case)
    blocks = ["forward_kernel", "backward_rows_kernel", "backward_keys_kernel"]
    assert [kernel for kernel, _ in refused.tried] == ["forward_kernel", "backward_tile_kernel", *blocks]
    assert not refused.constants[2]["ONE_TILE"]
    refused.tried.clear()
    check(self_cases, case)
    assert [kernel for kernel, _ in refused.tried] == ["forward_kernel", *blocks]
    refused.where = lambda kernel, constants, config: kernel.startswith("backward")
    with pytest.raises(RuntimeError, match=r"self_attention_backward: expected .*SLICE=.*BLOCK_M="):
        check(self_cases, case)


SHARED = CrossCase((0, 1, 1, 1, 1, 1), 6, 2, 40, heads=1, head_dim=16, dtype=HALF)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_rows_kernel", "backward_keys_kernel"])
def test_cross_attention_takes_the_next_tile(kernel, refused):
    kind = cross_launch.key(HALF, 16)
    table = {
        "forward_kernel": cross_launch.FORWARD,
        "backward_rows_kernel": cross_launch.BACKWARD_SHARED,
        "backward_keys_kernel": cross_launch.BACKWARD_KEYS,
    }[kernel]
    configs = table.configs(0, kind)
    refused.where = lambda name, constants, config: name == kernel and config is configs[0]
    check(cross_cases, SHARED)
    assert [config for name, config in refused.tried if name == kernel] == [configs[0], configs[1]]
    # What did not fit once is not tried again.
    refused.tried.clear()
    check(cross_cases, SHARED)
    assert [config for name, config in refused.tried if name == kernel] == [configs[1]]
    refused.where = lambda name, constants, config: name == kernel
    with pytest.raises(RuntimeError, match="expected a launch configuration that fits this device, tried"):
        check(cross_cases, SHARED)


@pytest.mark.usefixtures("poisoned_memory")
def test_a_merge_that_does_not_fit_takes_the_forward_s_next_tile(refused, monkeypatch):
    """It has the rows of the forward's tile: with fewer, both are launched again."""
    monkeypatch.setattr(launching, "processors", lambda device: 10_000)
    case = CrossCase((0, 1, 1), 3, 2, 600, heads=1, head_dim=16, dtype=HALF)
    configs = cross_launch.FORWARD.configs(0, cross_launch.key(HALF, 16))
    rows = [config["BLOCK_M"] for config in configs]
    refused.where = lambda kernel, constants, config: (
        kernel == "merge_kernel" and config["BLOCK_M"] == rows[0]
    )
    check(cross_cases, case)
    assert tried(refused, "merge_kernel", "BLOCK_M") == rows
    assert tried(refused, "forward_kernel", "BLOCK_M") == rows
    assert rows[-1] < rows[0]


def test_what_does_not_fit_one_dtype_or_head_may_fit_another(refused):
    """Equal configurations stand in several rows of a table."""
    wide = SelfCase((B,), 5, ((140,),), 140, heads=1, head_dim=128, dtype=HALF)
    narrow = SelfCase((B,), 5, ((140,),), 140, heads=1, head_dim=64, dtype=HALF)
    first, second = (
        self_launch.FORWARD.configs(0, self_launch.block_key(HALF, head_dim))[0] for head_dim in (128, 64)
    )
    assert first == second
    refused.where = lambda kernel, constants, config: constants["HEAD_DIM"] == 128 and config["BLOCK_M"] > 32
    check(self_cases, wide)
    assert tried(refused, "forward_kernel", "BLOCK_M") == [64, 32]
    refused.tried.clear()
    check(self_cases, narrow)
    assert tried(refused, "forward_kernel", "BLOCK_M") == [64]
