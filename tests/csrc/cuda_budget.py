"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, and loads and stores of 16 bytes
or more of global memory.

    python tests/csrc/cuda_budget.py            compare with cuda_budget.json
    python tests/csrc/cuda_budget.py --write    record

No GPU is needed, only nvcc (CUDA_HOME or PATH) and the cuobjdump that Triton brings along (or CUDA's).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_suffix(".json")
ARCHITECTURES = (90, 80, 100)
FLAGS = ("-std=c++20", "-O3", "-DBLIP2_KERNELS_CUDA")
SLACK = 1.05
"""Registers may grow by this factor before the budget is broken: compilers differ from release to release."""

Figures = dict[str, int]


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc")


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def run(*command: object) -> str:
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


def short(symbol: str) -> str:
    """The name of a kernel without what every one has: `forward_kernel<Half, float, 32, 4>`."""
    match = re.search(r"(\w+_kernel)(?:<(.*)>)?\(", symbol)
    if match is None:
        return symbol
    arguments = re.sub(r"blip2_kernels::|\(int\)", "", match[2] or "")
    return f"{match[1]}<{arguments}>"


def measure(architecture: int) -> dict[str, Figures]:
    """Figures of every kernel of csrc/ by file and name."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc").glob("*.cu")):
            binary = Path(folder, f"{source.stem}.cubin")
            run(nvcc(), *FLAGS, f"-arch=sm_{architecture}", "-cubin", source, "-o", binary)
            usage = run(cuobjdump(), "-res-usage", binary)
            pattern = r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
            resources = {m[1]: [int(n) for n in m.groups()[1:]] for m in re.finditer(pattern, usage)}
            code = run(cuobjdump(), "-sass", binary)
            texts = re.split(r"Function : (\S+)", code)[1:]
            for symbol, text in zip(texts[::2], texts[1::2], strict=True):
                registers, stack, shared, local = resources[symbol]
                name = short(run("c++filt", symbol))
                found[f"{source.stem}: {name}"] = {
                    "registers": registers,
                    "stack": stack + local,
                    "shared": shared,
                    "spills": len(re.findall(r"\b(?:LDL|STL)\b", text)),
                    "loads_128": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*(?:128|256)", text)),
                    "stores_128": len(re.findall(r"\bSTG\.E\.(?:\w+\.)*(?:128|256)", text)),
                    "atomics": len(re.findall(r"\b(?:ATOMG?|RED)\b", text)),
                }
    return found


def loads_single_numbers(name: str) -> bool:
    """Whether a kernel is for rows that are not aligned: its first flag, kWide, is false."""
    return re.findall(r"\b(?:true|false)\b", name)[:1] == ["false"]


def problems(name: str, figures: Figures, recorded: Figures | None) -> list[str]:
    """What breaks a rule, or is worse than what was recorded."""
    wrong = [f"{name}: {figures[kind]} {kind}" for kind in ("stack", "spills", "atomics") if figures[kind]]
    wide = "sum_parts" not in name and not loads_single_numbers(name)
    if wide and not (figures["loads_128"] and figures["stores_128"]):
        wrong.append(f"{name}: no loads or no stores of 128 bits of global memory")
    if recorded is None:
        wrong.append(f"{name}: not recorded, run cuda_budget.py --write")
    elif figures["registers"] > recorded["registers"] * SLACK or figures["shared"] > recorded["shared"]:
        wrong.append(f"{name}: {figures}, recorded are {recorded}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="record what is measured")
    arguments = parser.parse_args()
    measured = {f"sm_{number}": measure(number) for number in ARCHITECTURES}
    if arguments.write:
        lines = ",\n".join(
            f'"{target}": {{\n'
            + ",\n".join(f"{json.dumps(n)}: {json.dumps(f)}" for n, f in kernels.items())
            + "\n}"
            for target, kernels in measured.items()
        )
        FILE.write_text(f"{{\n{lines}\n}}\n")
    recorded = json.loads(FILE.read_text())
    wrong = [
        f"{target} {problem}"
        for target, kernels in measured.items()
        for name, figures in kernels.items()
        for problem in problems(name, figures, recorded.get(target, {}).get(name))
    ]
    print("\n".join(wrong) or f"{sum(map(len, measured.values()))} kernels are within their budget")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
