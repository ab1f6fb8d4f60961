"""How calls are timed against each other: rounds in turn, in one process; medians with p20 and p80.

Three times of a call on a GPU, all in milliseconds:

- device: of its kernels alone. A CUDA graph holds the call many times over, on several sets of inputs in
  turn, so that nothing waits for Python and no input is still in the cache; events around a replay, divided.
- eager: what a loop of calls takes as it stands, launches and Python included; events around several calls.
- host: until Python has the call's launches out, the GPU not waited for.

A device time is cache-cold, where the sets of inputs together are larger than the cache (`cases.input_sets`);
with one set of inputs alone it is cache-warm. On a CPU there is one time, called
eager: the call's own, told of by `readings`.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from blip2_kernels.ops.linear import linear

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # a profiler that says nothing of its own

Call = Callable[[], object]
FEWEST = 5
"""Rounds that a time is told of, even where they take long."""
CPU_ROUND_MS = 10.0
"""A round on a CPU takes about so long at least: what else runs on the machine disturbs for milliseconds."""
LONGEST_PRODUCT = 2.0
"""Seconds of the matrix product that tells a device's speed, at most."""


class Retold(RuntimeError):
    """An error of another process, as `said` told it there."""


def said(error: BaseException) -> str:
    """An error in one line, for a table."""
    if isinstance(error, Retold):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median, p20, p80: over the rounds.
        rounds: how many there were.
        each: what every round took, in order.
        unsteady: rounds among them that should not have counted, for want of others.
    """

    median: float
    p20: float
    p80: float
    rounds: int
    each: tuple[float, ...] = ()
    unsteady: int = 0

    @classmethod
    def of(cls, milliseconds: Sequence[float], unsteady: int = 0) -> "Timing":
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(0.2 * last)],
            ordered[round(0.8 * last)],
            len(ordered),
            tuple(milliseconds),
            unsteady,
        )

    def over(self, other: "Timing") -> "Timing":
        """How many times as long as `other` this took: the ratios of rounds that ran side by side."""
        return Timing.of([mine / its for mine, its in zip(self.each, other.each, strict=True)])

    def __str__(self) -> str:
        return f"{self.median:.4f} ms [{self.p20:.4f}, {self.p80:.4f}]"

    def json(self) -> dict[str, float]:
        kept = asdict(self)
        del kept["each"]
        return kept if self.unsteady else {key: value for key, value in kept.items() if key != "unsteady"}


@dataclass
class Captured:
    """A CUDA graph of calls and what keeps it alive."""

    graph: torch.cuda.CUDAGraph
    calls: int
    stream: torch.cuda.Stream

    @classmethod
    def of(cls, calls: Sequence[Call], copies: int = 1) -> "Captured":
        """Capture all calls, `copies` times over, after a warm-up on the same stream."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                for call in calls:
                    call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(copies):
                for call in calls:
                    call()
        torch.cuda.synchronize()
        return cls(graph, copies * len(calls), stream)


def _between_events(run: Call) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _in_turn(
    runs: Mapping[str, Call], calls: Mapping[str, int], rounds: int, clock: Callable[[Call], float]
) -> dict[str, Timing | str]:
    """A timing of each, or the reason why it stopped: the others go on."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    stopped: dict[str, Timing | str] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            if name not in stopped:
                try:
                    times[name].append(clock(run) / calls[name])
                except Exception as error:
                    stopped[name] = said(error)
    return {name: Timing.of(its) for name, its in times.items() if name not in stopped} | stopped


def device_times(
    peers: Mapping[str, Sequence[Call]], *, rounds: int = 20, least_ms: float = 1.0
) -> dict[str, Timing | str]:
    """Time of the kernels of each peer's call; a reason where a peer cannot be captured.

    Args:
        peers: by name, the same call on several sets of inputs.
        rounds: timed replays a peer.
        least_ms: a replay holds at least so much.
    """
    graphs: dict[str, Captured] = {}
    results: dict[str, Timing | str] = {}
    for name, calls in peers.items():
        try:
            once = Captured.of(calls)
            once.graph.replay()
            copies = max(1, min(400, round(least_ms / max(_between_events(once.graph.replay), 1e-3))))
            graphs[name] = once if copies == 1 else Captured.of(calls, copies)
        except Exception as error:  # a peer that waits for the host, or fails: said, and the others go on
            results[name] = said(error)
            torch.cuda.synchronize()
    replays = {name: captured.graph.replay for name, captured in graphs.items()}
    counts = {name: captured.calls for name, captured in graphs.items()}
    for replay in replays.values():
        replay()
    return {**results, **_in_turn(replays, counts, rounds, _between_events)}


def wall(run: Call) -> float:
    """Milliseconds until a call returns."""
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def eager_times(
    peers: Mapping[str, Sequence[Call]],
    device: str,
    *,
    rounds: int = 20,
    least_ms: float = 2.0,
    seconds: float | None = None,
) -> dict[str, Timing | str]:
    """Time of a call as it stands, one after the other.

    Args:
        peers: by name, the same call on several sets of inputs.
        rounds: timed rounds a peer, at most.
        least_ms: a round takes at least so long.
        seconds: fewer rounds, but `FEWEST`, where all of them would take longer.
    """
    clock = _between_events if device == "cuda" else wall
    runs: dict[str, Call] = {}
    counts: dict[str, int] = {}
    failed: dict[str, Timing | str] = {}
    a_round = 0.0
    for name, calls in peers.items():
        try:
            for call in calls:
                call()
            once = max(clock(calls[0]), 1e-3)
        except Exception as error:
            failed[name] = said(error)
            continue
        copies = max(1, min(100, round(least_ms / once / len(calls))))

        def run(calls=calls, copies=copies):
            for _ in range(copies):
                for call in calls:
                    call()

        runs[name], counts[name] = run, copies * len(calls)
        a_round += counts[name] * once / 1e3
    if seconds is not None and a_round:
        rounds = max(min(FEWEST, rounds), min(rounds, round(seconds / a_round)))
    return failed | _in_turn(runs, counts, rounds, clock)


def host_times(
    peers: Mapping[str, Sequence[Call]], *, rounds: int = 20, calls: int = 20
) -> dict[str, Timing | str]:
    """Time until Python has a call's launches out."""

    def issue(run: Call) -> float:
        torch.cuda.synchronize()
        return wall(run)

    def several(call: Call) -> Call:
        def run() -> None:
            for _ in range(calls):
                call()

        return run

    runs = {name: several(some[0]) for name, some in peers.items()}
    times = _in_turn(runs, dict.fromkeys(runs, calls), rounds, issue)
    torch.cuda.synchronize()
    return times


@dataclass(frozen=True)
class Roofline:
    """What this device reaches: bytes and floating-point operations a second.

    Attributes:
        copy: bytes read and written by a copy of tensors far larger than any cache, a second.
        matmul: of a product of large square matrices, by dtype.
    """

    copy: float
    matmul: dict[str, float]

    @classmethod
    def measure(cls, device: str = "cuda", tiny: bool = False) -> "Roofline":
        """Measure on random data: 1 GiB and 8192-square matrices; on a CPU 256 MiB and 2048-square.
        Where one such product would take more than `LONGEST_PRODUCT` (bfloat16 on a CPU that has no
        instructions for it), matrices have an eighth of the side."""
        copied, largest = (1 << 30, 8192) if device == "cuda" else (1 << 28, 2048)
        if tiny:
            copied, largest = copied >> 6, largest >> 3
        clock = _between_events if device == "cuda" else wall
        source = torch.randint(0, 127, (copied,), dtype=torch.int8, device=device)
        target = torch.empty_like(source)

        def seconds(run: Call) -> float:
            for _ in range(3):
                run()
            return statistics.median(clock(run) for _ in range(7)) / 1e3

        def product_speed(product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> float:
            for side in (largest // 8, largest):
                a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
                taken = seconds(lambda a=a, b=b: product(a, b))
                if 8**3 * taken > LONGEST_PRODUCT:
                    break
            return 2 * side**3 / taken

        copy = 2 * copied / seconds(lambda: target.copy_(source))
        matmul = {}
        for dtype in (torch.float32, torch.bfloat16):
            # On a CPU torch carries two libraries, and either may be the faster one.
            speeds = (product_speed(product, dtype) for product in (torch.matmul, linear))
            matmul[str(dtype).removeprefix("torch.")] = max(speeds)
        return cls(copy, matmul)

    def floor_ms(self, moved: float, operations: float = 0.0, dtype: str = "bfloat16") -> float:
        """The least milliseconds that moving `moved` bytes and `operations` in `dtype` take here."""
        return 1e3 * max(moved / self.copy, operations / self.matmul[dtype])
