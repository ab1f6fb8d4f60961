"""What every test gets: a seed of its own that is printed, and a skip where a GPU is needed and absent."""

import importlib
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: more than one thread each would only make them wait for one another.
    torch.set_num_threads(1)

CASES_A_TEST = 50
"""Random cases of a kernel that one test draws at most."""


BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch) -> SimpleNamespace:
    """Modules of bench/ by name, as they import one another."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = (
        "attention_peers",
        "bench_attention",
        "cases",
        "cores",
        "in_step",
        "measure",
        "readings",
        "report",
    )
    return SimpleNamespace(**{n: importlib.import_module(n) for n in (*names, "rounds", "rows", "runner")})


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="another draw for every random test (default 0)")
    parser.addoption("--kernel-cases", type=int, default=25, help="random cases a kernel (default 25)")
    parser.addoption(
        "--every-architecture", action="store_true", help="compile for all GPUs of a test, not for its first"
    )
    parser.addoption("--other-python", help="an interpreter with another torch: the wheel is tried there too")


def pytest_generate_tests(metafunc):
    """`kernel_cases`: how many random cases a test draws. Many are shared out, to run side by side.

    `arch`: the GPU architectures that the marker `architectures` names, the first one alone by default.
    """
    named = metafunc.definition.get_closest_marker("architectures")
    if named is not None:
        every = metafunc.config.getoption("--every-architecture")
        metafunc.parametrize("arch", named.args if every else named.args[:1])
    if "kernel_cases" in metafunc.fixturenames:
        wanted = metafunc.config.getoption("--kernel-cases")
        full, rest = divmod(wanted, CASES_A_TEST)
        shares = [CASES_A_TEST] * full + [rest] * bool(rest)
        metafunc.parametrize("kernel_cases", shares, ids=[f"share{i}" for i in range(len(shares))])


def pytest_report_header(config):
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"torch {torch.__version__}, GPU: {gpu}, --seed={config.getoption('--seed')}"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Seed Python, NumPy and torch with a number that depends on the test's name and on --seed.

    So a test draws the same numbers alone as in the whole suite, in any order. pytest shows the line when the
    test fails.
    """
    number = zlib.crc32(request.node.nodeid.encode()) ^ request.config.getoption("--seed")
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)
    print(f"seed {number}: random, numpy and torch (repeat with --seed={request.config.getoption('--seed')})")
    return number


@pytest.fixture(scope="session", autouse=True)
def asked_to_keep_memory() -> Iterator[list[str]]:
    """Grows when a command asks that freed memory be kept, which is not done: some tests take gigabytes."""
    asked: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blip2_kernels.model.memory.keep_freed_memory", lambda: asked.append("asked"))
        yield asked


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Let uninitialised memory hold NaN, or the dtype's largest integer: an output nobody wrote cannot pass.

    Covers torch.empty, empty_like, empty_strided and Tensor.new_empty, called from Python.
    """

    def poison(function):
        def poisoned(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.is_meta or tensor.dtype == torch.bool:
                return tensor
            with torch.no_grad():
                if tensor.is_floating_point() or tensor.is_complex():
                    return tensor.fill_(float("nan"))
                return tensor.fill_(torch.iinfo(tensor.dtype).max)

        return poisoned

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
