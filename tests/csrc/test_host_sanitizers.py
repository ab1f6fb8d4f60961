"""The CUDA kernels on the host, and the attention for the CPU, under the compiler's sanitizers, and faults
that these must find.
"""

import os
import shutil
import subprocess

import pytest
from harness import host_build

pytestmark = [pytest.mark.compiles, pytest.mark.slow]

BARRIER = "memory[threadIdx.x / kWarp][i] = values[i];\n    __syncthreads();\n"
OVERRUN = "if (octet * kLanes + lane < width) data[lane] = from_float<T>(given.value[lane]);"
FAULTS = {
    "a removed barrier": ("cuda_sums.h", BARRIER, BARRIER.replace("    __syncthreads();\n", "")),
    "an overrun": ("octet.h", OVERRUN, OVERRUN.replace("< width", "<= width")),
    "a barrier removed before sums of lists": (
        "embed_tokens_cuda.cu",
        "lane_of_warp] = sum.value[lane];\n  __syncthreads();\n",
        "lane_of_warp] = sum.value[lane];\n",
    ),
    "a list without an end": (
        "row_sums.h",
        "return entry < count && (!keys",
        "return entry <= count && (!keys",
    ),
    "a shift beyond the word": ("philox.h", "((lane & 1) * 16)", "((lane & 1) * 32)"),
    "a tile without room behind it": (
        "packed_attention_cpu.cpp",
        "rounded_up(a.most_keys) + kTileColumns",
        "rounded_up(a.most_keys)",
    ),
    "a key too many": (
        "packed_attention_cpu.cpp",
        "count += span.count;",
        "count += span.count + 1;",
    ),
}


def run_cases(program, *arguments):
    command = [program, *map(str, arguments)]
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.fixture
def build(tmp_path):
    """Build the program of cases for a sanitizer, with a fault of FAULTS or without."""

    def with_fault(sanitizer, fault=None, attention=False):
        csrc = shutil.copytree(host_build.CSRC, tmp_path / "csrc")
        if fault is not None:
            name, sound, faulty = FAULTS[fault]
            text = (csrc / name).read_text()
            assert text.count(sound) == 1, f"{name} has changed: adapt the fault"
            (csrc / name).write_text(text.replace(sound, faulty))
        if attention:
            return host_build.build_attention_program(tmp_path, sanitizer, csrc)
        return host_build.build_program(tmp_path, sanitizer, csrc, optimised=fault is None)

    return with_fault


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_no_case_is_objected_to(build, sanitizer, seed):
    done = run_cases(build(sanitizer), 4, seed % 1000)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    assert done.stdout.endswith("4 cases\n") and not done.stderr


@pytest.mark.parametrize(
    ("sanitizer", "fault", "width", "said"),
    [
        ("thread", "a removed barrier", 1000, "data race"),
        ("thread", "a barrier removed before sums of lists", 1000, "data race"),
        ("address", "an overrun", 33, "heap-buffer-overflow"),
        ("address", "a list without an end", 4095, "heap-buffer-overflow"),
        ("undefined", "a shift beyond the word", 33, "shift exponent 32 is too large"),
    ],
)
def test_a_planted_fault_is_found(build, sanitizer, fault, width, said):
    done = run_cases(build(sanitizer, fault), 4, 1, width)
    assert done.returncode != 0 and said in done.stderr, done.stdout[-500:] + done.stderr[-2000:]


def test_no_case_of_the_attention_is_objected_to(build, seed):
    done = run_cases(build("address,undefined", attention=True), 200, seed % 1000)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-4000:]
    assert done.stdout == "200 cases\n" and not done.stderr


@pytest.mark.parametrize("fault", ["a tile without room behind it", "a key too many"])
def test_a_planted_fault_of_the_attention_is_found(build, fault):
    done = run_cases(build("address", fault, attention=True), 200, 1)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
