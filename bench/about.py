"""Where and with what a report's figures were taken."""

import datetime
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
import triton
from measure import Roofline


def revision() -> str:
    """The checkout's git revision, "unknown" outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def about(roofline: Roofline | None = None, device: str = "cuda") -> dict[str, object]:
    """Device, date and versions, for the head of a JSON report."""
    facts: dict[str, object] = {"device": "CPU"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts = {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
        }
    facts |= {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    return facts if roofline is None else facts | {"roofline": asdict(roofline)}
