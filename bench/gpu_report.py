"""Everything that needs a GPU, in one command, without internet: `make gpu-report`.

    python bench/gpu_report.py              about eight minutes, most of it compiling
    python bench/gpu_report.py --full       every random case, all rounds, the candidates' times
    python bench/gpu_report.py --only tests --again

Installs the checkout with its CUDA extension into the Python that runs this, then runs one part after
another: the self-test, the tests marked gpu, compute-sanitizer, the kernels and the models beside their
peers. What a part found lies in bench/results/<device>/; a part that ran to its end at this revision is not
run again. The last thing written is report.md.
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

import torch
from about import revision

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


def warm(name: str, processes: int, limit: float) -> None:
    """Let a script compile what it will time, in several processes; what they print is thrown away."""
    shares = [script(name, "--warm", "--share", f"{i}/{processes}") for i in range(processes)]
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


def kernels(settings: Settings) -> int:
    warm("kernels.py", max(1, min(8, CORES - 2)), 180)
    rounds = 40 if settings.full else 15
    command = script("kernels.py", "--rounds", rounds, "--json", settings.results / "kernels.json")
    return run(command, settings.log("kernels"), 900)


def models(settings: Settings) -> int:
    command = script("models.py", "--json", settings.results / "models.json")
    command += (
        ["--rounds", "30", "--budget", "1800"] if settings.full else ["--rounds", "12", "--budget", "150"]
    )
    return run(command, settings.log("models"), 3600)


def tune(settings: Settings) -> int:
    if not settings.full:
        settings.log("tune").write_text("only with --full\n")
        return 0
    warm("tune.py", max(1, CORES - 2), 900)
    return run(script("tune.py", "--json", settings.results / "tune.json"), settings.log("tune"), 1800)


PARTS: dict[str, Callable[[Settings], int]] = {
    part.__name__: part for part in (build, doctor, tests, sanitizer, kernels, models, tune)
}
# --------------------------------------------------------------------------------------------------- report


def _milliseconds(timing: dict) -> str:
    return f"{timing['median']:.4g} [{timing['p20']:.4g}, {timing['p80']:.4g}]"


def kernel_table(path: Path) -> list[str]:
    """Rows of the kernels' part as a Markdown table."""
    found = json.loads(path.read_text())
    lines = [
        "| case | direction | peer | µs [p20, p80] | x ours | of the roofline | host µs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        name = f"| {row['case']} | {row.get('direction', '')} | {row['peer']} "
        if "device" not in row:
            lines.append(f"{name}| {row['failed']} | | | |")
            continue
        device = {key: value * 1e3 for key, value in row["device"].items()}
        lines.append(
            f"{name}| {_milliseconds(device)} | {row['times_ours'] or 0:.2f} | {100 * row['roofline']:.0f}% "
            f"| {row['host']['median'] * 1e3:.0f} |"
        )
    return lines


def model_table(path: Path) -> list[str]:
    """Rows of the models' part as a Markdown table."""
    lines = [
        "| case | peer | loop ms [p20, p80] | device ms | host ms | peak MiB | kernels | remark |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, rows in json.loads(path.read_text())["cases"].items():
        if isinstance(rows, str):
            lines.append(f"| {case} | | | | | | | {rows} |")
            continue
        for row in rows:
            times = [
                _milliseconds(row[kind]) if isinstance(row[kind], dict) else ""
                for kind in ("eager", "device", "host")
            ]
            peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
            launches = "" if row["launches"] is None else str(row["launches"])
            cells = [case, row["peer"], *times, peak, launches, row["failure"] or ""]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def write_report(settings: Settings) -> Path:
    """Write report.md of whatever parts there are."""
    kernels_json, models_json = (settings.results / f"{name}.json" for name in ("kernels", "models"))
    lines = [f"# {settings.results.name}", ""]
    if kernels_json.is_file():
        head = json.loads(kernels_json.read_text())["about"]
        roofline = head.pop("roofline")
        lines += [f"- {name}: {value}" for name, value in head.items()]
        lines += [
            f"- a copy of 1 GiB moves {roofline['copy'] / 1e12:.2f} TB/s, read and written",
            f"- a product of 8192-square bfloat16 matrices: {roofline['matmul'] / 1e12:.0f} TFLOP/s",
        ]
    for part in ("doctor", "tests", "sanitizer"):
        log = settings.log(part)
        if log.is_file():
            text = log.read_text().rstrip().splitlines()
            if part != "doctor":
                text = [line for line in text if re.search(r"passed|failed|^FAILED", line)] or text[-1:]
            lines += ["", f"## {part}", "", "```", *text, "```"]
    for name, path, table in (("kernels", kernels_json, kernel_table), ("models", models_json, model_table)):
        if path.is_file():
            lines += ["", f"## {name}", "", *table(path)]
    report = settings.results / "report.md"
    report.write_text("\n".join(lines) + "\n")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every case and round, and the candidates' times")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    parser.add_argument("--again", action="store_true", help="run parts that ran at this revision too")
    parser.add_argument("--results", type=Path, default=BENCH / "results", help="default bench/results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device; `make bench` measures a CPU")
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    settings = Settings(arguments.results / device, arguments.full)
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
    print(f"report: {write_report(settings)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
