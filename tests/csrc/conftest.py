"""The CUDA kernels of csrc/, built to run on the host."""

import ctypes

import pytest
import torch
from harness import host_build
from processes import made_once

needs_compiler = pytest.mark.skipif(host_build.COMPILER is None, reason="no C++ compiler (c++, g++)")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/csrc/" in item.nodeid and {"on_host", "build"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(needs_compiler)


@pytest.fixture(scope="session")
def host_library(tmp_path_factory):
    (library,) = made_once(tmp_path_factory, "on_host", host_build.build_operators).glob("*.so")
    return library


@pytest.fixture(scope="session")
def on_host(host_library):
    """The compiled operators with CUDA kernels that run on CPU tensors."""
    torch.ops.load_library(str(host_library))
    return getattr(torch.ops, host_build.NAMESPACE)


@pytest.fixture
def run_last_blocks(host_library, on_host):
    """A function of a number: so many blocks run of every grid, the last ones."""
    choose = ctypes.CDLL(str(host_library)).run_last_blocks
    yield choose
    choose(0)
