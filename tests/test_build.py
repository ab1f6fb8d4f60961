"""setup.py: what it decides to build, and that it says why where it builds less; what csrc/ uses of torch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_cases import needs_extension
from processes import clean_environment

from blip2_kernels import extension

ROOT = Path(__file__).resolve().parent.parent


def plan(tmp_path, **changes):
    """What setup.py says when it is asked for the package's name."""
    command = [sys.executable, str(ROOT / "setup.py"), "--name"]
    kept = clean_environment(**changes)
    for name in ("CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "BLIP2_KERNELS_BUILD"):
        if name not in changes:
            kept.pop(name, None)
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True)
    return done.returncode, [line for line in done.stderr.splitlines() if "blip2-kernels:" in line], done


@pytest.fixture
def no_tools(tmp_path):
    """A PATH without any compiler."""
    return str(tmp_path)


def test_without_a_compiler_it_installs_and_says_so(tmp_path, no_tools):
    code, said, _ = plan(tmp_path, PATH=no_tools)
    assert code == 0 and len(said) == 1
    assert "installing without the compiled extension: no C++ compiler (c++, g++, clang++)" in said[0]


def test_without_a_compiler_what_is_asked_for_is_refused(tmp_path, no_tools):
    code, _, done = plan(tmp_path, PATH=no_tools, BLIP2_KERNELS_BUILD="cpu")
    assert code == 1 and "BLIP2_KERNELS_BUILD=cpu: no C++ compiler" in done.stderr


def test_without_nvcc(tmp_path, no_tools):
    compiler = Path(no_tools, "c++")
    compiler.symlink_to("/bin/true")
    code, _, done = plan(tmp_path, PATH=no_tools, BLIP2_KERNELS_BUILD="cuda")
    assert code == 1 and "BLIP2_KERNELS_BUILD=cuda: no nvcc" in done.stderr
    code, said, _ = plan(tmp_path, PATH=no_tools)
    assert code == 0 and "building the extension without CUDA: " in said[0]


def test_nothing_is_looked_for_where_nothing_is_wanted(tmp_path):
    code, said, _ = plan(tmp_path, BLIP2_KERNELS_BUILD="0")
    assert code == 0 and said == []


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("", [80, 86, 89, 90]),  # 10.0 too, but this nvcc does not know it
        ("9.0", [90]),
        ("8.0, 9.0a+PTX", [80, "90a", "compute_90a"]),
        ("10.0;", [100]),  # nvcc itself refuses what was asked for
        ("sm_90", "TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0+PTX, got 'sm_90'"),
    ],
    ids=["default", "one", "with PTX", "unknown to nvcc", "another notation"],
)
def test_what_cuda_is_compiled_for(tmp_path, asked, expected):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_80; echo sm_86; echo sm_89; echo sm_90\n")
    nvcc.chmod(0o755)
    show = (
        "import runpy, setuptools, sys\n"
        "setuptools.setup = lambda **options: None\n"
        "print(*runpy.run_path('setup.py')['architecture_flags'](sys.argv[1]))"
    )
    environment = clean_environment(BLIP2_KERNELS_BUILD="0", TORCH_CUDA_ARCH_LIST=asked)
    command = [sys.executable, "-c", show, str(nvcc)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if isinstance(expected, str):
        assert done.returncode == 1 and expected in done.stderr
        return
    flags = [
        f"-gencode=arch={code},code={code}"
        if isinstance(code, str) and code.startswith("compute")
        else f"-gencode=arch=compute_{code},code=sm_{code}"
        for code in expected
    ]
    assert done.stdout.split() == flags, done.stderr


def test_an_unknown_wish(tmp_path):
    code, _, done = plan(tmp_path, BLIP2_KERNELS_BUILD="gpu")
    assert code == 1 and "BLIP2_KERNELS_BUILD: expected 0, cpu or cuda, got 'gpu'" in done.stderr


def included_by(path):
    """What a file of csrc/ includes with <>, directly and through files of csrc/."""
    found = set()
    for quote, name in re.findall(r'#include (["<])([^">]+)', path.read_text()):
        if quote == "<":
            found.add(name)
        elif (path.parent / name).exists():
            found |= included_by(path.parent / name)
    return found


def test_sources_use_the_stable_abi_and_kernels_nothing_of_torch():
    allowed = ("torch/csrc/stable/", "torch/headeronly/")
    sources = sorted((ROOT / "csrc").glob("*.c*"))
    assert len(sources) == 12
    for source in sources:
        used = {name for name in included_by(source) if "/" in name}
        assert all(name.startswith(allowed) for name in used), source
        if source.suffix == ".cu":
            assert not used, source
    for operator in ("add_layer_norm", "bias_gelu", "embed_tokens", "packed_attention"):
        assert not any("/" in name for name in included_by(ROOT / "csrc" / f"{operator}.h"))


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_library_needs_no_cxx_symbol_of_torch():
    """What another torch has under another name, or not at all."""
    command = ["nm", "-D", "--undefined-only", extension.LIBRARY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in done.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in symbols)
    assert [name for name in symbols if re.match(r"_ZN?[A-Z]*(3c10|2at|5torch|8caffe2)", name)] == []


@pytest.mark.slow
def test_a_build_that_fails_does_not_stop_the_installation(tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    arguments = ("build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp"))
    command = [sys.executable, str(ROOT / "setup.py"), "-q", *arguments]
    for wish, expected in (("", 0), ("cpu", 1)):
        env = clean_environment(CXX=str(compiler), BLIP2_KERNELS_BUILD=wish, PATH=os.environ["PATH"])
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
        said = "installing without the compiled extension: its build failed" if not wish else "BUILD=cpu: "
        assert said in done.stderr


@pytest.mark.compiles
@pytest.mark.slow
def test_a_static_cxx_runtime_tells_errors_whole(tmp_path):
    """Compilers without a shared C++ runtime link theirs in silently; torch brings another one."""
    compiler = tmp_path / "static-c++"
    compiler.write_text('#!/bin/sh\nexec c++ "$@" -O0 -static-libstdc++\n')
    compiler.chmod(0o755)
    arguments = ("build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp"))
    command = [sys.executable, str(ROOT / "setup.py"), "-q", *arguments]
    env = clean_environment(CXX=str(compiler), BLIP2_KERNELS_BUILD="cpu", MAX_JOBS="2")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (library,) = (tmp_path / "lib").rglob("_C.abi3.so")
    code = f"import torch; torch.ops.load_library({str(library)!r}); "
    code += "torch.ops.blip2_kernels.bias_gelu.default(torch.zeros(3, 8), torch.zeros(7))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    expected = "RuntimeError: bias: expected float32 [8], got float32 [7]"
    assert done.returncode == 1 and done.stderr.endswith(expected + "\n"), done.stderr[-2000:]
