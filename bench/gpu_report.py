"""Everything that needs a GPU, in one command, without internet: `make gpu-report`.

    python bench/gpu_report.py              nine minutes at most, most of it compiling
    python bench/gpu_report.py --full       every random case and peer, all rounds, the candidates' times
    python bench/gpu_report.py --only tests --again

Installs the checkout with its CUDA extension into the Python that runs this, then runs one part after
another: the self-test, the tests marked gpu, compute-sanitizer, the benchmarks of operators and of models
(`pytest bench`), and with --full the candidates of bench/tune.py. What a part found lies in
bench/results/<device>/; a part that ran to its end at this revision is not run again, nor is a case that was
measured before its part was stopped: what the minutes were not enough for, the same command goes on with. The
last thing written is report.md with its pictures.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import report
import torch
from about import device_folder, revision
from runner import SPENT

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
CORES = os.cpu_count() or 1
PYTHON = sys.executable
# -P: the checkout must not stand in for what was installed.
PYTEST = [PYTHON, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
GPU_TESTS = ("kernels", "ops", "encoder", "model")
"""Folders of tests/ that need no more than the package's own dependencies and pytest."""
MINUTES = 9
UNFINISHED = 124
"""Exit status of what was stopped, as of timeout(1)."""


@dataclass(frozen=True)
class Settings:
    """What the parts are run with.

    Attributes:
        results: folder of this device's results.
        full: take the time it takes.
        until: no part runs longer, on the clock of `time.monotonic`.
    """

    results: Path
    full: bool
    until: float = float("inf")

    def log(self, part: str) -> Path:
        return self.results / f"{part}.log"

    def within(self, seconds: float) -> float:
        """So many seconds, or those that are left."""
        return max(0.0, min(seconds, self.until - time.monotonic()))


def run(settings: Settings, command: list[str], log: Path, limit: float, **environment: str) -> int:
    """Exit status of a command whose output goes to `log`; `UNFINISHED` if it took longer than allowed."""
    limit = settings.within(limit)
    with log.open("w") as out:
        try:
            return subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=limit,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            out.write(f"\nstopped after {limit:.0f} s\n")
            return UNFINISHED


def warm(settings: Settings, command: list[str], processes: int, limit: float) -> None:
    """Let a command compile what it will time, in several processes; what they print is thrown away."""
    limit = settings.within(limit)
    shares = [[*command, "--warm", "--share", f"{i}/{processes}"] for i in range(processes)]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for command in shares
    ]
    deadline = time.monotonic() + limit
    for process in started:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def script(name: str, *options: object) -> list[str]:
    return [PYTHON, str(BENCH / name), *map(str, options)]


def benches(settings: Settings, names: tuple[str, ...], rounds: int, budget: float) -> list[str]:
    """The command that runs these files of bench/, in this order; cases that were measured are left out."""
    files = [str(BENCH / f"bench_{name}.py") for name in names]
    command = [*PYTEST, *files, "--device=cuda", "--benchmark-quiet", "--resume"]
    command += [f"--rounds={rounds}", f"--budget={settings.within(budget):.0f}"]
    whole = ["--full", "--autotune", "--capture-steps"] if settings.full else []
    return [*command, f"--results={settings.results}", *whole]


# ---------------------------------------------------------------------------------------------------- parts


def build(settings: Settings) -> int:
    major, minor = torch.cuda.get_device_capability()
    command = [PYTHON, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "."]
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    wishes = {"TORCH_CUDA_ARCH_LIST": architectures, "BLIP2_KERNELS_BUILD": "cuda"}
    return run(settings, command, settings.log("build"), 600, **wishes)


def doctor(settings: Settings) -> int:
    """The self-test. Falling back on PyTorch is healthy elsewhere; here the extension has to work."""
    command = [PYTHON, "-P", "-m", "blip2_kernels.doctor"]
    status = run(settings, command, settings.log("doctor"), 120)
    told = settings.results / "doctor.json"
    status = status or run(settings, [*command, "--json"], told, 120)
    if status:
        return status
    found = json.loads(told.read_text())["extension"]["cuda"]
    if found != "works":
        with settings.log("doctor").open("a") as log:
            log.write(f"\nthe CUDA extension: expected to work, {found}\n")
    return int(found != "works")


def tests(settings: Settings) -> int:
    cases = 200 if settings.full else 12
    command = [*PYTEST, "-m", "gpu", "-k", "not sanitizer"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, CORES - 2)), "--dist", "worksteal"]
    command += [f"--kernel-cases={cases}", "--durations=10", "--tb=short"]
    command += [str(ROOT / "tests" / name) for name in GPU_TESTS]
    return run(settings, command, settings.log("tests"), 3600)


def sanitizer(settings: Settings) -> int:
    if shutil.which("compute-sanitizer") is None:
        settings.log("sanitizer").write_text("compute-sanitizer is not installed here\n")
        return 0
    command = [*PYTEST, "-m", "gpu", "-k", "sanitizer", str(ROOT / "tests/kernels/test_gpu.py")]
    return run(settings, command, settings.log("sanitizer"), 900)


OPERATORS = ("attention", "latent_similarity", "row_operators")
MODELS = ("queries", "stage1", "rerank", "stage2", "captioning")


def measured(settings: Settings, command: list[str], part: str, limit: float) -> int:
    """Run benchmarks; `UNFINISHED` if the budget was not enough for all cases."""
    log = settings.log(part)
    status = run(settings, command, log, limit)
    return status or (UNFINISHED if SPENT in log.read_text() else 0)


def operators(settings: Settings) -> int:
    command = benches(settings, OPERATORS, 40 if settings.full else 15, 3600 if settings.full else 140)
    warm(settings, command, max(1, min(8, CORES - 2)), 180)
    return measured(settings, command, "operators", 3900 if settings.full else 240)


def models(settings: Settings) -> int:
    command = benches(settings, MODELS, 30 if settings.full else 12, 1800 if settings.full else 150)
    return measured(settings, command, "models", 3600)


def profile(settings: Settings) -> int:
    command = benches(settings, MODELS, 1, 600 if settings.full else 45)
    return run(settings, [*command, "--profile"], settings.log("profile"), 900 if settings.full else 120)


def tune(settings: Settings) -> int:
    if not settings.full:
        settings.log("tune").write_text("only with --full\n")
        return 0
    warm(settings, script("tune.py"), max(1, CORES - 2), 900)
    command = script("tune.py", "--json", settings.results / "tune.json")
    return run(settings, command, settings.log("tune"), 1800)


PARTS: dict[str, Callable[[Settings], int]] = {
    part.__name__: part for part in (build, doctor, tests, sanitizer, operators, models, profile, tune)
}


def sections(settings: Settings) -> dict[str, list[str]]:
    """What the logs of the parts without rows say."""
    made = {}
    for part in ("doctor", "tests", "sanitizer"):
        log = settings.log(part)
        if log.is_file():
            text = log.read_text().rstrip().splitlines()
            if part != "doctor":
                text = [line for line in text if re.search(r"passed|failed|^FAILED", line)] or text[-1:]
            made[part] = ["```", *text, "```"]
    return made


def seconds_of_parts(done_file: Path, full: bool) -> dict[str, float]:
    """Of the parts that ran to their end at this revision, how long each took."""
    done = json.loads(done_file.read_text()) if done_file.is_file() else {}
    same = done.get("revision") == revision() and done.get("full") == full
    return done["parts"] if same else {}


def run_parts(settings: Settings, names: Iterable[str], again: bool) -> tuple[list[str], list[str]]:
    """Run parts that have not run yet; which failed, and which there was not enough time for."""
    done_file = settings.results / "done.json"
    ran = seconds_of_parts(done_file, settings.full)
    failed, left = [], []
    for name in names:
        if name in ran and not again:
            print(f"{name}: ran before ({ran[name]:.0f} s)", flush=True)
            continue
        if settings.within(1) <= 0:
            left.append(name)
            continue
        begin = time.monotonic()
        status = PARTS[name](settings)
        seconds = time.monotonic() - begin
        if status == 0:
            ran[name] = seconds
            kept = {"revision": revision(), "full": settings.full, "parts": ran}
            done_file.write_text(json.dumps(kept, indent=1) + "\n")
            print(f"{name}: done in {seconds:.0f} s", flush=True)
        elif status == UNFINISHED:
            left.append(name)
            print(f"{name}: not finished in {seconds:.0f} s", flush=True)
        else:
            failed.append(name)
            print(f"{name}: exit status {status} in {seconds:.0f} s", flush=True)
            print("\n".join(settings.log(name).read_text().splitlines()[-15:]), flush=True)
    return failed, left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every case, peer and round; tile candidates")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    parser.add_argument("--again", action="store_true", help="run parts that ran at this revision too")
    parser.add_argument("--results", type=Path, default=BENCH / "results", help="default bench/results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device; `make bench` measures a CPU")
    lacking = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if lacking:
        parser.error(f"expected these packages: {', '.join(lacking)} (pip install pytest pytest-benchmark)")
    until = float("inf") if arguments.full else time.monotonic() + 60 * MINUTES
    settings = Settings(arguments.results / device_folder("cuda"), arguments.full, until)
    settings.results.mkdir(parents=True, exist_ok=True)
    failed, left = run_parts(settings, [arguments.only] if arguments.only else PARTS, arguments.again)
    print(f"report: {report.write(settings.results, sections(settings))}")
    if left:
        print(f"not enough time for {', '.join(left)}: run the same command again")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
