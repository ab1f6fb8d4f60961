"""How calls are timed against each other: rounds in turn, in one process; medians with p20 and p80.

Three times of a call on a GPU, all in milliseconds:

- device: of its kernels alone. A CUDA graph holds the call many times over, on several sets of inputs in
  turn, so that nothing waits for Python and no input is still in the cache; events around a replay, divided.
- eager: what a loop of calls takes as it stands, launches and Python included; events around several calls.
- host: until Python has the call's launches out, the GPU not waited for.

On a CPU there is one time, called eager: the call's own.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

Call = Callable[[], object]


def said(error: BaseException) -> str:
    """An error in one line, for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median, p20, p80: over the rounds.
        rounds: how many there were.
    """

    median: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> "Timing":
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered)
        )

    def __str__(self) -> str:
        return f"{self.median:.4f} ms [{self.p20:.4f}, {self.p80:.4f}]"

    def json(self) -> dict[str, float]:
        return asdict(self)


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


def _in_turn(runs: Mapping[str, Call], calls: Mapping[str, int], rounds: int, clock) -> dict[str, Timing]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(clock(run) / calls[name])
    return {name: Timing.of(values) for name, values in times.items()}


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


def eager_times(
    peers: Mapping[str, Sequence[Call]], device: str, *, rounds: int = 20, least_ms: float = 2.0
) -> dict[str, Timing]:
    """Time of a call as it stands, one after the other."""

    def wall(run: Call) -> float:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3

    clock = _between_events if device == "cuda" else wall
    runs: dict[str, Call] = {}
    counts: dict[str, int] = {}
    for name, calls in peers.items():
        for call in calls:
            call()
        copies = max(1, min(100, round(least_ms / max(clock(calls[0]), 1e-3) / len(calls))))

        def run(calls=calls, copies=copies):
            for _ in range(copies):
                for call in calls:
                    call()

        runs[name], counts[name] = run, copies * len(calls)
    return _in_turn(runs, counts, rounds, clock)


def host_times(
    peers: Mapping[str, Sequence[Call]], *, rounds: int = 20, calls: int = 20
) -> dict[str, Timing]:
    """Time until Python has a call's launches out."""

    def issue(run: Call) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) * 1e3

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
        copy: bytes read and written by a copy of 1 GiB, a second.
        matmul: of a product of 8192-square matrices in bfloat16.
    """

    copy: float
    matmul: float

    @classmethod
    def measure(cls) -> "Roofline":
        """Measure on the current CUDA device, on random data."""
        source = torch.randint(0, 127, (1 << 30,), dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

        def median(run: Call) -> float:
            for _ in range(3):
                run()
            return statistics.median(_between_events(run) for _ in range(10)) / 1e3

        copy = 2 * source.numel() / median(lambda: target.copy_(source))
        return cls(copy, 2 * 8192**3 / median(lambda: a @ b))

    def floor_ms(self, moved: float, operations: float = 0.0) -> float:
        """The least milliseconds that moving `moved` bytes and `operations` in bfloat16 take here."""
        return 1e3 * max(moved / self.copy, operations / self.matmul)
