"""What `make gpu-report` makes of results: a report of the parts there are, and a refusal without a GPU."""

import importlib.util
import shutil
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
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "bench" / "gpu_report.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_report", module)
    spec.loader.exec_module(module)
    return module


def test_the_report_has_a_line_for_every_row(gpu_report, tmp_path):
    folder = tmp_path / "nvidia-h200"
    shutil.copytree(RESULTS, folder)
    (folder / "report.md").unlink()
    text = gpu_report.write_report(gpu_report.Settings(folder, full=False)).read_text()
    assert text == (RESULTS / "report.md").read_text(), "the committed report is of the committed results"
    assert "## doctor" in text and "434 passed" in text
    for line in (
        "| cross-64x2056 | forward | ours | 106.",
        "| stage1-100 | ours |",
        "| queries-1-compiled | | | | | | | AcceleratorError",
    ):
        assert line in text


def test_parts_that_did_not_run_are_left_out(gpu_report, tmp_path):
    text = gpu_report.write_report(gpu_report.Settings(tmp_path, full=False)).read_text()
    assert text.strip() == f"# {tmp_path.name}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("script", ["gpu_report", "kernels", "tune"])
def test_without_a_gpu_nothing_is_measured(script):
    command = [sys.executable, str(ROOT / "bench" / f"{script}.py")]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "expected a CUDA device" in done.stderr


@pytest.mark.slow
def test_the_models_bench_runs_small_on_a_cpu(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "bench" / "models.py"),
        "--device",
        "cpu",
        "--tiny",
        "--rounds",
        "1",
    ]
    command += ["--no-compile", "--json", str(tmp_path / "models.json")]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not agree" not in done.stdout and "! " not in done.stdout, done.stdout
