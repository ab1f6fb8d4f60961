"""What every benchmark shares: the devices, the correctness gate, and how a call is timed."""

import platform
from collections.abc import Callable, Mapping

import pytest
import torch
from tolerances import assert_yardstick
from torch import Tensor

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
Outputs = dict[str, Tensor]


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def time_checked(benchmark, device, request):
    """Time `call(backend)`, but only once its results have passed the yardstick of tests/tolerances.py.

    `call(backend, **inputs)` returns named results (outputs, gradients). Its results in the inputs' dtype are
    compared with those of the backend `reference` in fp64, and may be at most twice as far from them as
    `reference` in the same dtype. A result that is wrong fails the benchmark before anything is timed, so
    that no figure of it exists. Backends of one case are shown as one group.
    """

    def run(
        call: Callable[..., Outputs], backend: str, inputs: Mapping[str, Tensor], **facts: object
    ) -> None:
        truth = call("reference", **{name: value.double() for name, value in inputs.items()})
        plain, results = call("reference", **inputs), call(backend, **inputs)
        assert results.keys() == truth.keys()
        for name, value in results.items():
            assert_yardstick(f"{backend}: {name}", value, plain[name], truth[name])

        dtype = str(next(iter(inputs.values())).dtype).removeprefix("torch.")
        benchmark.extra_info.update(
            device=device_name(device), torch=torch.__version__, backend=backend, dtype=dtype, **facts
        )

        benchmark.group = request.node.name.replace(f"-{backend}]", "]")

        def once() -> None:
            call(backend, **inputs)
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark(once)

    return run
