"""The budget file names what is shipped and breaks no rule, and a few kernels are still as recorded.

`python tests/kernels/budget.py` compares them all, in minutes.
"""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("triton")

import budget
from harness.fresh_process import call

pytestmark = pytest.mark.compiles

FEW = (
    "self forward half narrow tile 64x64, dropout",
    "self backward half narrow tile 64x64, dropout",
    "self forward fp32 narrow tile 32x32",
    "cross group",
)
"""Compiled in the normal run, with what `first_of` finds."""
FIRST = (
    "self backward keys half narrow",
    "cross forward half narrow",
    "cross backward shared half narrow",
    "cross merge half narrow",
)

# -------------------------------------------------------------------------- what runs in the other processes


def measure_few(arch: int, names: list[str]) -> dict[str, dict[str, int]]:
    """Figures of some of what is shipped."""
    items = {item.name: item for item in budget.shipped(arch)}
    return {name: budget.measure(items[name], arch) for name in names}


def measure_faults() -> list[dict[str, int]]:
    """Figures of planted configurations: one that spills, one too large for its GPU."""
    from blip2_kernels.ops.launching import Config
    from blip2_kernels.ops.self_attention import launch

    items = {item.name.split(" blocks ")[0]: item for item in budget.shipped(90) if " blocks " in item.name}
    found = []
    for name, table, config, arch in (
        ("self backward keys half wide", launch.BACKWARD, Config.of(4, 1, BLOCK_M=64, BLOCK_N=128), 80),
        (
            "self forward half wide",
            launch.FORWARD,
            Config.of(8, 4, BLOCK_M=128, BLOCK_N=128, TEXT_M=128, TEXT_N=128),
            86,
        ),
    ):
        item = dataclasses.replace(items[name], tables=((table, config),))
        found.append(budget.measure(item, arch))
    return found


# -------------------------------------------------------------------------------------------------- the tests


def test_the_file_names_what_is_shipped():
    recorded, expected = budget.read(), budget.targets()
    assert set(max(recorded.values(), key=len)) == set(expected)
    for version, entries in recorded.items():
        for target, figures in entries.items():
            assert list(figures) == expected[target], f"{version} {target}: run budget.py --write"
            assert len(set(expected[target])) == len(expected[target])


def test_no_recorded_kernel_breaks_a_rule():
    broken = [
        f"{version} {target} {problem}"
        for version, entries in budget.read().items()
        for target, figures in entries.items()
        for name, found in figures.items()
        for problem in budget.broken_rules(name, found, target, version)
    ]
    assert not broken


def test_what_is_excused_is_what_was_recorded():
    recorded = budget.read()
    for (version, target, name), stack in budget.EXCUSED.items():
        assert recorded[version][target][name]["stack"] == stack > 0, name
    for target, start in budget.ONE_RESIDENT:
        found = [targets[target] for targets in recorded.values()]
        resident = [f["resident"] for table in found for name, f in table.items() if name.startswith(start)]
        assert min(resident) == 1, start


def test_the_document_says_how_many_programs_are_resident():
    text = Path(__file__).parents[2].joinpath("docs", "kernels.md").read_text()
    assert budget.resident_table(budget.read()) in text, "run budget.py --resident"


def test_what_is_worse_than_recorded_is_named():
    recorded = {"registers": 100, "stack": 0, "shared": 1024, "tensor_core": 16, "warps": 4, "resident": 5}
    recorded["atomics"] = 0
    assert budget.worse("k", recorded, recorded) == []
    assert budget.worse("k", recorded | {"registers": 104, "shared": 512, "tensor_core": 8}, recorded) == []
    for change, said in (
        ({"registers": 105}, "k: 105 registers, recorded are 100"),
        ({"stack": 8}, "k: 8 stack, recorded are 0"),
        ({"shared": 1025}, "k: 1025 shared, recorded are 1024"),
        ({"tensor_core": 0}, "k: no tensor-core instructions, recorded are 16"),
        ({"atomics": 1}, "k: 1 atomics, recorded are 0"),
    ):
        assert budget.worse("k", recorded | change, recorded) == [said]
    for name, change, broken in (
        ("self forward half narrow", {"tensor_core": 0}, True),
        ("self forward fp32 narrow", {"tensor_core": 0}, False),
        ("self forward half narrow", {"stack": 8}, True),
        ("self forward fp32 narrow", {"stack": 8, "stack_in_loops": 0}, False),
        ("self forward fp32 narrow", {"stack": 8, "stack_in_loops": 2}, True),
        ("self forward fp32 narrow", {"stack": 40, "stack_in_loops": 0}, True),
        ("self forward fp32 narrow", {"stack": 8, "stack_in_loops": 0, "registers": 255}, True),
        ("self forward fp32 narrow", {"resident": 0}, True),
        ("self forward half narrow", {"resident": 1}, True),
        ("self backward half narrow", {"resident": 1}, False),
        ("self forward fp32 narrow", {"atomics": 1}, True),
        ("latent scores half", {"atomics": 1}, False),
        ("latent softmax half", {"tensor_core": 0}, False),
    ):
        assert bool(budget.broken_rules(name, recorded | change, "sm_90")) == broken, (name, change)


@pytest.mark.slow
def test_a_few_kernels_are_as_recorded():
    names = [item.name for item in budget.shipped(90)]
    few = [*FEW, *(next(n for n in names if n.startswith(first) and "dropout" in n) for first in FIRST[:-1])]
    few.append(next(n for n in names if n.startswith(FIRST[-1])))
    recorded = budget.read().get(budget.VERSION, {}).get("sm_90", {})
    for name, figures in call(measure_few, 90, few).items():
        assert budget.broken_rules(name, figures, "sm_90") == []
        if name in recorded:
            assert budget.worse(name, figures, recorded[name]) == []


@pytest.mark.slow
def test_planted_configurations_break_the_rules():
    spilling, too_large = call(measure_faults)
    assert "bytes of stack" in budget.broken_rules("self backward", spilling, "sm_80")[0]
    assert too_large["resident"] == 0
    assert "does not fit" in budget.broken_rules("self forward half", too_large, "sm_86")[0]
