"""Where and with what a report's figures were taken."""

import datetime
import importlib.metadata
import platform
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch
from measure import Roofline

from blip2_kernels import extension
from blip2_kernels.model.memory import keeps_freed_memory


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def revision() -> str:
    """The checkout's git revision, "-dirty" where more than results has changed; "unknown" outside one."""
    git = ("git", "-C", str(Path(__file__).parent))
    named = _output(*git, "describe", "--always")
    where = (":(top)", ":(top,exclude)bench/results")
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", *where)
    return (named or "unknown") + ("-dirty" if changed else "")


def version(package: str) -> str | None:
    """Of an installed package, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        named = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def device_folder(device: str, threads: int | None = None) -> str:
    """A device's name as a folder of bench/results; a CPU's says what instructions it has, since its name may
    not, and how many threads computed (default torch's)."""
    name = device_name(device)
    if device == "cpu":
        name += f" {torch.backends.cpu.get_cpu_capability()} {threads or torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def clocks(device: str) -> dict[str, float] | None:
    """MHz right now: of the multiprocessors and the memory, or of the fastest core; None if nobody says."""
    if device == "cuda":
        said = _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits")
        numbers = re.findall(r"[\d.]+", said.splitlines()[0]) if said else []
        return dict(zip(("sm", "memory"), map(float, numbers), strict=True)) if len(numbers) == 2 else None
    try:
        cores = re.findall(r"cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        cores = []
    return {"core": max(map(float, cores))} if cores else None


def about(
    roofline: Roofline | None = None, device: str = "cuda", threads: int | None = None
) -> dict[str, object]:
    """Device, date and versions, for every row of a report; a CPU's with the threads that computed (default
    torch's)."""
    facts: dict[str, object] = {"device": device_name(device)}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"multiprocessors": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
    else:
        facts |= {"threads": threads or torch.get_num_threads()}
        facts |= {"capability": torch.backends.cpu.get_cpu_capability()}
        facts |= {"keeps_freed_memory": keeps_freed_memory()}
    facts |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "extension": extension.device_reason(device) or "used",
    }
    return facts if roofline is None else facts | {"roofline": asdict(roofline)}
