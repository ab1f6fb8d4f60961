"""What tests on a GPU share: a call captured in a graph, a stream of its own, how often the host waits."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of a call, and its outputs, which each replay writes anew.

    Everything is warmed up on a stream of its own first: kernels are compiled and workspaces allocated there.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


def on_a_busy_stream(function: Callable[[], Any]) -> Any:
    """What a call gives on a stream that is still busy, and not the default one."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        result = function()
    torch.cuda.synchronize()
    return result


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronisations(function: Callable[[], Any]) -> int:
    """How often the host waits for the device in a call."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    for warning in found:
        print(f"{warning.filename}:{warning.lineno}: {warning.message}")
    return len(found)
