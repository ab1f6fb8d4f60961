"""The CUDA kernels of csrc/, built to run on the host: once a worker."""

import pytest
from harness import host_build

needs_compiler = pytest.mark.skipif(host_build.COMPILER is None, reason="no C++ compiler (c++, g++)")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/csrc/" in item.nodeid and "host" in item.nodeid:
            item.add_marker(needs_compiler)


@pytest.fixture(scope="session")
def on_host(tmp_path_factory):
    """The compiled operators with CUDA kernels that run on CPU tensors."""
    return host_build.load_operators(tmp_path_factory.mktemp("on_host"))
