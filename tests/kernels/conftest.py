"""Kernels run in Triton's interpreter, inside the guard, on a machine without a GPU."""

import pytest
from harness import interpreter


@pytest.fixture(autouse=True)
def launches(request):
    """What the kernels of a test launched. A test that compiles or needs a GPU says so by its marker."""
    if request.node.get_closest_marker("gpu") or request.node.get_closest_marker("compiles"):
        yield []
        return
    if not interpreter.available():
        pytest.skip("a GPU is visible: kernels are tested compiled")
    with interpreter.guard() as launches:
        yield launches
