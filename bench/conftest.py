"""`pytest bench/`: every peer of every case is a benchmark.

    pytest bench/                          a few minutes on 2 cores: small sizes of every group
    pytest bench/ --full --results         the whole grid; rows go to bench/results/<device>/results.json
    pytest bench/ --only stage1,cross      cases with one of these in name or group, also those in no grid
    pytest bench/ -k "ours or sdpa"        some of the peers
    pytest bench/ --benchmark-json=x.json  and everything else that pytest-benchmark does
    pytest bench/ --full --results --again  kept cases that are not settled once more: see `Runner.again`
    pytest bench/ --device=cpu --tiny      all of it, small: a test of the benchmarks

The peers of a case are checked first, then run in turn, round by round, on a CPU in several `readings`. What
pytest-benchmark shows, keeps and compares are those rounds, told again by a clock. A peer that is not
installed is skipped, one that fails or is wrong is an expected failure with its reason; only when the failing
peer is ours does the run fail.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from about import device_folder, revision
from cases import FULL, SHORT, Setting, Spec
from children import CAN_FORK
from cores import Scout
from rows import Results, Row
from runner import Runner

from blip2_kernels.model.memory import keep_freed_memory

HERE = Path(__file__).parent
THREADS = pytest.StashKey[int]()
"""Threads that peers compute on."""
COMPILED = "-compiled"
"""End of the names of cases that wait for torch.compile. They come last."""


class Recorded:
    """The clock of rounds that have been run: it moves when a round is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now


RECORDED = Recorded()


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--full", action="store_true", help="the whole grid of cases, and more rounds")
    group.addoption("--only", default="", metavar="PARTS", help="cases with one of these in name or group")
    group.addoption(
        "--device", choices=("cpu", "cuda"), default=None, help="default: a GPU where there is one"
    )
    group.addoption("--tiny", action="store_true", help="small models and batches: a test of the benchmarks")
    group.addoption("--threads", type=int, default=None, help="threads to compute with (default torch's)")
    group.addoption("--rounds", type=int, default=None, help="timed rounds a case; readings on a CPU")
    group.addoption("--seconds", type=float, default=None, help="timed seconds a case on a CPU")
    group.addoption("--budget", type=float, default=float("inf"), help="no case starts after so many seconds")
    group.addoption(
        "--results", nargs="?", const="", metavar="FOLDER", help="keep rows (default bench/results/DEVICE)"
    )
    group.addoption("--resume", action="store_true", help="keep rows of this revision that are there already")
    group.addoption("--no-compile", action="store_true", help="without peers of torch.compile")
    group.addoption("--autotune", action="store_true", help="also peers in mode max-autotune")
    group.addoption("--capture-steps", action="store_true", help="capture training steps in CUDA graphs too")
    group.addoption(
        "--profile", action="store_true", help="look at the kernels of rows that are there, on a GPU"
    )
    group.addoption(
        "--again",
        action="store_true",
        help="time the kept cases once more whose ratios are not settled, and pool the processes",
    )
    group.addoption("--warm", action="store_true", help="run every peer once and time nothing")
    group.addoption("--share", default="0/1", metavar="I/N", help="every N-th case from the I-th on")


def setting_of(config) -> Setting:
    device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    return Setting(
        device,
        tiny=config.getoption("--tiny"),
        compiles=not config.getoption("--no-compile"),
        autotune=config.getoption("--autotune"),
        capture_steps=config.getoption("--capture-steps"),
        full=config.getoption("--full"),
    )


def pytest_configure(config):
    keep_freed_memory()
    for name in ("--threads", "--rounds", "--seconds"):
        value = config.getoption(name, None)
        if value is not None and value <= 0:
            raise pytest.UsageError(f"{name}: expected more than 0, got {value}")
    if config.getoption("--again", False) and config.getoption("--results", None) is None:
        raise pytest.UsageError("--again: expected --results, whose rows are timed again")
    if config.getoption("--again", False) and config.getoption("--profile", False):
        raise pytest.UsageError("--again: expected without --profile, which times nothing")
    if config.getoption("--tiny", False) and config.getoption("--results", None) == "":
        raise pytest.UsageError("--tiny: expected --results=FOLDER, since these are no figures of the device")
    share = config.getoption("--share", "0/1")
    if not re.fullmatch(r"\d+/[1-9]\d*", share):
        raise pytest.UsageError(f"--share: expected I/N, such as 0/8, got {share}")
    if config.getoption("--device", None) == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device=cuda: expected a CUDA device, torch sees none")
    config.stash[THREADS] = config.getoption("--threads") or torch.get_num_threads()
    torch.set_num_threads(1 if in_processes(config) else config.stash[THREADS])


def in_processes(config) -> bool:
    """Whether peers have processes of their own: then this one computes on one thread, to be able to fork."""
    return CAN_FORK and setting_of(config).device == "cpu"


def chosen_of(cases: Mapping[str, Spec], config) -> list[str]:
    """Names of a file's cases that are to run: those that `--only` names, else those of the grid."""
    parts = [part for part in config.getoption("--only").split(",") if part]
    if parts:
        return [
            name
            for name, spec in cases.items()
            if any(part == name if part in cases else part in f"{name} {spec.group}" for part in parts)
        ]
    last = FULL if config.getoption("--full") else SHORT
    cuda = setting_of(config).device == "cuda"
    return [name for name, spec in cases.items() if (spec.cuda if cuda else spec.cpu) <= last]


def pytest_generate_tests(metafunc):
    if "timed" not in metafunc.fixturenames:
        return
    first, step = map(int, metafunc.config.getoption("--share").split("/"))
    chosen = chosen_of(metafunc.module.CASES, metafunc.config)
    pairs = [(n, peer) for n in chosen[first::step] for peer in metafunc.module.CASES[n].peers]
    metafunc.parametrize(("case", "peer"), pairs, ids=[f"{n}: {peer}" for n, peer in pairs])


def case_of(item) -> str | None:
    """The case that a benchmark is of; None for anything else, and where a file has none of those asked."""
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return case if isinstance(case, str) else None


def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if case_of(item) or "timed" not in getattr(item, "fixturenames", ())]
    for item in items:
        if case_of(item):
            item.add_marker(pytest.mark.benchmark(timer=RECORDED.time))
    items.sort(key=lambda item: (case_of(item) or "").endswith(COMPILED))


def results_file(config) -> Path | None:
    """Where rows go; None keeps none."""
    folder = config.getoption("--results")
    if folder is None:
        return None
    device = device_folder(setting_of(config).device, config.stash[THREADS])
    return (Path(folder) if folder else HERE / "results" / device) / "results.json"


class House:
    """Runs a case when the first of its peers has its turn."""

    def __init__(self, config, items) -> None:
        setting, threads = setting_of(config), config.stash[THREADS]
        full, disabled = config.getoption("--full"), config.getoption("benchmark_disable", False)
        self.revision = revision()
        profiles, again = config.getoption("--profile"), config.getoption("--again")
        apart = in_processes(config)
        self.resume = config.getoption("--resume") and not (profiles or again)
        self.runner = Runner(
            setting,
            Results.at(results_file(config)),
            rounds=config.getoption("--rounds") or ((25 if full else 5) if apart else 21),
            seconds=config.getoption("--seconds") or (12.0 if full else 4.0),
            budget=config.getoption("--budget"),
            check_only=config.getoption("--warm") or disabled or profiles,
            profiles=profiles,
            again=again,
            threads=threads if apart else None,
            cores=Scout(threads) if apart and threads > 1 and not setting.tiny else None,
        )
        self.wanted: dict[str, list[str]] = {}
        for item in filter(case_of, items):
            self.wanted.setdefault(case_of(item), []).append(item.callspec.params["peer"])
        self.case: str | None = None
        self.rows: dict[str, Row] = {}

    def row(self, name: str, spec: Spec, peer: str) -> Row:
        if name != self.case:
            self.case, self.rows = name, {}
            self.rows = {row.peer: row for row in self.runner.run(name, spec, self.wanted[name])}
        return self.rows[peer]


@pytest.fixture(scope="session")
def house(request) -> House:
    return House(request.config, request.session.items)


@pytest.fixture
def timed(request, house, benchmark, case, peer) -> Callable[[], None]:
    """Call it: the rounds of this case and peer, told to pytest-benchmark, or why there are none."""

    def tell() -> None:
        if (
            house.resume
            and house.case != case
            and house.runner.results.has(case, house.revision, house.wanted[case])
        ):
            pytest.skip("measured before at this revision")
        row = house.row(case, request.module.CASES[case], peer)
        if house.runner.lost:
            pytest.exit(
                f"{case} has lost the GPU ({house.runner.lost}); --resume runs the rest", returncode=3
            )
        if row.absent is not None:
            pytest.skip(row.absent)
        if row.failed is not None and not (house.runner.profiles and row.eager):
            (pytest.fail if peer.startswith("ours") else pytest.xfail)(row.failed)
        benchmark.group = case
        if house.runner.check_only:
            benchmark.pedantic(lambda: None)
            return
        rounds = house.runner.timings[peer].each
        benchmark.extra_info.update({key: value for key, value in vars(row).items() if key != "kernels"})
        told = iter(rounds)

        def a_round() -> None:
            RECORDED.now += next(told) / 1e3

        benchmark.pedantic(a_round, rounds=len(rounds))

    return tell


def pytest_terminal_summary(terminalreporter, config):
    path = results_file(config)
    if path is not None:
        terminalreporter.write_line(f"rows: {os.path.relpath(path.parent)}")
