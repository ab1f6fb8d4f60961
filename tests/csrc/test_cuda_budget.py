"""The committed budget of the CUDA kernels breaks no rule; where there is nvcc, they are compiled again."""

import json

import cuda_budget
import pytest

RECORDED = json.loads(cuda_budget.FILE.read_text())


def test_no_recorded_kernel_breaks_a_rule():
    assert set(RECORDED) == {f"sm_{number}" for number in cuda_budget.ARCHITECTURES}
    for target, kernels in RECORDED.items():
        assert len(kernels) == len(RECORDED["sm_80"]) > 60
        for name, figures in kernels.items():
            assert cuda_budget.problems(name, figures, figures) == [], target


def test_what_is_worse_is_named():
    good = {
        "registers": 100,
        "stack": 0,
        "shared": 64,
        "spills": 0,
        "loads_128": 4,
        "stores_128": 2,
        "atomics": 0,
    }
    assert cuda_budget.problems("k", good | {"registers": 104}, good) == []
    for change in ({"registers": 106}, {"spills": 1}, {"loads_128": 0}, {"atomics": 1}, {"shared": 65}):
        assert cuda_budget.problems("k", good | change, good), change
    assert cuda_budget.problems("k", good, None)


@pytest.mark.compiles
@pytest.mark.slow
@pytest.mark.skipif(
    cuda_budget.nvcc() is None or cuda_budget.cuobjdump() is None, reason="no nvcc or no cuobjdump"
)
@pytest.mark.architectures(*cuda_budget.ARCHITECTURES)
def test_kernels_are_as_recorded(arch):
    measured = cuda_budget.measure(arch)
    recorded = RECORDED[f"sm_{arch}"]
    wrong = [p for name, f in measured.items() for p in cuda_budget.problems(name, f, recorded.get(name))]
    assert not wrong and set(measured) == set(recorded)
