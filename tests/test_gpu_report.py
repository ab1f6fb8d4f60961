"""What `make gpu-report` makes of results: a report of the parts there are, and a refusal without a GPU."""

import importlib
import re
import subprocess
import sys
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
        "| queries-1x257-compiled | all |  |  |  |  |  |  |  |  |  | AcceleratorError",
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
    assert "--resume" in command and f"--results={tmp_path}" in command and "--full" in command


def test_candidates_are_judged_by_cases_that_there_are(gpu_report):
    tune = importlib.import_module("tune")
    for name, target in tune.TARGETS.items():
        for case in target.cases:
            assert case + "-backward" * target.backward in tune.CASES, name
    made = tune.CASES["cross-1x257"].build(tune.Setting("cpu", tiny=True, compiles=False))
    assert made.peers[tune.OURS].calls, "what a candidate is timed by"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("script", [["bench/gpu_report.py"], ["bench/tune.py"]])
def test_without_a_gpu_nothing_is_measured(script):
    done = subprocess.run(
        [sys.executable, *script], env=clean_environment(), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and "expected a CUDA device" in done.stderr
