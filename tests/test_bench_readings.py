"""Times that benchmarks on a CPU read in processes of their own: what is told is right, nobody is left."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import clean_environment

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nobody can fork here")

PRELUDE = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)

def left() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return False
    return True
"""


def script(source: str, *arguments: str, status: int = 0) -> dict:
    """What a script prints last, as JSON. It has a process of its own: this one may have threads."""
    environment = clean_environment(PYTHONPATH=str(ROOT / "bench"))
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(source), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------- processes


def test_work_apart_is_returned_and_failures_are_told():
    found = script("""
        from children import Child, apart
        from measure import said

        def told(work) -> str:
            try:
                return str(apart(work, 2))
            except RuntimeError as error:
                return said(error)

        def raises():
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")

        child = Child.answering(lambda question: question * 2, 1)
        print(json.dumps({
            "made": told(lambda: torch.arange(4.0).sum().item()),
            "threads": told(torch.get_num_threads) + f" of {torch.get_num_threads()}",
            "raised": told(raises),
            "killed": told(lambda: os.kill(os.getpid(), signal.SIGKILL)),
            "crashed": told(lambda: os.kill(os.getpid(), signal.SIGSEGV)),
            "left early": told(lambda: os._exit(3)),
            "answers": [child.ask(2), child.ask("a"), child.end()],
            "left": left(),
        }))
    """)
    assert found == {
        "made": "6.0",
        "threads": "2 of 1",
        "raised": "OutOfMemoryError: tried to allocate 3 GiB",
        "killed": "RuntimeError: its process was ended by SIGKILL",
        "crashed": "RuntimeError: its process was ended by SIGSEGV",
        "left early": "RuntimeError: its process ended with status 3",
        "answers": [4, "aa", None],
        "left": False,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_children_end_with_their_parent():
    """A stopped one would stay for ever."""
    source = """
        from in_step import Worker
        worker = Worker.of([lambda: time.sleep(0.01)], 1)
        print(json.dumps({"pid": worker.child.pid}), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    pid = script(source, status=-signal.SIGKILL)["pid"]
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "(zombie)" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.05)


# -------------------------------------------------------------------------------------------------- readings

PEERS = """
    import in_step, readings
    readings.LONG = 1e9
    a, b = torch.randn(side, 512), torch.randn(512, 512)

    def product(times):
        def call():
            for _ in range(times):
                torch.mm(a, b)
        return call

    def fails(how, after):
        seen = []
        def call():
            seen.append(1)
            torch.mm(a, b)
            if len(seen) > after:
                how()
        return call

    def raises():
        raise ValueError("worn out")

    def noting(name, call, first=0.0):
        seen = []
        def noted():
            if not seen:
                seen.append(1)
                time.sleep(first)
                with open(os.path.join(sys.argv[1], name), "a") as file:
                    print(os.getpid(), file=file)
            call()
        return noted

    def told(peers, ours="ours", **limits):
        made = readings.tell({n: [c] for n, c in peers.items()}, ours, threads=1,
                             **{"readings": 5, "seconds": 60.0, **limits})
        return {n: its if isinstance(its, str) else
                {"ratio": its.ratio, "each": its.each, "rounds": its.time.rounds, "unsteady": its.unsteady}
                for n, its in made.items()}
"""


def test_short_calls_run_in_turn_in_new_processes(tmp_path):
    found = script(
        "side = 64"
        + textwrap.dedent(PEERS)
        + textwrap.dedent("""
        made = told({
            "ours": noting("ours", product(2)), "double": noting("double", product(4)),
            "compiled": noting("compiled", product(2), 1.1), "worn": fails(raises, 40),
        })
        print(json.dumps({"made": made, "left": left()}))
        """),
        str(tmp_path),
    )
    made = found["made"]
    assert not found["left"] and made["worn"] == "ValueError: worn out"
    assert 1.5 < made["double"]["ratio"]["median"] < 2.6 and made["ours"]["ratio"]["each"] == [1.0] * 5, made
    assert 0.7 < made["compiled"]["ratio"]["median"] < 1.4 and len(made["compiled"]["each"]) == 5
    processes = {name: (tmp_path / name).read_text().split() for name in ("ours", "double", "compiled")}
    assert len(set(processes["ours"])) == 1 + 5, "one looks how long the call is, then one a reading"
    assert len(set(processes["double"])) == 5 and len(processes["compiled"]) == 1, (
        "what is slow to begin stays"
    )
    assert set(processes["compiled"]) <= set(processes["double"]) < set(processes["ours"])


def test_long_calls_run_in_step_and_take_only_their_own_process_with_them():
    found = script(
        "side = 2048"
        + textwrap.dedent(PEERS)
        + textwrap.dedent("""
        readings.LONG_MS = 0.0
        peers = {
            "ours": product(2), "double": product(4), "worn": fails(raises, 3),
            "killed": fails(lambda: os.kill(os.getpid(), signal.SIGKILL), 3),
            "at once": raises,
        }
        made = told(peers)
        in_step.free_memory = lambda: in_step.SPARE - 1
        one_by_one = told(dict(peers, half=product(1)))
        without = told({"ours": fails(raises, 4), "double": product(4), "half": product(1)})
        not_there = told({"double": product(4), "half": product(1)})
        print(json.dumps({"made": made, "one by one": one_by_one, "without": without,
                          "not there": not_there, "left": left()}))
        """)
    )
    assert not found["left"]
    failed = {
        "worn": "ValueError: worn out",
        "killed": "RuntimeError: its process was ended by SIGKILL",
        "at once": "ValueError: worn out",
    }
    for made in (found["made"], found["one by one"]):
        assert {name: made[name] for name in failed} == failed
        assert 1.6 < made["double"]["ratio"]["median"] < 2.5, made
        assert made["ours"]["ratio"]["median"] == pytest.approx(1.0, abs=0.02)
        assert made["double"]["rounds"] >= 5 == len(made["double"]["each"])
    assert 0.4 < found["one by one"]["half"]["ratio"]["median"] < 0.65, found
    assert found["without"]["ours"] == "ValueError: worn out"
    for made in (found["without"], found["not there"]):
        assert made["double"]["each"] and made["half"]["each"], made
        assert made["double"]["each"][0] > 2.5 * made["half"]["each"][0]


def test_each_reading_in_step_has_new_processes_but_for_slow_beginners(tmp_path):
    found = script(
        "side = 2048"
        + textwrap.dedent(PEERS)
        + textwrap.dedent("""
        readings.LONG_MS = 0.0
        made = told({"ours": noting("ours", product(2)), "compiled": noting("compiled", product(2), 2.0),
                     "double": noting("double", product(4))})
        print(json.dumps({"made": made, "left": left()}))
        """),
        str(tmp_path),
    )
    assert not found["left"]
    processes = {name: (tmp_path / name).read_text().split() for name in ("ours", "double", "compiled")}
    counts = {name: len(set(its)) for name, its in processes.items()}
    assert counts == {"ours": 1 + 5, "double": 5, "compiled": 1}
    assert all(len(its["each"]) == 5 for its in found["made"].values())
    assert 0.7 < found["made"]["compiled"]["ratio"]["median"] < 1.4, found
    assert 1.6 < found["made"]["double"]["ratio"]["median"] < 2.5, found


def test_ctrl_c_ends_all_processes():
    found = script(
        "side = 64"
        + textwrap.dedent(PEERS)
        + textwrap.dedent("""
        def ctrl_c():
            looks.append(1)
            if len(looks) > 1:
                raise KeyboardInterrupt
            return True

        def in_the_middle(signal_number, frame):
            raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, in_the_middle)
        interrupted = []
        for readings.LONG_MS in (0.0, 1e9):
            for steady, seconds in ((ctrl_c, 60), (lambda: True, 2)):
                looks = []
                signal.alarm(seconds)
                try:
                    told({"ours": product(2), "double": product(4)}, steady=steady, readings=10**6)
                except KeyboardInterrupt:
                    interrupted.append(left())
                signal.alarm(0)
        print(json.dumps({"interrupted": interrupted}))
        """)
    )
    assert found["interrupted"] == [False] * 4


def test_ratios_in_step_are_those_of_one_machine(bench):
    """A machine whose speed changes from turn to turn; by our clock calls take up to three times as long."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    turns = [(rng.uniform(0.04, 0.06), rng.uniform(0.04, 0.06), rng.uniform(0.5, 1.5)) for _ in range(400)]

    def worker(work: float, slices: list[tuple[float, float]]) -> "object":
        """One whose calls are so many seconds of work at speed 1, with these slices and speeds."""
        ends, clock, done = [0.0], 0.0, 0.0
        for length, speed in slices:
            while (ends_in := (len(ends) * work - done) / speed) <= length:
                ends.append(clock + ends_in)
                done, clock, length = len(ends) * work - work, clock + ends_in, length - ends_in
            clock, done = clock + length, done + length * speed
        shared = array("d", [clock, 0.0, len(ends), *ends])
        return bench.in_step.Worker(child=None, shared=memoryview(shared), beginning=0.0)

    ours = worker(0.31, [(one, speed) for one, _, speed in turns])
    mine = worker(0.83, [(other, speed) for _, other, speed in turns])
    clocks = [0.0, 0.0]
    for one, other, _ in turns:
        mine.slices.append(bench.in_step.Slice(clocks[1], clocks[1] + other, clocks[0], clocks[0] + one))
        ours.slices.append(bench.in_step.Slice(clocks[0], clocks[0] + one, clocks[0], clocks[0] + one))
        clocks = [clocks[0] + one, clocks[1] + other]
    told = bench.in_step.rounds_of(mine, ours)
    expected = 0.83 / 0.31
    assert len(told.ratios) > 15
    assert all(ratio == pytest.approx(expected, rel=0.06) for ratio in told.ratios), told.ratios
    assert sum(told.ratios) / len(told.ratios) == pytest.approx(expected, rel=0.01)
    assert max(told.times) > 1.1 * min(told.times), "the times do tell how the machine changed"
    own = bench.in_step.rounds_of(ours, ours).ratios
    assert own == pytest.approx([1.0] * len(own), rel=0.03) and sum(own) == pytest.approx(len(own), rel=1e-3)
    mine.slices = mine.slices[200:]
    later = bench.in_step.rounds_of(mine, ours)
    assert 0 < len(later.ratios) < len(told.ratios), "what began before a slice that is known does not count"
    assert later.ratios == told.ratios[-len(later.ratios) :]


class Planted:
    """A reader whose readings are known."""

    def __init__(self, bench, ratios, seconds=0.0, clock=None) -> None:
        self.bench, self.ratios, self.seconds, self.clock = bench, list(ratios), seconds, clock
        self.failed: dict[str, str] = {}

    def read(self):
        self.clock[0] += self.seconds
        ratio = self.ratios.pop(0)
        return {
            "ours": self.bench.rounds.Rounds([1.0] * 3, [1.0] * 3),
            "plain": self.bench.rounds.Rounds([ratio] * 3, [ratio] * 3),
        }


@pytest.mark.parametrize(
    ("ratios", "seconds", "near", "expected", "unsteady"),
    [
        ([2.0] * 40, 0.1, [True] * 80, 5, 0),
        ([2.0] * 40, 5.0, [True] * 80, 3, 0),  # long ones agree sooner
        ([2.0, 2.4] * 20, 0.1, [True] * 80, 10, 0),  # they never agree: as many as are wanted
        ([2.0, 2.4] * 20, 1.0, [True] * 80, 5, 0),  # time is up
        ([2.0] * 40, 0.1, [True, *[False, True] * 2, *[True] * 80], 5, 0),  # near at one end is enough
        ([2.0, *[9.0] * 3, *[2.0] * 36], 0.1, [True, *[False] * 6, *[True] * 80], 5, 0),
        ([2.0] * 40, 0.1, [False] * 80, 20, 60),  # never near: all of twice as many
        ([2.0] * 40, 5.0, [False] * 80, 3, 0),  # long ones count anyway
    ],
)
def test_readings_go_on_until_they_agree(bench, monkeypatch, ratios, seconds, near, expected, unsteady):
    clock, looks = [0.0], iter(near)
    monkeypatch.setattr(bench.readings, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    told = {name: bench.rounds.Told() for name in ("ours", "plain")}
    reader = Planted(bench, ratios, seconds, clock)
    bench.readings._read(reader, told, 10, 4.5, lambda: next(looks))
    plain = told["plain"]
    assert len(plain.readings) == expected and plain.time.rounds == 3 * expected
    assert plain.unsteady == unsteady and plain.time.json().get("unsteady", 0) == unsteady
    assert 9.0 not in plain.each and plain.ratio["each"] == plain.each
    assert told["ours"].ratio == {"median": 1.0, "low": 1.0, "high": 1.0, "each": [1.0] * expected}


# ------------------------------------------------------------------------------------------------------ rows


def test_rows_of_peers_in_processes(tmp_path):
    """As a run of benchmarks makes them, and once more with --again."""
    found = script(
        """
        from cases import Case, Peer, Setting, Spec
        import rows
        from cores import Scout
        from runner import Runner
        from pathlib import Path

        numbers = torch.arange(1.0, 5.0)

        def crash():
            os.kill(os.getpid(), signal.SIGSEGV)

        calls = {
            "ours": lambda: numbers * 2, "plain": lambda: numbers + numbers, "crashed": crash,
            "wrong": lambda: numbers * 2.01, "part": lambda: numbers * 2,
        }
        peers = {name: Peer([call], part=name == "part") for name, call in calls.items()}
        peers["gone"] = "somebody is not installed"
        case = Case(peers, lambda: [numbers.double() * 2], lambda: [numbers * 2], moved=32.0)
        spec = Spec("planted", lambda _: case, tuple(peers))
        scout = Scout(2)
        near = scout.settle(), scout.nearest
        scout.end()
        rows.STANDARD_ERROR = 0.0
        runs = []
        for again in (False, True):
            runner = Runner(Setting(tiny=True), rows.Results.at(Path(sys.argv[1])), rounds=3, threads=2,
                            again=again)
            runs.append({row.peer: vars(row) for row in runner.run("planted", spec, spec.peers)})
        told = {name: len(timing.each) for name, timing in runner.timings.items()}
        print(json.dumps({"near": near, "runs": runs, "told": told, "left": left()}))
        """,
        str(tmp_path / "results.json"),
    )
    assert found["near"][0] in (True, False) and 0 < found["near"][1] < 1e6 and not found["left"]
    once, twice = found["runs"]
    assert once["crashed"]["failed"] == "RuntimeError: its process was ended by SIGSEGV"
    assert once["wrong"]["failed"].startswith("wrong: error 5.00e-03") and once["wrong"]["eager"] is None
    assert once["gone"]["absent"] == "somebody is not installed"
    for rows, readings in ((once, 3), (twice, 6)):
        plain = rows["plain"]
        assert len(plain["eager"]["each"]) == len(plain["ratio"]["each"]) == readings
        low, median, high = (plain["ratio"][key] for key in ("low", "median", "high"))
        assert low <= 0.97 * median and 1.03 * median <= high and rows["ours"]["ratio"]["median"] == 1.0
        assert plain["agreement"]["error"] <= plain["agreement"]["allowed"]
        assert plain["flops"] == 0 and plain["peak_mib"] > 0 and plain["of_roofline"] > 0
        assert rows["part"]["ratio"] is None and 0.3 < rows["part"]["share"] < 3.0
    assert once["ours"]["about"]["threads"] == 2
    assert set(found["told"]) == {"ours", "plain", "part"}
