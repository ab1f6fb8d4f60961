"""The fake driver: launches and compilations are recorded, limits and stale kernels raise.

Kernels are launched in processes of their own, by the functions at the top of this file.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.errors import OutOfResources

from harness import fake_driver, interpreter
from harness.fresh_process import call

ARCHITECTURES = sorted(fake_driver.LIMITS)

# -------------------------------------------------------------------------- what runs in the other processes


def copies(arch: int, lengths: list[int], offset: int) -> dict:
    """Launch a copy of each length, the source beginning that many elements into its memory."""
    from harness import toys

    with fake_driver.drive(arch) as recorder:
        for length in lengths:
            source, target = torch.zeros(length + offset), torch.full((length,), 7.0)
            grid = (triton.cdiv(length, 128),)
            toys.copy[grid](source[offset:], target, length, 0, BLOCK=128, num_warps=2)
            assert target.eq(7.0).all()
    return {
        "launches": [
            [made.kernel, made.grid, made.num_warps, made.shared, made.args["length"], made.args["BLOCK"]]
            for made in recorder.launches
        ],
        "compilations": [
            [made.signature, made.constants, sorted(made.divisible), made.metadata.target.arch]
            for made in recorder.compilations
        ],
        "loaded": all(made.asm["cubin"] for made in recorder.compilations),
    }


def all_copies() -> list[dict]:
    # 16 divides the fourth length, and an integer that is 1 becomes a constant.
    return [copies(90, [100, 200], 0), copies(80, [100, 101, 1, 160], 0), copies(80, [100], 1)]


def shared_memory_by_architecture() -> dict[int, list]:
    """Of a product whose operands take 128 KB: what each architecture answers, all in one process."""
    from harness import toys

    answers = {}
    for arch in ARCHITECTURES:
        a, b, out = torch.zeros(128, 256).half(), torch.zeros(256, 128).half(), torch.zeros(128, 128)
        with fake_driver.drive(arch) as recorder:
            try:
                for _ in range(2):
                    toys.product[(1,)](a, b, out, M=128, N=128, K=256, PRECISION="ieee", num_warps=8)
                answers[arch] = ["runs", recorder.launches[-1].shared]
            except OutOfResources as error:
                answers[arch] = [error.name, error.required, error.limit]
        assert [made.metadata.target.arch for made in recorder.compilations] == [arch]
    return answers


def launches_of_a_kept_kernel() -> list[str]:
    """What a compiled kernel says to arguments it was, and was not, compiled for."""
    from harness import toys

    memory = torch.zeros(200)
    x, y = memory[:100], torch.zeros(100)
    said = []
    with fake_driver.drive(90) as recorder:
        kept = toys.copy[(1,)](x, y, 48, 1, BLOCK=64)
        assert kept is toys.copy[(1,)](x, y, 96, 1, BLOCK=64)
        for args in [
            (x, y, 32, 1, 64),
            (memory[1:], y, 32, 1, 64),
            (x.int(), y, 32, 1, 64),
            (x, y, 33, 1, 64),
            (x, y, 2**31, 1, 64),
            (x, y, 32.0, 1, 64),
            (x, y, 32, 2, 64),
            (x, y, 32, 1, 128),
            (x, y, 32, 1),
        ]:
            try:
                kept[(1, 1, 1)](*args)
                said.append("runs")
            except fake_driver.StaleKernel as error:
                said.append(str(error))
    assert len(recorder.compilations) == 1 and len(recorder.launches) == 3
    before = triton.runtime.driver._active
    with fake_driver.drive(80) as other:
        try:
            kept[(1, 1, 1)](x, y, 32, 1, 64)
        except fake_driver.StaleKernel as error:
            said.append(str(error))
        toys.copy[(1,)](x, y, 48, 1, BLOCK=64)
    assert len(other.compilations) == len(other.launches) == 1
    assert triton.runtime.driver._active is before
    return said


def driving_an_interpreted_triton() -> None:
    with interpreter.switched_on(), fake_driver.drive(90):
        pass


def environment(first: int, *, second: str) -> list:
    print("this is not the result")
    return [first, second, os.environ.get("TRITON_INTERPRET"), torch.cuda.is_available(), triton.__version__]


def failing() -> None:
    print("said before")
    raise ValueError("planted")


# -------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def copied() -> list[dict]:
    return call(all_copies)


def test_launches_and_compilations_are_recorded(copied):
    found = copied[0]
    assert found["launches"] == [["copy", [1, 1, 1], 2, 0, 100, 128], ["copy", [2, 1, 1], 2, 0, 200, 128]]
    pointers = {"source_ptr": "*fp32", "target_ptr": "*fp32"}
    signature = pointers | {"length": "i32", "shift": "i32", "BLOCK": "constexpr"}
    divisible = ["shift", "source_ptr", "target_ptr"]
    assert found["compilations"] == [[signature, {"BLOCK": 128}, divisible, 90]]
    assert found["loaded"]


def test_every_recompilation_is_seen(copied):
    lengths, unaligned = copied[1]["compilations"], copied[2]["compilations"]
    assert [made[1] for made in lengths] == [{"BLOCK": 128}, {"length": 1, "BLOCK": 128}, {"BLOCK": 128}]
    assert ["length" in made[2] for made in lengths] == [False, False, True]
    assert [made[2] for made in unaligned] == [["shift", "target_ptr"]]


def test_shared_memory_is_limited_as_on_the_gpu():
    answers = {int(arch): answer for arch, answer in call(shared_memory_by_architecture).items()}
    assert sorted(answers) == ARCHITECTURES
    for arch in (80, 90, 100):
        assert (
            answers[arch][0] == "runs" and 128 * 1024 <= answers[arch][1] <= fake_driver.LIMITS[arch].shared
        )
    for arch in (86, 89, 120):
        kind, required, limit = answers[arch]
        assert (kind, limit) == ("shared memory", 99 * 1024) and required >= 128 * 1024


def test_a_kernel_is_not_launched_on_what_it_was_not_compiled_for():
    assert call(launches_of_a_kept_kernel) == [
        "runs",
        "copy: source_ptr: compiled for multiples of 16, got 4 more than one",
        "copy: source_ptr: compiled for *fp32, got *i32",
        "copy: length: compiled for multiples of 16, got 1 more than one",
        "copy: length: compiled for i32, got 2147483648",
        "copy: length: compiled for i32, got fp32",
        "copy: shift: compiled for the constant 1, got 2",
        "copy: BLOCK: compiled for the constant 64, got 128",
        "copy: expected 5 arguments, got 4",
        "copy: loaded on another GPU, of architecture 90",
    ]


def test_what_cannot_be_driven():
    with pytest.raises(ValueError, match=r"arch: expected one of \[80, .*\], got 75"), fake_driver.drive(75):
        pass
    with pytest.raises(RuntimeError, match="Triton interprets kernels in this process"):
        call(driving_an_interpreted_triton)


def test_a_fresh_process_compiles_and_answers(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert call(environment, 1, second="two") == [1, "two", None, False, triton.__version__]


def test_a_failure_in_a_fresh_process_is_told():
    with pytest.raises(
        RuntimeError, match=r"(?s)failing in a process of its own: 1.*said before.*ValueError: planted"
    ):
        call(failing)

    def local():
        pass

    with pytest.raises(TypeError, match=r"expected one at the top level of a module, got .*local"):
        call(local)
