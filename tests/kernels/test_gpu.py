"""The kernels on a GPU: `pytest -m gpu`. Skipped where there is none."""

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cross_cases
import pytest
import self_cases
import torch
from cross_cases import CrossCase
from self_cases import C, SelfCase, U
from test_cross_attention_kernels import GRID as CROSS_GRID
from test_self_attention_kernels import GRID as SELF_GRID
from tolerances import assert_yardstick

from blip2_kernels.device_errors import check_device_errors
from blip2_kernels.layout import TokenLayout
from blip2_kernels.mask import AttentionMask
from blip2_kernels.ops import (
    cross_attention,
    image_text_similarity,
    latent_attention,
    launching,
    self_attention,
)

pytestmark = pytest.mark.gpu
GPU = {"device": "cuda"}
PAIR = SelfCase((U, C), 32, ((20, 3, 31),) * 2, heads=12, dtype=torch.bfloat16, dropout=0.1, **GPU)
SHARED = CrossCase((0, 1, 0, 1, 1, 1, 1), 7, 3, 257, heads=12, dtype=torch.bfloat16, dropout=0.1, **GPU)
BLOCKS = SelfCase((U, C), 32, ((130, 3),) * 2, 130, heads=2, dtype=torch.bfloat16, dropout=0.1, **GPU)
LONG = CrossCase((0, 1, 0), 3, 2, 1100, heads=2, dtype=torch.bfloat16, dropout=0.1, **GPU)


def check(module, case) -> None:
    tensors = case.tensors(torch.Generator().manual_seed(0))
    got = module.run(case, tensors, "triton")
    plain = module.run(case, tensors, "reference")
    truth = module.run(case, tensors, "reference", torch.float64)
    for name, *values in zip(("out", "dq", "dk", "dv"), got, plain, truth, strict=True):
        assert_yardstick(f"{name} of {case}", *values)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("number", range(len(SELF_GRID)))
def test_self_attention_grid(number, dropout):
    check(self_cases, replace(SELF_GRID[number], dropout=dropout, heads=12, **GPU))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("number", range(len(CROSS_GRID)))
def test_cross_attention_grid(number, dropout):
    check(cross_cases, replace(CROSS_GRID[number], dropout=dropout, heads=12, **GPU))


@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("module", [self_cases, cross_cases], ids=["self", "cross"])
def test_random_cases(module, part, kernel_cases, seed):
    """In ten parts, which processes can share: it is compiling that takes the time."""
    rng = random.Random(seed)
    for _ in range(kernel_cases):
        check(module, replace(module.draw_case(rng), **GPU))


@pytest.mark.parametrize("module, case", [(self_cases, PAIR), (cross_cases, SHARED)], ids=["self", "cross"])
def test_a_thousand_runs_give_the_same_bits(module, case):
    tensors = case.tensors(torch.Generator().manual_seed(0))
    first = module.run(case, tensors, "triton")
    for _ in range(1000):
        for a, b in zip(first, module.run(case, tensors, "triton"), strict=True):
            assert torch.equal(a, b)


def test_a_sample_s_bits_do_not_depend_on_how_its_image_is_shared():
    case = replace(SHARED, dropout=0.0)
    q, k, v = case.tensors(torch.Generator().manual_seed(0))
    index = case.options()["image_index"]
    whole = cross_attention(q, k, v, image_index=index, backend="triton")
    alone = cross_attention(q, k[index.long()], v[index.long()], backend="triton")
    assert torch.equal(whole, alone)


@pytest.mark.parametrize("module, case", [(self_cases, PAIR), (cross_cases, SHARED)], ids=["self", "cross"])
def test_a_stream_of_one_s_own(module, case):
    tensors = case.tensors(torch.Generator().manual_seed(0))
    first = module.run(case, tensors, "triton")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        other = module.run(case, tensors, "triton")
    torch.cuda.synchronize()
    for a, b in zip(first, other, strict=True):
        assert torch.equal(a, b)


def test_both_attentions_in_one_cuda_graph():
    """Captured once, replayed on other inputs: another image_index, another dropout key."""
    layout = PAIR.layouts()[0]
    q, k, v = PAIR.tensors(torch.Generator().manual_seed(0))
    images = SHARED.tensors(torch.Generator().manual_seed(0))
    index, key = SHARED.options()["image_index"], torch.tensor(5, device="cuda")

    def both():
        options = {"dropout": 0.1, "dropout_key": key, "backend": "triton"}
        one = self_attention(q, k, v, layout, layout, AttentionMask(PAIR.modes), **options)
        return one, cross_attention(*images, image_index=index, **options)

    with torch.cuda.stream(torch.cuda.Stream()):
        both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    index.copy_(index.flip(0))
    key.fill_(77)
    q.mul_(0.5)
    graph.replay()
    for a, b in zip(captured, both(), strict=True):
        assert torch.equal(a, b)


def test_no_synchronisation_in_a_call():
    tensors = SHARED.tensors(torch.Generator().manual_seed(0))
    cross_cases.run(SHARED, tensors, "triton")
    options = SHARED.options()
    leaves = [t.requires_grad_() for t in tensors]
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_attention(*leaves, backend="triton", **options).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_wrong_index_raises_where_the_host_waits_anyway():
    q, k, v = SHARED.tensors(torch.Generator().manual_seed(0))
    wrong = torch.full_like(SHARED.options()["image_index"], 99)
    assert torch.isfinite(cross_attention(q, k, v, image_index=wrong, backend="triton")).all()
    with pytest.raises(IndexError, match="image_index"):
        TokenLayout.from_attention_masks(2, [torch.ones(2, 3, device="cuda")])
    check_device_errors()
    with pytest.raises(ValueError, match="image_index"):
        cross_attention(q, k, v, image_index=wrong, backend="triton", validate=True)


@pytest.mark.parametrize("what", ["blocks", "looped chunks", "split chunks", "latent", "similarity"])
def test_kernels_for_the_sanitizer(what, monkeypatch):
    """One call each of kernels that the tests of streams do not launch; of the numbers nothing is asked."""
    if what == "blocks":
        results = self_cases.run(BLOCKS, BLOCKS.tensors(torch.Generator().manual_seed(0)), "triton")
    elif what.endswith("chunks"):
        monkeypatch.setattr(launching, "processors", lambda device: 1 if what == "looped chunks" else 10_000)
        results = cross_cases.run(LONG, LONG.tensors(torch.Generator().manual_seed(0)), "triton")
    elif what == "latent":
        q, features = torch.randn(2, 96, 1408, **GPU).bfloat16(), torch.randn(2, 257, 1408, **GPU).bfloat16()
        results = [latent_attention(q, features, scale=0.125, backend="triton")]
    else:
        leaves = [torch.randn(shape, **GPU).requires_grad_() for shape in ((5, 32, 256), (33, 256))]
        out = image_text_similarity(*leaves, backend="triton")
        results = [out, *torch.autograd.grad(out.sum(), leaves)]
    torch.cuda.synchronize()
    assert all(torch.isfinite(t).all() for t in results)


OVERRUN = """
import torch, triton, triton.language as tl

@triton.jit
def overrun(ptr, n: tl.constexpr):
    tl.store(ptr + tl.arange(0, n), 1.0)

overrun[(1,)](torch.empty(8, device="cuda"), 1 << 20)
torch.cuda.synchronize()
"""
RACE = """
import torch

SOURCE = r'''
extern "C" __global__ void race(float* out) {
    __shared__ float held[256];
    held[threadIdx.x] = threadIdx.x;
    // No barrier: a thread of another warp may not have written yet.
    out[threadIdx.x] = held[255 - threadIdx.x];
}
'''
race = torch.cuda._compile_kernel(SOURCE, "race")
race((1, 1, 1), (256, 1, 1), [torch.empty(256, device="cuda")])
torch.cuda.synchronize()
"""
"""Faults that a tool has to see, or its silence elsewhere says nothing."""


def sanitize(tool: str, *command: str) -> subprocess.CompletedProcess:
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    return subprocess.run(
        ["compute-sanitizer", *options, sys.executable, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=Path(__file__).parent.parent.parent,
    )


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_is_clean(tool):
    chosen = "stream or depend or for_the_sanitizer"
    done = sanitize(tool, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize(("tool", "source"), [("memcheck", OVERRUN), ("racecheck", RACE)])
def test_compute_sanitizer_sees_a_planted_fault(tool, source, tmp_path):
    script = tmp_path / "fault.py"
    script.write_text(source)
    assert sanitize(tool, str(script)).returncode == 9
