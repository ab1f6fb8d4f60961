"""Runs a case: every peer is checked, then all are timed in turn; what was found is a row a peer."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import about
import measure
import torch
from cases import Case, Peer, Result, Setting, Spec
from children import apart
from cores import Scout
from measure import Timing, said
from readings import tell
from rounds import Told
from rows import LOST, SEED, Results, Row
from torch.utils.flop_counter import FlopCounterMode

from blip2_kernels.ops.flops import FORMULAS

T = TypeVar("T")
INTERVAL_FLOOR = 0.03
"""A ratio's interval is no narrower to either side: where code and data come to lie in memory differs from
process to process, and no round of one process shows it."""
TOO_SLOW = 4.0
"""A CPU whose products take so many times as long as in float32 has no instructions for that precision."""
SPENT = "the budget"
"""How the reason begins why a case did not begin."""
SETTLED = "its ratios are settled"
"""Why a case is not timed in one more process."""


@contextmanager
def noted(row: Row, what: str | None = None) -> Iterator[None]:
    """A failure inside becomes the row's; with `what` only a remark that this is missing."""
    try:
        yield
    except Exception as error:  # out of memory, a compiler that gives up: a result, and the others go on
        if what is None:
            row.failed = said(error)
        else:
            row.remarks.append(f"{what}: {said(error)}")


def distance(got: Result, truth: Result, order: float) -> float:
    """The largest error of any tensor, as a share of the norm of its truth."""
    worst = 0.0
    for one, right in zip(got, truth, strict=True):
        if one.shape != right.shape:
            raise ValueError(f"expected a result {list(right.shape)}, got {list(one.shape)}")
        one, right = one.detach().to(right.dtype), right.detach()
        error = torch.linalg.vector_norm((one - right).flatten(), order)
        size = torch.linalg.vector_norm(right.flatten(), order).clamp(min=1e-30)
        value = float(error / size)
        worst = max(worst, value if value == value else float("inf"))
    return worst


def truth_of(case: Case) -> tuple[Result | None, float]:
    """What peers must give, None where nothing is compared, and twice the error of plain PyTorch."""
    if case.truth is None or case.plain is None:
        return None, 0.0
    truth = [value.clone() for value in case.truth()]
    return truth, 2 * distance(case.plain(), truth, case.order)


def error_of(peer: Peer, truth: Result | None, order: float) -> float | None:
    """Of a peer against the truth, None where it is not compared; then it only has to run."""
    if peer.unchecked or truth is None:
        for call in peer.calls:
            call()
        return None
    return distance([value.clone() for value in peer.result()], truth, order)


def with_floor(median: float, low: float, high: float) -> dict[str, float]:
    """A ratio with its interval, no narrower than `INTERVAL_FLOOR`."""
    widths = (1 - INTERVAL_FLOOR) * median, (1 + INTERVAL_FLOOR) * median
    return {"median": median, "low": min(low, widths[0]), "high": max(high, widths[1])}


def count_flops(peer: Peer) -> int:
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        peer.calls[0]()
    return counter.get_total_flops()


def peak_mib(case: Case, peer: Peer, device: str) -> float:
    """Memory that one call takes at most, on top of what is there before."""
    case.clean()
    if device == "cpu":
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler:
            peer.calls[0]()
        events = profiler.profiler.kineto_results.events()
        held = peak = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak / 2**20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    peer.calls[0]()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def count(case: Case, peer: Peer, row: Row, device: str) -> Row:
    """A row with FLOPs and memory, or remarks why not."""
    with noted(row, "FLOPs"):
        row.flops = count_flops(peer)
    with noted(row, "peak"):
        row.peak_mib = peak_mib(case, peer, device)
    return row


def profile(peer: Peer, row: Row) -> None:
    """Kernels of one call: how many, how long, and which."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        peer.calls[0]()
        torch.cuda.synchronize()
    names: dict[str, tuple[float, int]] = {}
    for event in profiler.events():
        other = event.name.startswith(("Memcpy", "Memset", "#")) or getattr(
            event, "is_user_annotation", False
        )
        if event.device_type == DeviceType.CUDA and not other:
            spent, count = names.get(event.name, (0.0, 0))
            names[event.name] = spent + event.time_range.elapsed_us() / 1e3, count + 1
    row.launches = sum(count for _, count in names.values())
    row.kernel_ms = sum(spent for spent, _ in names.values())
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:12]
    row.kernels = [(name[:120], spent, count) for name, (spent, count) in longest]


@dataclass
class Runner:
    """Runs cases one after the other.

    Attributes:
        setting: what they are built with.
        results: where their rows go.
        rounds: timed rounds a case, at most; with `threads` readings.
        seconds: of timed rounds a case on a CPU, as far as the fewest rounds allow (`measure.FEWEST`).
        threads: peers compute on so many in processes of their own, and are told of by `readings`. None:
            in this process, one after the other (on a GPU, and where nobody can fork).
        budget: no case starts after so many seconds.
        check_only: run and check every peer, time nothing (fills the caches of compilers).
        profiles: look at the kernels of rows that are there, and time nothing: a profiler may leave launches
            slower, so this is for a process of its own.
        again: time rows that are there once more, and pool: they were checked and counted before. Cases all
            of whose rows are settled are left as they are.
        cores: those of the CPU: readings count while they are near. None looks at none.
        lost: why nothing runs on the GPU any more, after an access that was not allowed.
    """

    setting: Setting
    results: Results
    rounds: int = 21
    seconds: float = 4.0
    budget: float = float("inf")
    check_only: bool = False
    profiles: bool = False
    again: bool = False
    threads: int | None = None
    cores: Scout | None = None
    lost: str | None = None
    begun: float = field(default_factory=time.perf_counter)
    timings: dict[str, Timing] = field(default_factory=dict)
    _roofline: measure.Roofline | None = None
    _facts: dict[str, Any] = field(default_factory=dict)

    def run(self, name: str, spec: Spec, wanted: Sequence[str]) -> list[Row]:
        """Rows of the wanted peers; `timings` then holds their rounds by peer."""
        rows = {peer: Row(spec.group, name, peer) for peer in wanted}
        self.timings = {}
        if self.profiles:
            return self._look_again(name, spec, rows, self._profile)
        if self.again:
            return self._look_again(name, spec, rows, self._time_again)
        if time.perf_counter() - self.begun > self.budget:
            reason = f"{SPENT} of {self.budget:.0f} s is spent"
            return [replace(row, absent=reason) for row in rows.values()]
        try:
            if not self.check_only:
                for row in rows.values():
                    row.about = self.facts()
            torch.manual_seed(SEED)
            case = spec.build(self.setting)
            self._run(case, spec.ours, rows)
        except Exception as error:
            for row in rows.values():
                row.failed = row.failed or said(error)
        finally:
            case = None
            self._clear(rows)
        if not self.check_only:
            self.results.keep(list(rows.values()))
        return list(rows.values())

    def _clear(self, rows: Mapping[str, Row]) -> None:
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and importing it takes seconds
            torch._dynamo.reset()
        try:
            self.setting.empty_cache()
        except RuntimeError as error:
            self.lost = said(error)
            for row in rows.values():
                if (row.runs and row.eager is None) or row.failed:
                    row.failed = f"{LOST}: {said(error)}"

    def _look_again(
        self,
        name: str,
        spec: Spec,
        rows: dict[str, Row],
        look: Callable[[Case, str, dict[str, Row]], None],
    ) -> list[Row]:
        """The rows as they are kept, with what `look` adds to those that have figures of this revision."""
        kept = {row["peer"]: Row(**row) for row in self.results.rows if row["case"] == name}
        revision = about.revision()
        known = {
            peer: row
            for peer, row in kept.items()
            if peer in rows and row.eager and row.about.get("revision") == revision
        }
        if self.again and known and all(row.settled for row in known.values()):
            return [replace(row, absent=SETTLED) for row in rows.values()]
        if time.perf_counter() - self.begun <= self.budget and known:
            try:
                torch.manual_seed(SEED)
                case = spec.build(self.setting)
                look(case, spec.ours, known)
                case.clean()
            except Exception as error:  # what is kept stays as it was
                self._clear(rows)
                return [replace(row, failed=said(error)) for row in rows.values()]
        for peer, row in rows.items():
            reason = (kept[peer].absent or kept[peer].failed) if peer in kept else None
            row.absent = reason or f"no figures of revision {revision} are kept"
        if known:
            self.results.keep(list((rows | kept).values()))
        self._clear(known)
        return [known.get(peer, row) for peer, row in rows.items()]

    def _profile(self, case: Case, ours: str, rows: dict[str, Row]) -> None:
        """Kernels of the peers, added to their rows."""
        for peer, row in rows.items():
            if case.peers[peer].counted:
                with noted(row, "kernels"):
                    for call in case.peers[peer].calls:
                        call()
                    profile(case.peers[peer], row)

    def _time_again(self, case: Case, ours: str, rows: dict[str, Row]) -> None:
        """Times of the peers, pooled with those of the processes before."""
        fresh = {peer: Row(row.group, row.case, peer) for peer, row in rows.items()}
        self._time(case, ours, fresh)
        for peer, row in rows.items():
            row.pool(fresh[peer])
        whole = rows[ours].time if ours in rows else None
        for row in rows.values():
            if row.share is not None and row.time and whole:
                row.share = row.time["median"] / whole["median"]

    def _run(self, case: Case, ours: str, rows: Mapping[str, Row]) -> None:
        dtype = str(case.dtype).removeprefix("torch.")
        for name, row in rows.items():
            row.dtype, row.shape, row.bytes = dtype, dict(case.shape), case.moved
            peer = case.peers[name]
            if isinstance(peer, str):
                row.absent = peer
        if (reason := self._without(dtype)) is not None:
            for row in rows.values():
                row.absent = row.absent or reason
            return
        self._check(case, rows)
        if self.check_only:
            return
        for row in rows.values():
            row.about = row.about | {"clocks_mhz": about.clocks(self.setting.device)}
        self._time(case, ours, rows)
        self.setting.empty_cache()
        self._count(case, ours, rows)

    def facts(self) -> dict[str, Any]:
        """Where, with what and how this is measured; the roofline is measured when first asked for."""
        if not self._facts:
            self._steady()
            device, tiny = self.setting.device, self.setting.tiny
            self._roofline = self._apart(partial(measure.Roofline.measure, device, tiny))
            self._facts = about.about(self._roofline, device, self.threads) | {"tiny": tiny}
            if self.cores is not None:
                self._facts["hand_over_us"] = self.cores.nearest
        return self._facts

    def _without(self, dtype: str) -> str | None:
        """Why nobody computes in a precision on this CPU."""
        if self.setting.device != "cpu" or self.setting.tiny or dtype == "float32":
            return None
        speed = self.facts()["roofline"]["matmul"]
        times = speed["float32"] / speed[dtype]
        if times <= TOO_SLOW:
            return None
        return f"a product in {dtype} takes {times:.0f} times as long as in float32 here"

    def _steady(self) -> bool:
        """Whether a time that begins or ends now is one of this machine as it is told."""
        return self.cores is None or self.cores.settle()

    def _apart(self, work: Callable[[], T]) -> T:
        """What `work` returns, from a process of its own where peers have one."""
        return work() if self.threads is None else apart(work, self.threads)

    def _check(self, case: Case, rows: Mapping[str, Row]) -> None:
        """Run every peer and compare it: one that is wrong is not timed."""
        truth, rounding = self._apart(partial(truth_of, case))
        self.setting.empty_cache()
        for name, row in rows.items():
            if row.absent:
                continue
            peer: Any = case.peers[name]
            with noted(row):
                error = self._apart(partial(error_of, peer, truth, case.order))
                if error is None:
                    continue
                allowed = rounding + (case.floor if peer.floor is None else peer.floor)
                row.agreement = {"error": error, "allowed": allowed}
                if not error <= allowed:
                    row.failed = f"wrong: error {error:.2e}, allowed {allowed:.2e}"
        case.clean()

    def _time(self, case: Case, ours: str, rows: Mapping[str, Row]) -> None:
        """All times of the peers that are right, by readings or in turn."""
        cuda = self.setting.device == "cuda"
        running: dict[str, Any] = {name: case.peers[name] for name, row in rows.items() if row.runs}
        if self.threads is not None:
            return self._time_by_readings(running, ours, rows)
        rounds = max(1, round(self.rounds * case.rounds))
        calls = {name: peer.calls for name, peer in running.items()}
        limits = {} if cuda else {"least_ms": measure.CPU_ROUND_MS, "seconds": self.seconds}
        of_calls: dict[str, Timing] = {}
        eager = measure.eager_times(calls, self.setting.device, rounds=rounds, **limits)
        for name, timing in eager.items():
            if isinstance(timing, str):
                rows[name].failed = timing
            else:
                rows[name].eager, of_calls[name] = timing.json(), timing
        of_kernels = self._time_on_device(case, rows, rounds, of_calls) if cuda else {}
        self.timings = of_calls | of_kernels
        for name in of_calls:
            both = of_kernels if {ours, name} <= of_kernels.keys() else of_calls
            timing, mine = both[name], both.get(ours)
            if mine is None or timing.rounds != mine.rounds:
                continue
            if running[name].part:
                rows[name].share = timing.median / mine.median
            else:
                over = timing.over(mine)
                rows[name].ratio = with_floor(over.median, over.p20, over.p80)
                rows[name].ratio["of"] = "kernels" if both is of_kernels else "call"

    def _time_by_readings(self, running: Mapping[str, Peer], ours: str, rows: Mapping[str, Row]) -> None:
        """Times of calls, each peer's in a process of its own."""
        limits = {"readings": self.rounds, "seconds": self.seconds, "steady": self._steady}
        calls = {name: peer.calls for name, peer in running.items()}
        told = tell(calls, ours, threads=self.threads, **limits) if calls else {}
        for name, its in told.items():
            if isinstance(its, str):
                rows[name].failed = its
                continue
            self.timings[name] = its.time
            rows[name].eager = its.time.json() | {"each": its.each}
            if not isinstance(told.get(ours), Told):
                continue
            ratio = its.ratio
            if running[name].part:
                rows[name].share = ratio["median"]
            else:
                interval = with_floor(ratio["median"], ratio["low"], ratio["high"])
                rows[name].ratio = interval | {"of": "call", "each": ratio["each"]}

    def _time_on_device(
        self, case: Case, rows: Mapping[str, Row], rounds: int, of_calls: Mapping[str, Timing]
    ) -> dict[str, Timing]:
        """The times of kernels, of the peers that have one: in a CUDA graph, or as calls that are one."""
        running: dict[str, Any] = {name: case.peers[name] for name, row in rows.items() if row.runs}
        few = 5 if case.rounds == 1 else 1
        calls = {name: peer.calls for name, peer in running.items() if peer.host}
        for name, timing in measure.host_times(calls, rounds=max(3, rounds // 4), calls=few).items():
            if isinstance(timing, Timing):
                rows[name].host = timing.json()
        self.setting.empty_cache()
        calls = {name: peer.calls for name, peer in running.items() if peer.captured}
        of_kernels = {name: of_calls[name] for name, peer in running.items() if peer.graph}
        for name, made in measure.device_times(calls, rounds=rounds).items():
            if isinstance(made, Timing):
                of_kernels[name] = made
            else:
                rows[name].device_time = made
        for name, timing in of_kernels.items():
            rows[name].device_time = timing.json()
        once = {name: some[:1] for name, some in calls.items() if name in of_kernels and len(some) > 1}
        for name, made in measure.device_times(once, rounds=max(3, rounds // 4)).items():
            rows[name].warm = made.json() if isinstance(made, Timing) else None
        return of_kernels

    def _count(self, case: Case, ours: str, rows: Mapping[str, Row]) -> None:
        """FLOPs, memory, kernels, and what the roofline leaves of the time."""
        for name, row in rows.items():
            peer: Any = case.peers[name]
            if row.runs and peer.counted:
                with noted(row, "FLOPs and peak"):
                    known = self._apart(partial(count, case, peer, row, self.setting.device))
                    row.flops, row.peak_mib, row.remarks = known.flops, known.peak_mib, known.remarks
        case.clean()
        operations = case.operations
        if operations is None and ours in rows:
            operations = rows[ours].flops
        if self._roofline is None or operations is None:
            return
        for name, row in rows.items():
            if name not in self.timings or getattr(case.peers[name], "part", False):
                continue
            row.floor_ms = self._roofline.floor_ms(case.moved, operations, row.dtype or "float32")
            row.near_roofline()
