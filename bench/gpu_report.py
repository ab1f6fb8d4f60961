"""Everything that needs a GPU, in one command, without internet: `make gpu-report`.

    python bench/gpu_report.py              about eight minutes, most of it compiling
    python bench/gpu_report.py --full       every random case, all rounds, the candidates' times
    python bench/gpu_report.py --only tests --again

Installs the checkout with its CUDA extension into the Python that runs this, then runs one part after
another: the self-test, the tests marked gpu, compute-sanitizer, the benchmarks of operators and of models
(`pytest bench`), and with --full the candidates of bench/tune.py. What a part found lies in
bench/results/<device>/; a part that ran to its end at this revision is not run again, nor is a case that was
measured before its part was stopped. The last thing written is report.md with its pictures.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import report
import torch
from about import device_folder, revision

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
CORES = os.cpu_count() or 1
PYTHON = sys.executable
# -P: the checkout must not stand in for what was installed.
PYTEST = [PYTHON, "-P", "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
GPU_TESTS = ("kernels", "ops", "encoder", "model")
"""Folders of tests/ that need no more than the package's own dependencies and pytest."""


@dataclass(frozen=True)
class Settings:
    """What the parts are run with.

    Attributes:
        results: folder of this device's results.
        full: take the time it takes.
    """

    results: Path
    full: bool

    def log(self, part: str) -> Path:
        return self.results / f"{part}.log"


def run(command: list[str], log: Path, limit: float, **environment: str) -> int:
    """Exit status of a command whose output goes to `log`; 124 if it took longer than `limit` seconds."""
    with log.open("w") as out:
        try:
            return subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, timeout=limit,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            out.write(f"\nstopped after {limit:.0f} s\n")
            return 124


def warm(command: list[str], processes: int, limit: float) -> None:
    """Let a command compile what it will time, in several processes; what they print is thrown away."""
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
    command = [PYTHON, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "--device=cuda"]
    command += ["--benchmark-quiet", f"--rounds={rounds}", f"--budget={budget:.0f}", "--resume"]
    return [*command, f"--results={settings.results}", *(["--full"] if settings.full else [])]


# ---------------------------------------------------------------------------------------------------- parts


def build(settings: Settings) -> int:
    major, minor = torch.cuda.get_device_capability()
    command = [PYTHON, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "."]
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    return run(command, settings.log("build"), 600, TORCH_CUDA_ARCH_LIST=architectures)


def doctor(settings: Settings) -> int:
    command = [PYTHON, "-P", "-m", "blip2_kernels.doctor"]
    status = run(command, settings.log("doctor"), 120)
    run([*command, "--json"], settings.results / "doctor.json", 120)
    return status


def tests(settings: Settings) -> int:
    cases = 200 if settings.full else 12
    command = [
        PYTHON,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-k",
        "not sanitizer",
        "-p",
        "no:cacheprovider",
    ]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, CORES - 2)), "--dist", "worksteal"]
    command += [f"--kernel-cases={cases}", "--durations=10", "--tb=short"]
    return run(command + [str(ROOT / "tests" / name) for name in GPU_TESTS], settings.log("tests"), 3600)


def sanitizer(settings: Settings) -> int:
    if shutil.which("compute-sanitizer") is None:
        settings.log("sanitizer").write_text("compute-sanitizer is not installed here\n")
        return 0
    return run(
        [*PYTEST, "-k", "sanitizer", str(ROOT / "tests/kernels/test_gpu.py")], settings.log("sanitizer"), 900
    )


OPERATORS = ("attention", "latent_similarity", "row_operators")
MODELS = ("queries", "stage1", "rerank", "stage2", "captioning")


def operators(settings: Settings) -> int:
    command = benches(settings, OPERATORS, 40 if settings.full else 15, 3600 if settings.full else 140)
    warm(command, max(1, min(8, CORES - 2)), 180)
    return run(command, settings.log("operators"), 3900 if settings.full else 240)


def models(settings: Settings) -> int:
    command = benches(settings, MODELS, 30 if settings.full else 12, 1800 if settings.full else 150)
    return run(command, settings.log("models"), 3600)


def profile(settings: Settings) -> int:
    command = benches(settings, MODELS, 1, 600 if settings.full else 45)
    return run([*command, "--profile"], settings.log("profile"), 900 if settings.full else 120)


def tune(settings: Settings) -> int:
    if not settings.full:
        settings.log("tune").write_text("only with --full\n")
        return 0
    warm(script("tune.py"), max(1, CORES - 2), 900)
    return run(script("tune.py", "--json", settings.results / "tune.json"), settings.log("tune"), 1800)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every case and round, and the candidates' times")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    parser.add_argument("--again", action="store_true", help="run parts that ran at this revision too")
    parser.add_argument("--results", type=Path, default=BENCH / "results", help="default bench/results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device; `make bench` measures a CPU")
    settings = Settings(arguments.results / device_folder("cuda"), arguments.full)
    settings.results.mkdir(parents=True, exist_ok=True)
    done_file = settings.results / "done.json"
    done = json.loads(done_file.read_text()) if done_file.is_file() else {}
    if done.get("revision") != revision() or done.get("full") != arguments.full:
        done = {"revision": revision(), "full": arguments.full, "parts": {}}
    failed = []
    for name in [arguments.only] if arguments.only else PARTS:
        if name in done["parts"] and not arguments.again:
            print(f"{name}: ran before ({done['parts'][name]:.0f} s)", flush=True)
            continue
        begin = time.monotonic()
        status = PARTS[name](settings)
        seconds = time.monotonic() - begin
        print(f"{name}: {'done' if status == 0 else f'exit status {status}'} in {seconds:.0f} s", flush=True)
        if status:
            failed.append(name)
            print("\n".join(settings.log(name).read_text().splitlines()[-15:]), flush=True)
        else:
            done["parts"][name] = seconds
            done_file.write_text(json.dumps(done, indent=1) + "\n")
    print(f"report: {report.write(settings.results, sections(settings))}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
