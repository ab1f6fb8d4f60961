"""The benchmarks' gate: a backend whose results are wrong fails, and no figure of it is written."""

import json
import subprocess
import sys
from pathlib import Path

from processes import clean_environment

ROOT = Path(__file__).resolve().parent.parent

PLANTED = """
from blip2_kernels.ops.cross_attention import sdpa

right = sdpa.cross_attention_sdpa
sdpa.cross_attention_sdpa = lambda *args, **kwargs: right(*args, **kwargs) * 1.001
"""


def run_bench(folder: Path, *options: str) -> tuple[int, list[str], str]:
    """Exit status, names of the benchmarks that have a figure, and the output."""
    figures = folder / "figures.json"
    command = [
        *(sys.executable, "-m", "pytest", "bench", "-k", "cross_attention and own and forward"),
        *(f"--benchmark-json={figures}", *options),
    ]
    environment = clean_environment(PYTHONPATH=str(folder))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    timed = json.loads(figures.read_text())["benchmarks"] if figures.exists() and figures.read_text() else []
    return done.returncode, [entry["extra_info"]["backend"] for entry in timed], done.stdout


def test_a_wrong_result_is_not_timed(tmp_path):
    (tmp_path / "planted_fault.py").write_text(PLANTED)
    status, timed, output = run_bench(tmp_path, "-p", "planted_fault")
    assert status == 1 and set(timed) == {"reference"}, output
    assert "torch: output: error" in output
