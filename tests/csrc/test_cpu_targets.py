"""The loops of csrc/ for each instruction set that they are compiled for: results, and machine code.

A processor runs the best it has, so elsewhere the tests see that one only. Here the extension is built once
for each, with the flags it is installed with.
"""

import platform
import re
import shutil
import subprocess
import sys

import pytest
import torch
from compiled_cases import DTYPES, PAIRS, WIDTHS
from harness import host_build
from operator_checks import check_attention, check_embed, check_gelu, check_norm
from processes import clean_environment, made_once

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.slow,
    pytest.mark.skipif(host_build.COMPILER is None, reason="no C++ compiler (c++, g++)"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="its instruction sets are tested here"),
]
RANKS = {"BASELINE": 0, "AVX2": 1, "AVX512": 2}
OPERATORS = ("add_layer_norm", "bias_gelu", "embed_tokens", "packed_attention")


@pytest.fixture(scope="module", params=RANKS)
def built(request, tmp_path_factory):
    """A target's name and the folder of its build: the library in lib, object files in temp."""
    target = request.param

    def build(folder):
        flags = f"-DBLIP2_KERNELS_TARGET={target} -DBLIP2_KERNELS_NAMESPACE=blip2_kernels_{target}"
        command = [sys.executable, "setup.py", "-q", "build_ext", "-b", folder / "lib", "-t", folder / "temp"]
        environment = clean_environment(CXXFLAGS=flags, BLIP2_KERNELS_BUILD="cpu", MAX_JOBS="2")
        done = subprocess.run(command, cwd=host_build.ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    return target, made_once(tmp_path_factory, target, build)


@pytest.fixture(scope="module")
def ops(built):
    """The operators for a target, where this processor runs it."""
    target, folder = built
    here = {"AVX512": 2, "AVX2": 1}.get(torch.backends.cpu.get_cpu_capability(), 0)
    if RANKS[target] > here:
        pytest.skip(f"this processor has no {target}")
    (library,) = (folder / "lib").rglob("_C.abi3.so")
    torch.ops.load_library(str(library))
    return getattr(torch.ops, f"blip2_kernels_{target}")


@pytest.mark.parametrize("dtypes", PAIRS)
def test_rows_with_a_norm_and_gelu(ops, dtypes):
    for width in WIDTHS:
        print(width)
        check_norm(ops, 5, width, dtypes, 0.1)
        check_norm(ops, 3, width, dtypes, 0.0, input_bias=False, apart=True)
        check_gelu(ops, 5, width, dtypes)
        check_gelu(ops, 3, width, dtypes, bias=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings(ops, dtype):
    for width in WIDTHS:
        print(width)
        check_embed(ops, 2, 3, 21, width, dtype, 0.1)
        check_embed(ops, 1, 1, 2, width, dtype, 0.0, embedded=True, apart=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(ops, dtype):
    for head_dim in (1, 16, 33, 64):
        print(head_dim)
        check_attention(ops, 32, [9, 0, 70], head_dim, dtype, 0.1)
        check_attention(ops, 5, [1, 37], head_dim, dtype, 0.0)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_loops_are_vectors_of_their_target(built, operator):
    """Products of the widest registers that the target has, and none of wider ones."""
    target, folder = built
    (object_,) = (folder / "temp").rglob(f"{operator}_cpu.o")
    command = ["objdump", "-d", "--no-show-raw-insn", object_]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    products = {
        register: len(re.findall(rf"\b(?:v?mul|vf(?:n?m(?:add|sub))\d*)ps\b.*%{register}mm", code))
        for register in "xyz"
    }
    widest = "xyz"[RANKS[target]]
    assert products[widest] >= 50, products
    for register in "xyz"[RANKS[target] + 1 :]:
        assert f"%{register}mm" not in code, f"{target} with %{register}mm: {products}"
