"""What `make gpu-report` makes of results: a report of the parts there are, and a refusal without a GPU."""

import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import clean_environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "nvidia-h200"


@pytest.fixture
def gpu_report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu_report")


def test_the_report_has_a_line_for_every_row(gpu_report):
    rows = gpu_report.report.read_rows(RESULTS / "results.json")
    committed = (RESULTS / "report.md").read_text()
    pictures = re.findall(r"^!\[.*\]\((.*)\)$", committed, re.MULTILINE)
    assert len(pictures) > 4 and all((RESULTS / name).is_file() for name in pictures)
    sections = gpu_report.sections(gpu_report.Settings(RESULTS, full=False))
    text = gpu_report.report.report(rows, RESULTS.name, sections, pictures)
    assert text == committed, "the committed report is of the committed results"
    assert all(f"| {row['case']} | {row['peer']} |" in text for row in rows)
    assert "## doctor" in text and "434 passed" in text
    for line in (
        "| cross-64x2056 | ours | 0.106",
        "| stage1-100x257 | ours |",
        "| queries-1x257-compiled | all |  |  |  |  |  |  |  |  |  |  | AcceleratorError",
    ):
        assert line in text


def test_parts_that_did_not_run_are_left_out(gpu_report, tmp_path):
    settings = gpu_report.Settings(tmp_path, full=False)
    text = gpu_report.report.write(tmp_path, gpu_report.sections(settings)).read_text()
    assert text.strip() == f"# {tmp_path.name}"


def test_every_file_of_cases_belongs_to_a_part(gpu_report, tmp_path):
    there = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    assert set(gpu_report.OPERATORS + gpu_report.MODELS) == there
    command = gpu_report.benches(gpu_report.Settings(tmp_path, full=True), gpu_report.MODELS, 30, 1800)
    assert all(Path(part).is_file() for part in command if part.endswith(".py"))
    assert f"--results={tmp_path}" in command
    assert {"--resume", "--full", "--autotune", "--capture-steps"} <= set(command)


def test_candidates_are_judged_by_cases_that_there_are(gpu_report):
    tune = importlib.import_module("tune")
    for name, target in tune.TARGETS.items():
        for case in target.cases:
            assert case + "-backward" * target.backward in tune.CASES, name
    made = tune.CASES["cross-1x257"].build(tune.Setting("cpu", tiny=True, compiles=False))
    assert made.peers[tune.OURS].calls, "what a candidate is timed by"


def test_parts_that_ran_are_not_run_again_and_what_is_left_is_said(gpu_report, tmp_path, monkeypatch, capsys):
    ran = []

    def part(name: str, status: int):
        def run(settings) -> int:
            ran.append(name)
            settings.log(name).write_text(f"the log of {name}")
            return status

        return run

    parts = {"good": 0, "bad": 1, "late": gpu_report.UNFINISHED}
    monkeypatch.setattr(gpu_report, "PARTS", {name: part(name, status) for name, status in parts.items()})
    settings = gpu_report.Settings(tmp_path, full=False)
    assert gpu_report.run_parts(settings, parts, again=False) == (["bad"], ["late"])
    assert "the log of bad" in capsys.readouterr().out
    assert gpu_report.run_parts(settings, parts, again=False) == (["bad"], ["late"])
    assert ran == ["good", "bad", "late", "bad", "late"]
    gpu_report.run_parts(settings, ["good"], again=True)
    gpu_report.run_parts(gpu_report.Settings(tmp_path, full=True), ["good"], again=False)
    assert ran[5:] == ["good", "good"]
    over = gpu_report.Settings(tmp_path, full=False, until=0.0)
    assert gpu_report.run_parts(over, parts, again=False) == ([], list(parts)) and len(ran) == 7


def test_a_part_is_stopped_with_the_minutes(gpu_report, tmp_path):
    settings = gpu_report.Settings(tmp_path, full=False, until=time.monotonic() + 0.5)
    sleeps = [sys.executable, "-c", "import time; time.sleep(30)"]
    assert gpu_report.run(settings, sleeps, tmp_path / "log", 600) == gpu_report.UNFINISHED
    assert "stopped after" in (tmp_path / "log").read_text()
    budget = next(o for o in gpu_report.benches(settings, ("queries",), 12, 150) if o.startswith("--budget"))
    assert float(budget.partition("=")[2]) < 1


def test_the_extension_has_to_be_built_for_cuda_and_to_work(gpu_report, tmp_path, monkeypatch):
    asked, found = {}, "the extension was built without CUDA"

    def run(settings, command, log, limit, **environment) -> int:
        asked.update(environment)
        log.write_text(json.dumps({"extension": {"cuda": found}}) if "--json" in command else "fine\n")
        return 0

    monkeypatch.setattr(gpu_report, "run", run)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    settings = gpu_report.Settings(tmp_path, full=False)
    assert gpu_report.build(settings) == 0 and asked["BLIP2_KERNELS_BUILD"] == "cuda"
    assert gpu_report.doctor(settings) == 1
    assert "expected to work, the extension was built without CUDA" in settings.log("doctor").read_text()
    found = "works"
    assert gpu_report.doctor(settings) == 0


def test_cases_that_the_budget_left_out_are_unfinished(gpu_report, tmp_path):
    settings = gpu_report.Settings(tmp_path, full=False)
    said = f"SKIPPED [3] bench/conftest.py:190: {gpu_report.SPENT} of 140 s is spent"
    for text, status in (("7 passed", 0), (said, gpu_report.UNFINISHED)):
        command = [sys.executable, "-c", f"print({text!r})"]
        assert gpu_report.measured(settings, command, "operators", 60) == status


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("script", [["bench/gpu_report.py"], ["bench/tune.py"]])
def test_without_a_gpu_nothing_is_measured(script):
    done = subprocess.run(
        [sys.executable, *script], env=clean_environment(), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "expected a CUDA device" in done.stderr
