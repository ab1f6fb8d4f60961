"""Compiled kernels beyond the budget: the variants it leaves out, and GPUs with little shared memory.

The budget compiles bf16 at head dims 64 and 128, square tiles, with all the backward needs. Here are fp16,
other head dims, 64-bit offsets, tf32, forwards that keep nothing, and rows of which only some attend. On
sm_86 and sm_89 a program has 99 KiB of shared memory: the first configuration of every table must fit there,
or every call on such a GPU would compile twice.
"""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import budget
import shipped
from harness.compile_report import report
from harness.fresh_process import call

from blip2_kernels.ops import launching

pytestmark = [pytest.mark.compiles, pytest.mark.slow]

ARCH = 90
VARIANTS = (
    "fp16",
    "head dim 16",
    "head dim 32",
    "head dim 80",
    "64-bit offsets",
    "tf32",
    "nothing kept",
    "some rows attend",
)

# -------------------------------------------------------------------------- what runs in the other processes


def figures_of_variant(variant: str) -> list[tuple[str, int, int, int]]:
    """[kernel, bytes of stack, accesses to it in loops, tensor-core instructions] of all kernels of both
    attentions."""
    dtype = {"fp16": torch.float16, "tf32": torch.float32}.get(variant, torch.bfloat16)
    head_dim = int(variant.split()[-1]) if variant.startswith("head dim") else 64
    kind = (dtype, head_dim)
    if variant == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    wide = variant == "64-bit offsets"
    some = {"q_queries": 0, "q_longest": 1, "unimodal_q_longest": 1} if variant == "some rows attend" else {}
    backward = variant != "nothing kept"
    with mock.patch.object(launching, "wide", lambda *tensors: wide), budget._gpu(ARCH) as recorder:
        for rows in (32, 64, 1024):
            if backward:
                shipped.self_call(kind, rows, 0.1, True, **some)
            shipped.self_call(kind, rows, 0.1, False, need_backward=int(backward), **some)
        for chunks in ("one", "many", "split"):
            shipped.cross_forward_call(kind, 0.1, chunks, backward)
        if backward:
            for grouped in (False, True):
                shipped.cross_backward_call(kind, 0.1, grouped)
        found = [report(made) for made in recorder.compilations]
    return [(made.kernel, made.stack_bytes, made.local_in_loops, made.tensor_core) for made in found]


def misfits(arch: int, op: str) -> tuple[int, list[str]]:
    """How many first configurations of an op were tried on a GPU, and the names of those that do not fit."""
    names, missing = 0, []
    for item in shipped.shipped(arch):
        if not item.name.startswith(op) or not _first(item, arch):
            continue
        names += 1
        if not budget.compiled(item, arch).asm:
            missing.append(item.name)
    return names, missing


def _first(item: shipped.Shipped, arch: int) -> bool:
    """Whether it is what a table gives first. Dropout takes more than none, and a large tile than a small."""
    if " tile " in item.name:
        return item.name.endswith("dropout") and not item.name.split(" tile ")[1].startswith("16x")
    for table, config in item.tables:
        rows = table.default | table.architectures.get(arch, {})
        if config not in [configs[0] for configs in rows.values()]:
            return False
    return "dropout" in item.name or not item.name.startswith(("self", "cross"))


# -------------------------------------------------------------------------------------------------- the tests

FORWARD = {"forward_kernel"}
SPILLED = {("64-bit offsets", "forward_kernel"): 64}
"""Bytes of stack that are known and let pass: addresses of 64 bits take twice the registers, and only
tensors of 2**31 elements and more have them."""
ALL = FORWARD | {"backward_tile_kernel", "backward_rows_kernel", "backward_keys_kernel"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_compiles_to_tensor_cores_without_a_stack(variant):
    figures = call(figures_of_variant, variant)
    with_products = {kernel for kernel, *_ in figures} - {"group_kernel", "merge_kernel"}
    assert with_products == (FORWARD if variant == "nothing kept" else ALL)
    for kernel, stack, in_loops, tensor_core in figures:
        few = budget.FEW_BYTES if variant == "tf32" else 0
        assert stack <= SPILLED.get((variant, kernel), few), kernel
        assert variant != "tf32" or in_loops == 0, kernel
        assert tensor_core or kernel not in with_products, kernel


@pytest.mark.architectures(86, 89)
@pytest.mark.parametrize("op", ["self", "cross", "latent", "similarity"])
def test_the_first_configurations_fit_in_99_kib(arch, op):
    tried, missing = call(misfits, arch, op)
    assert tried >= 18
    assert not missing
