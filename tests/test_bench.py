"""Benchmarks: no figure without a right result, peers on the path they are named for, a gate that works."""

import dataclasses
import importlib
import importlib.util
import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import clean_environment
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
H200 = ROOT / "bench" / "results" / "nvidia-h200"


@pytest.fixture
def compiled_plainly(monkeypatch):
    """torch.compile traces as ever and leaves the C++ compiler out."""
    plainly = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda *given, mode=None, **options: plainly(*given, **options))
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ peers

TINY = {
    "bench_attention": [
        *("self-queries-1", "self-queries-4", "self-itm-4-backward", "self-itg-4", "self-itc+itg-4"),
        *("self-itc+itg-4-backward", "cross-1x257", "cross-2x257", "cross-1x257-by-4-backward"),
    ],
    "bench_latent_similarity": ["latent-1x257", "similarity-100x100-backward"],
    "bench_row_operators": ["add_layer_norm-1024-backward", "bias_gelu-1024", "embed_tokens-32"],
    "bench_queries": ["queries-text-1x257", "queries-2x257-bf16", "queries-1x257-compiled"],
    "bench_stage1": ["stage1-2x257-fp32", "stage1-2x257-bf16", "stage1-2x257-fp32-compiled"],
    "bench_rerank": ["rerank-1x4", "rerank-1x32-compiled"],
    "bench_stage2": ["stage2-1x257"],
    "bench_captioning": ["captioning-1-shallow"],
}


@pytest.mark.parametrize(
    ("module", "case"),
    [
        pytest.param(module, case, marks=[pytest.mark.slow] * (case == "stage1-2x257-fp32-compiled"))
        for module, names in TINY.items()
        for case in names
    ],
)
def test_every_peer_is_right(bench, compiled_plainly, module, case):
    """Also those that compile: with `fullgraph=True`, so a break in the graph would be an error."""
    spec = importlib.import_module(module).CASES[case]
    setting = bench.cases.Setting("cpu", tiny=True)
    runner = bench.runner.Runner(setting, bench.rows.Results(), check_only=True)
    rows = runner.run(case, spec, spec.peers)
    assert {row.peer: row.failed for row in rows if row.failed} == {}
    there = {row.peer for row in rows if row.runs}
    assert spec.ours in there and len(there) > 1
    for row in rows:
        assert row.absent is None or row.agreement is None
        if row.peer in ("compiled", "ours, compiled", "published, sdpa, compiled", "flex, compiled"):
            assert row.agreement is not None or row.absent, f"{row.peer} was not compared"
    if case in ("self-queries-4", "self-itg-4", "self-itc+itg-4", "cross-2x257"):
        assert "flex, compiled" in there


def operators(call) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    return {event.name for event in profiler.events() if "scaled_dot_product" in event.name}


FLASH, MATH = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"


@pytest.mark.parametrize(
    ("module", "case", "taken"),
    [
        ("bench_attention", "self-itm-4", {"eager": None, "sdpa flash": FLASH, "sdpa math": MATH}),
        ("bench_attention", "cross-1x257", {"eager": None, "sdpa flash": FLASH, "sdpa math": MATH}),
        ("bench_queries", "queries-1x257", {"transformers, eager": None, "transformers, sdpa": FLASH}),
        ("bench_rerank", "rerank-1x4", {"published, eager": None, "published, sdpa": FLASH}),
    ],
)
def test_peers_take_the_path_they_are_named_for(bench, module, case, taken):
    setting = bench.cases.Setting("cpu", tiny=True, compiles=False)
    peers = importlib.import_module(module).CASES[case].build(setting).peers
    for name, operator in taken.items():
        found = operators(peers[name].calls[0])
        assert {FLASH, MATH} & found == ({operator} if operator else set()), name


def test_flash_attention_gets_sequences_that_give_our_result(bench, monkeypatch):
    """The parts that go to FlashAttention and xformers, with a plain stand-in for their functions."""

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        outs = []
        for i in range(len(cu_seqlens_q) - 1):
            rows, keys = (slice(*cu[i : i + 2].tolist()) for cu in (cu_seqlens_q, cu_seqlens_k))
            one, two = q[rows].transpose(0, 1), k[keys].transpose(0, 1)
            seen = torch.ones(one.shape[1], two.shape[1], dtype=torch.bool)
            seen = seen.tril(two.shape[1] - one.shape[1]) if causal else seen
            assert one.shape[1] <= max_seqlen_q and two.shape[1] <= max_seqlen_k
            out = F.scaled_dot_product_attention(one, two, v[keys].transpose(0, 1), attn_mask=seen)
            outs.append(out.transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(flash_attn_varlen_func=varlen))

    def packed(setting, parts, prepare, read):
        calls = [bench.attention_peers.flash("stand_in", part, "cpu") for part in parts]
        compute = bench.attention_peers.in_parts(calls)
        names = bench.attention_peers.PACKED
        return dict.fromkeys(names, bench.cases.Way(compute, prepare, read))

    monkeypatch.setattr(bench.bench_attention, "packed_peers", packed)
    setting = bench.cases.Setting("cpu", tiny=True, compiles=False)
    for case in (
        "self-queries-4",
        "self-itm-4-backward",
        "self-itg-4",
        "self-itc+itg-4-backward",
        "cross-2x257-by-3",
    ):
        runner = bench.runner.Runner(setting, bench.rows.Results(), check_only=True)
        rows = runner.run(case, bench.bench_attention.CASES[case], ["flash-attention 2", "xformers"])
        assert [row.failed for row in rows] == [None, None] and all(row.agreement for row in rows), case


# ---------------------------------------------------------------------------------------------------- running


def planted(bench, **others):
    """A case of four numbers, whose peers are those given."""
    numbers = torch.arange(1.0, 5.0)
    calls = {"ours": lambda: numbers * 2, "plain": lambda: numbers + numbers, **others}
    peers = {n: call if isinstance(call, str) else bench.cases.Peer([call]) for n, call in calls.items()}

    def build(_):
        return bench.cases.Case(
            peers, lambda: [numbers.double() * 2], lambda: [numbers * 2], operations=4.0, moved=32.0
        )

    return bench.cases.Spec("planted", build, tuple(peers))


def in_a_process(bench, monkeypatch, path, spec, milliseconds, again=True) -> tuple[dict, dict]:
    """Rows by peer of a process whose rounds take so long: those it returns, and those it keeps."""

    def eager_times(calls, device, **limits):
        return {name: bench.measure.Timing.of(milliseconds[name]) for name in calls}

    monkeypatch.setattr(bench.measure, "eager_times", eager_times)
    runner = bench.runner.Runner(bench.cases.Setting(tiny=True), bench.rows.Results.at(path), again=again)
    rows = {row.peer: row for row in runner.run("planted", spec, spec.peers)}
    return rows, {row["peer"]: row for row in bench.rows.read_rows(path)}


def test_a_peer_that_is_wrong_or_crashes_has_no_figure_and_the_others_go_on(bench, tmp_path):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    calls = iter(range(1, 100))

    def later():  # right when it is checked, and for two rounds
        if next(calls) > 4:
            raise RuntimeError("worn out")
        return torch.arange(1.0, 5.0) * 2

    spec = planted(
        bench,
        wrong=lambda: torch.arange(1.0, 5.0) * 2.01,
        other_shape=lambda: torch.ones(3),
        nan=lambda: torch.full((4,), math.nan),
        large=out_of_memory,
        later=later,
        gone="somebody is not installed",
    )
    path = tmp_path / "results.json"
    runner = bench.runner.Runner(bench.cases.Setting(tiny=True), bench.rows.Results(path), rounds=8)
    rows = {row.peer: row for row in runner.run("planted", spec, spec.peers)}
    assert set(runner.timings) == {"ours", "plain"}
    assert rows["wrong"].failed.startswith("wrong: error 5.00e-03")
    assert rows["nan"].failed.startswith("wrong: error inf")
    assert rows["other_shape"].failed == "ValueError: expected a result [4], got [3]"
    assert rows["large"].failed == "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"
    assert (
        rows["later"].failed == "RuntimeError: worn out"
        and rows["gone"].absent == "somebody is not installed"
    )
    for name in ("wrong", "other_shape", "nan", "large", "later", "gone"):
        assert rows[name].eager is None and rows[name].ratio is None, name
    kept = {row["peer"]: row for row in bench.rows.read_rows(path)}
    ours = kept["ours"]
    assert ours["eager"]["rounds"] == 8 and ours["ratio"]["median"] == 1.0 and ours["floor_ms"] > 0
    assert kept["plain"]["ratio"]["low"] < kept["plain"]["ratio"]["median"] < kept["plain"]["ratio"]["high"]
    for fact in ("device", "revision", "torch", "transformers", "threads", "clocks_mhz", "roofline", "date"):
        assert fact in ours["about"], fact
    assert ours["seed"] == 0 and ours["bytes"] == 32.0 and ours["dtype"] == "float32"


def test_a_precision_without_instructions_is_told_and_not_waited_for(bench, monkeypatch):
    """Products in bfloat16 take some CPUs up to 140 times as long as in float32: a run of hours."""
    tried, square = [], bench.measure.linear

    def linear(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        tried.append((a.dtype, len(a)))
        return square(a, b)

    def measured() -> dict[str, float]:
        tried.clear()
        return bench.measure.Roofline.measure("cpu", tiny=True).matmul

    monkeypatch.setattr(bench.measure, "linear", linear)
    for longest, side in ((60.0, 256), (0.0, 32)):
        monkeypatch.setattr(bench.measure, "LONGEST_PRODUCT", longest)
        assert all(speed > 0 for speed in measured().values())
        assert tried[-1] == (torch.bfloat16, side) and (torch.float32, side) in tried

    spec = planted(bench, gone="somebody is not installed")
    half = dataclasses.replace(spec.build(None), dtype=torch.bfloat16)
    for slow, reason in (
        (40.0, "a product in bfloat16 takes 40 times as long as in float32 here"),
        (2.0, None),
    ):
        roofline = bench.measure.Roofline(1e10, {"float32": 1e11, "bfloat16": 1e11 / slow})
        monkeypatch.setattr(bench.measure.Roofline, "measure", lambda *_, made=roofline: made)
        runner = bench.runner.Runner(bench.cases.Setting(), bench.rows.Results(), rounds=5)
        in_half = dataclasses.replace(spec, build=lambda _: half)
        rows = {row.peer: row for row in runner.run("planted-bf16", in_half, spec.peers)}
        assert rows["ours"].absent == rows["plain"].absent == reason
        assert rows["gone"].absent == "somebody is not installed" and (rows["ours"].eager is None) == bool(
            reason
        )
        assert all(row.runs for row in runner.run("planted", spec, ("ours", "plain")))


def test_processes_are_pooled(bench, tmp_path, monkeypatch):
    """Medians of their medians, and intervals that hold all of theirs; what has no figures stays as it is."""

    process = partial(in_a_process, bench, monkeypatch, tmp_path / "results.json")
    spec = planted(bench, wrong=lambda: torch.zeros(4), gone="somebody is not installed")
    process(spec, {"ours": [1.0] * 5, "plain": [1.9, 2.0, 2.0, 2.0, 2.3]}, again=False)
    process(spec, {"ours": [1.0] * 5, "plain": [2.4, 2.5, 2.5, 2.5, 2.6]})
    rows, kept = process(spec, {"ours": [2.0] * 5, "plain": [4.2] * 5})
    for plain in (vars(rows["plain"]), kept["plain"]):
        assert plain["eager"] == {
            "median": 2.5,
            "p20": 2.0,
            "p80": 4.2,
            "rounds": 15,
            "each": [2.0, 2.5, 4.2],
        }
        assert plain["ratio"]["median"] == 2.1 and plain["ratio"]["each"] == [2.0, 2.5, 2.1]
        assert plain["ratio"]["low"] == pytest.approx(1.94) and plain["ratio"]["high"] == pytest.approx(2.575)
        assert plain["of_roofline"] == plain["floor_ms"] / 2.5
    assert (
        kept["wrong"]["failed"].startswith("wrong: error")
        and kept["gone"]["absent"] == "somebody is not installed"
    )
    assert kept["plain"]["agreement"] and kept["plain"]["about"]["revision"]
    assert "was read 3 times" in bench.report.report(list(kept.values()), "planted", {}, [])
    alone = dict(kept["ours"], eager={**kept["ours"]["eager"], "each": [1.0]})
    assert "was read 1 to 3 times" in bench.report.report([*kept.values(), alone], "planted", {}, [])

    rows, after = process(dataclasses.replace(spec, build=lambda _: [][0]), {})
    assert after == kept and {row.failed for row in rows.values()} == {"IndexError: list index out of range"}

    monkeypatch.setattr(bench.runner.about, "revision", lambda: "another")
    rows, after = process(spec, {"ours": [9.0] * 5, "plain": [9.0] * 5})
    assert after == kept and rows["plain"].absent == "no figures of revision another are kept"


def test_what_is_settled_is_not_timed_again(bench, tmp_path, monkeypatch):
    """Three processes at least, then as long as their medians say that one more would move the ratio."""
    settled = bench.rows.settled
    assert not settled({"median": 2.0}) and not settled({"median": 2.0, "each": [2.0, 2.0]})
    assert settled({"median": 2.0, "each": [2.0, 2.0, 2.0]})
    # By hand: a standard deviation of 4% in four processes, 1.2533 * 4% / 2 = 2.5%; of 2%, 1.25%.
    four = [1.0 - 0.04 * 0.75**0.5, 1.0 - 0.04 * 0.75**0.5, 1.0 + 0.04 * 0.75**0.5, 1.0 + 0.04 * 0.75**0.5]
    assert not settled({"median": 1.0, "each": four})
    assert settled({"median": 1.0, "each": [1.0 + (one - 1.0) / 2 for one in four]})
    assert not settled({"median": 2.0, "each": [2.0 * one for one in four]})

    path = tmp_path / "results.json"
    spec = planted(bench, gone="somebody is not installed")

    def process(plain: float, again: bool = True) -> tuple[dict, dict]:
        rounds = {"ours": [1.0] * 5, "plain": [plain] * 5}
        return in_a_process(bench, monkeypatch, path, spec, rounds, again)

    process(2.0, again=False)
    for plain in (2.3, 2.1):
        rows, kept = process(plain)
        assert rows["plain"].runs
    row = kept["plain"]
    assert "2.00 to 2.30 in 3 readings" in bench.report.table([row])[-1] and row["eager"]["rounds"] == 15
    while not settled(row["ratio"]):
        row = process(2.1)[1]["plain"]
    for each, enough in (([1.0, 9.0], False), ([1.0, 9.0, 1.0], True)):
        without_ratio = bench.rows.Row("planted", "case", "plain", eager={"median": 1.0, "each": each})
        assert without_ratio.settled is enough
        without_ratio.failed = "RuntimeError: in the last process"
        assert not without_ratio.settled
    assert not bench.rows.Row(**{**row, "eager": {**row["eager"], "unsteady": 5}}).settled
    assert (
        row["eager"]["rounds"] > 15
        and row["ratio"]["median"] == 2.1
        and "readings" not in bench.report.table([row])[-1]
    )
    before = path.read_text()
    rows, _ = process(9.0)
    assert {row.absent for row in rows.values()} == {bench.runner.SETTLED} and path.read_text() == before


def test_rows_of_cores_apart_are_replaced_by_those_of_near_ones(bench):
    """Which says why, and how many of its rounds."""
    apart, near = bench.measure.Timing.of([1.0] * 12, 12).json(), bench.measure.Timing.of([1.0] * 6).json()
    row, other = (bench.rows.Row("planted", "case", "ours", eager=timing) for timing in (apart, near))
    assert "cores apart in 12 of 12 rounds" in bench.report.table([vars(row)])[-1]
    for one, more, rounds in ((row, row, 24), (row, other, 6), (other, row, 6), (other, other, 12)):
        pooled = dataclasses.replace(one)
        pooled.pool(more)
        assert pooled.eager["rounds"] == rounds, (one, more)
        assert pooled.eager.get("unsteady", 0) == (24 if one is more is row else 0)


def test_waiting_for_near_cores(bench, monkeypatch):
    """Until they are as near as they have been; not for ever, and in a process not for long in all."""
    assert 0 < bench.cores.Cores().hand_over() < 1e6
    told, spins = iter([]), []
    clock = SimpleNamespace(perf_counter=lambda: float(len(spins)))

    class Planted(bench.cores.Cores):
        def hand_over(self) -> float:
            return next(told)

    monkeypatch.setattr(bench.cores, "spin", lambda: spins.append(1))
    monkeypatch.setattr(bench.cores, "time", clock)
    cores = Planted(patience=20.0)
    told = iter([6.0] * 4 + [4.0] * 6 + [4.3])
    assert cores.settle() and len(spins) == bench.cores.SPINS_AT_FIRST and cores.nearest == 4.0
    told, spins[:] = iter([6.0, 6.1, 5.2, 4.9]), []
    assert cores.settle() and len(spins) == 3
    told, spins[:] = iter([6.0] * 100), []
    assert not cores.settle(15.0) and len(spins) == 15
    assert not cores.settle(15.0) and len(spins) == 15, "having waited in vain it waits again at once"
    spins += [1] * (int(bench.cores.RESIGNED) + 1)
    spent = len(spins)
    assert not cores.settle(15.0) and len(spins) == spent + 2, "in all it waits longer than it may"
    spins += [1] * 1000
    spent = len(spins)
    assert not cores.settle(15.0) and len(spins) == spent


def test_results_that_are_written_leave_the_revision_as_it_was(bench, tmp_path, monkeypatch):
    """Else no second process would find the rows of the first: a device's results are in the repository."""

    def git(*arguments: str) -> None:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    code, rows = tmp_path / "bench" / "about.py", tmp_path / "bench" / "results" / "gpu" / "results.json"
    rows.parent.mkdir(parents=True)
    code.write_text("1")
    rows.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    about = bench.runner.about
    monkeypatch.setattr(about, "__file__", str(code))
    before = about.revision()
    rows.write_text("2")
    assert about.revision() == before and before.isalnum()
    code.write_text("2")
    assert about.revision() == f"{before}-dirty"


def test_ctrl_c_leaves_the_finished_rows(bench, tmp_path):
    path = tmp_path / "results.json"
    runner = bench.runner.Runner(bench.cases.Setting(tiny=True), bench.rows.Results(path), rounds=2)
    runner.run("first", planted(bench), ["ours", "plain"])

    def ctrl_c():
        raise KeyboardInterrupt  # no signal: a job in the background of a script ignores SIGINT

    interrupted = planted(bench, slow=ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        runner.run("second", interrupted, interrupted.peers)
    assert [row["case"] for row in bench.rows.read_rows(path)] == ["first", "first"]
    assert list(tmp_path.iterdir()) == [path]
    resumed = bench.rows.Results.at(path)
    revision, peers = resumed.rows[0]["about"]["revision"], ["ours", "plain"]
    assert resumed.has("first", revision, peers) and not resumed.has("second", revision, peers)
    assert not resumed.has("first", "another", peers)
    assert not resumed.has("first", revision, [*peers, "slow"]), "a peer that was left out has no figures"


def test_a_run_replaces_what_it_measures_again_and_nothing_else(bench, tmp_path):
    path = tmp_path / "results.json"

    def run(case: str, peers: list[str], **options) -> list:
        setting, results = bench.cases.Setting(tiny=True), bench.rows.Results.at(path)
        return bench.runner.Runner(setting, results, rounds=2, **options).run(case, planted(bench), peers)

    run("first", ["ours", "plain"])
    run("second", ["ours", "plain"])
    before = {(row["case"], row["peer"]): row for row in bench.rows.read_rows(path)}
    run("second", ["ours"])
    late = run("first", ["ours", "plain"], budget=-1.0)
    assert {row.absent for row in late} == {"the budget of -1 s is spent"}
    after = {(row["case"], row["peer"]): row for row in bench.rows.read_rows(path)}
    assert after.keys() == before.keys() and after["second", "ours"] != before["second", "ours"]
    assert all(after[key] == row for key, row in before.items() if key != ("second", "ours"))

    path.write_text("[]")
    with pytest.raises(ValueError, match="expected an object with rows"):
        bench.rows.Results.at(path)


def test_a_compiler_that_cannot_be_had_fails_its_peer_alone(bench):
    models = importlib.import_module("blip2_models")
    spec = planted(bench, theirs=models.Compiled(lambda: None, backend="tensorrt"))
    runner = bench.runner.Runner(bench.cases.Setting(tiny=True), bench.rows.Results(), rounds=2)
    rows = {row.peer: row for row in runner.run("planted", spec, spec.peers)}
    assert rows["theirs"].failed == "ModuleNotFoundError: No module named 'torch_tensorrt'"
    assert rows["ours"].runs and rows["plain"].ratio


def test_a_ratio_is_of_kernels_where_both_have_them_and_of_calls_elsewhere(bench, monkeypatch):
    """On a GPU some peers cannot be captured in a graph, and some calls are one."""
    calls = {"ours": 4.0, "captured": 6.0, "loop": 8.0, "graph": 3.0}
    kernels = {"ours": 1.0, "captured": 5.0}

    def timings(milliseconds: dict[str, float]):
        def times(peers, *args, **limits):
            return {name: bench.runner.Timing.of([milliseconds[name]] * 5) for name in peers}

        return times

    monkeypatch.setattr(bench.runner.measure, "eager_times", timings(calls))
    monkeypatch.setattr(bench.runner.measure, "host_times", timings(calls))
    monkeypatch.setattr(bench.runner.measure, "device_times", timings(kernels))
    peers = {name: bench.cases.Peer([print], captured=name in kernels) for name in calls}
    peers["graph"] = dataclasses.replace(peers["graph"], graph=True)
    rows = {name: bench.rows.Row("planted", "planted", name) for name in peers}
    runner = bench.runner.Runner(bench.cases.Setting("cuda"), bench.rows.Results())
    runner._time(bench.cases.Case(peers), "ours", rows)
    found = {name: (row.ratio["median"], row.ratio["of"]) for name, row in rows.items()}
    assert found == {
        "ours": (1.0, "kernels"),
        "captured": (5.0, "kernels"),
        "loop": (2.0, "call"),
        "graph": (3.0, "kernels"),
    }
    assert rows["loop"].device_time is None and rows["graph"].time["median"] == 3.0
    uncaptured = {"loop": peers["loop"], "captured": peers["captured"]}
    rows = {name: bench.rows.Row("planted", "planted", name) for name in uncaptured}
    runner._time(bench.cases.Case(uncaptured), "loop", rows)
    assert rows["captured"].ratio["median"] == 0.75 and rows["captured"].ratio["of"] == "call"


PLANTED = """
from blip2_kernels.ops.cross_attention import sdpa

right = sdpa.cross_attention_sdpa

def changed(*args, **kwargs):
    {change}

sdpa.cross_attention_sdpa = changed
"""


def run_bench(folder: Path, change: str, *options: str) -> tuple[int, dict[str, dict], str]:
    """Exit status, the benchmarks that have a figure by peer, and the output."""
    figures = folder / "figures.json"
    figures.unlink(missing_ok=True)
    (folder / "planted_change.py").write_text(PLANTED.format(change=change))
    command = [sys.executable, "-m", "pytest", "bench/bench_attention.py", "--device=cpu", "--tiny"]
    command += ["--only=cross-1x257", "-k", "ours or eager", "--rounds=5", "-p", "planted_change"]
    command += [f"--benchmark-storage={folder}", f"--benchmark-json={figures}", "-p", "no:cacheprovider"]
    command += options
    environment = clean_environment(PYTHONPATH=str(folder))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    text = figures.read_text() if figures.exists() else ""
    timed = json.loads(text)["benchmarks"] if text else []
    return done.returncode, {entry["extra_info"]["peer"]: entry for entry in timed}, done.stdout + done.stderr


def test_the_gates_of_pytest_bench(tmp_path):
    """A slowed kernel fails the comparison with an earlier run, a wrong one fails and has no figure."""
    gate = ("--benchmark-compare", "--benchmark-compare-fail=median:400%")
    status, timed, output = run_bench(tmp_path, "return right(*args, **kwargs)", "--benchmark-save=before")
    assert status == 0 and set(timed) == {"ours", "eager"}, output
    assert timed["ours"]["group"] == "cross-1x257"
    rounds = {peer: entry["stats"]["rounds"] for peer, entry in timed.items()}
    assert rounds == {peer: entry["extra_info"]["eager"]["rounds"] for peer, entry in timed.items()}
    before = timed["ours"]["stats"]["median"]

    slowed = "return [right(*args, **kwargs) for _ in range(100)][-1]"
    status, timed, output = run_bench(tmp_path, slowed, *gate)
    assert status != 0 and "Performance has regressed" in output and "cross-1x257: ours" in output, output
    assert timed["ours"]["stats"]["median"] >= 20 * before

    status, timed, output = run_bench(tmp_path, "return right(*args, **kwargs) * 1.001")
    assert status == 1 and set(timed) == {"eager"} and "wrong: error" in output, output


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"--rounds": 0}, "--rounds: expected more than 0, got 0"),
        ({"--threads": -1}, "--threads: expected more than 0, got -1"),
        ({"--share": "8"}, "--share: expected I/N, such as 0/8, got 8"),
        ({"--again": True}, "--again: expected --results, whose rows are timed again"),
        ({"--again": True, "--results": "", "--profile": True}, "--again: expected without --profile"),
        ({"--tiny": True, "--results": ""}, "--tiny: expected --results=FOLDER"),
        pytest.param(
            {"--device": "cuda"},
            "--device=cuda: expected a CUDA device, torch sees none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(bench, given, expected):
    spec = importlib.util.spec_from_file_location("bench_conftest", ROOT / "bench" / "conftest.py")
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    config = SimpleNamespace(getoption=lambda name, default=None: given.get(name, default))
    with pytest.raises(pytest.UsageError, match=re.escape(expected)):
        plugin.pytest_configure(config)


# ---------------------------------------------------------------------------------------------------- reports


def row(case: str, peer: str = "ours", median: float = 1.0, ratio: dict | None = None, **changes) -> dict:
    timing = {"median": median, "p20": median, "p80": median, "rounds": 5}
    blank = dict(
        group="planted", case=case, peer=peer, dtype="float32", shape={}, device_time=None, warm=None,
        eager=timing, host=None, ratio=ratio, share=None, bytes=1.0, flops=None, floor_ms=None,
        of_roofline=None, peak_mib=None, launches=None, absent=None, failed=None, remarks=[], about={},
    )  # fmt: skip
    return blank | changes


def test_cost_that_grows_has_its_exponent_beside_that_of_its_flops(bench):
    sizes = (1, 4, 16, 64)
    rows = [
        row(
            f"c{n}",
            median=3 * n**1.5,
            flops=7 * n**2,
            floor_ms=0.1 * n,
            shape={"batch": n, "image tokens": 257},
        )
        for n in sizes
    ]
    rows.append(row("other", shape={"batch": 8, "image tokens": 677}))  # another line, and too short for one
    (growth,) = bench.report.growths(rows)
    assert growth.axis == "batch" and growth.sizes == sizes and growth.label == "planted, 257 image tokens"
    exponents = [growth.exponent(values) for values in (growth.times, growth.flops, growth.floors)]
    assert exponents == pytest.approx([1.5, 2.0, 1.0])
    assert "| planted, 257 image tokens | batch | 1, 4, 16, 64 | ours | 1.50 | 2.00 | 1.00 |" in "\n".join(
        bench.report.growth_table(rows)
    )


def test_a_repeated_run_is_held_against_the_first(bench, tmp_path):
    def run(*medians: float, width: float = 0.05) -> list[dict]:
        ratios = ({"median": m, "low": m * (1 - width), "high": m * (1 + width)} for m in medians)
        return [row(f"c{i}", "peer", ratio=ratio) for i, ratio in enumerate(ratios)]

    first = run(*[2.0] * 10)
    assert bench.report.compare(first, run(*[2.05] * 10)).holds
    one_outside = bench.report.compare(first, run(*[2.0] * 9, 2.15))
    assert one_outside.holds and one_outside.within == 9 and one_outside.whose == "c9: peer"
    assert not bench.report.compare(first, run(*[2.0] * 8, 2.15, 2.15)).holds, "8 of 10"
    assert not bench.report.compare(run(*[2.0] * 10, width=0.2), run(*[2.0] * 9, 2.25)).holds, "12% off"
    assert not bench.report.compare(first, []).holds, "nothing was compared"
    paths = [tmp_path / name for name in ("old.json", "new.json")]
    for path, median in zip(paths, (2.0, 2.5), strict=True):
        path.write_text(json.dumps({"rows": run(median)}))
    command = [sys.executable, str(ROOT / "bench" / "report.py"), "--repeat-check", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 1 and "the furthest is 25.0% off (c0: peer" in done.stdout, done.stderr


def test_pictures_come_from_the_rows_alone_and_can_be_missing(bench, tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text((H200 / "results.json").read_text())
    drawn = bench.report.write(tmp_path).read_text()
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert {"ratios-models.png", "latency-over-batch-operators.png", "memory.png"} <= set(names)
    assert all((tmp_path / name).stat().st_size > 10_000 and f"({name})" in drawn for name in names)

    monkeypatch.delitem(sys.modules, "pictures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plain = bench.report.write(tmp_path).read_text()
    assert "no pictures: import of matplotlib halted" in capsys.readouterr().err
    assert "![" not in plain, "those of an earlier run show other rows"
    assert plain.splitlines() and "| stage1-100x257 | ours |" in plain


def test_pictures_of_ratios_leave_nothing_out(bench):
    pictures = importlib.import_module("pictures")
    rows = bench.rows.read_rows(H200 / "results.json")
    cases = bench.report.grouped([row for row in rows if row["ratio"] and pictures.is_others(row)], "case")
    columns = pictures.in_columns(cases)
    assert [its for column in columns for its in column] == list(cases.values()) and len(columns) > 1
    lengths = [sum(map(len, column)) for column in columns]
    assert max(lengths) <= 1.2 * pictures.BARS_A_COLUMN and min(lengths) >= 0.6 * max(lengths)
