"""The Triton kernels of self-attention against the reference, in the interpreter."""

import random
from dataclasses import replace

import pytest
import torch
from self_cases import MODES, SelfCase, draw_case, run
from tolerances import assert_yardstick


MODE_IDS = ["queries", "unimodal", "bidirectional", "causal", "pair"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(case: SelfCase, seed: int = 0) -> list[torch.Tensor]:
    tensors = case.tensors(torch.Generator().manual_seed(seed))
    got = run(case, tensors, "triton")
    plain = run(case, tensors, "reference")
    truth = run(case, tensors, "reference", torch.float64)
    for name, *values in zip(("out", "dq", "dk", "dv"), got, plain, truth, strict=True):
        assert values[0].dtype == case.dtype
        assert_yardstick(f"{name} of {case}", *values)
    return got


GRID = [
    SelfCase(modes, 32, tuple([(text, text // 2)] * len(modes)), text, head_dim=head_dim, dtype=dtype)
    for modes in MODES
    for text in (0, 1, 7, 31, 32, 33, 64, 130, 512)
    for head_dim in (16, 32, 64, 80, 128)
    for dtype in DTYPES
    # The rule: every text length with every mask at head dim 64 in the dtype of training, every head dim and
    # every dtype at text length 33; a text of 512 once a mask, since it takes seconds.
    if modes or text == 0
    if (head_dim, dtype) == (64, torch.bfloat16)
    or (text == 33 and (head_dim == 64 or dtype == torch.bfloat16))
    or (not modes and head_dim == 64)
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "case",
    GRID,
    ids=lambda c: f"{'-'.join(m.name for m in c.modes)}-{c.width}-{c.head_dim}-{str(c.dtype)[6:]}",
)
def test_grid(case, dropout):
    heads = 1 if case.width == 512 else 2
    check(replace(case, dropout=dropout, heads=heads))


@pytest.mark.usefixtures("poisoned_memory")
def test_random_cases(kernel_cases, seed):
    rng = random.Random(seed)
    for _ in range(kernel_cases):
        case = draw_case(rng)
        if case.dropout and case.select == "last":
            # Fine for the query side, which is what is selected here.
            assert case.layouts()[1].consecutive
        check(case, rng.randrange(2**31))
