"""The budget: what the compiler makes of every shipped launch configuration, against what it made before.

    python tests/kernels/budget.py                      compare all with budget.json, no GPU needed
    python tests/kernels/budget.py --arch 90            for one architecture
    python tests/kernels/budget.py --only "cross"       kernels whose name has this text
    python tests/kernels/budget.py --write              record the figures of the running Triton version
    python tests/kernels/budget.py --resident           the table of resident programs for docs/kernels.md

Kernels are compiled exactly as the operators launch them (`harness.fake_driver`); what is compiled is in
`shipped.py`.

Rules that hold whatever was recorded are in `broken_rules`, what counts as worse than recorded in `worse`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from harness import fake_driver
from harness.compile_report import compile_kernel, report, resident_programs
from shipped import Shipped, shipped

from blip2_kernels.ops import launching

FILE = Path(__file__).with_name("budget.json")
ARCHITECTURES = (80, 90, 100)
AMD = "gfx942"
"""Compiled for once a kernel: that it compiles and multiplies matrices."""
MORE_REGISTERS = 4
"""How many more than recorded are let pass."""
FEW_BYTES = 32
"""See `broken_rules`."""
VERSION = ".".join(triton.__version__.split(".")[:2])
EXCUSED: dict[tuple[str, str, str], int] = {
    ("3.6", AMD, "cross backward shared half narrow blocks 128x64, 8 warps, 2 stages, dropout"): 1504,
    ("3.9", AMD, "cross backward shared half narrow blocks 128x64, 8 warps, 2 stages, dropout"): 1332,
    ("3.6", AMD, "cross backward keys half narrow blocks 64x64, 8 warps, 1 stages, dropout"): 476,
    ("3.9", AMD, "cross backward keys half narrow blocks 64x64, 8 warps, 1 stages, dropout"): 116,
}
"""Bytes of stack that are let pass, by Triton version, target and name: what was recorded, no more. No table
is made for AMD, which takes the default."""
WITHOUT_PRODUCTS = ("cross merge", "latent softmax", "similarity text gradient")
WITH_ATOMICS = ("latent scores",)
"""They count samples with a wrong image_index; no result is summed so."""
FORWARD = ("self forward half", "cross forward half", "cross merge half", "latent", "similarity forward half")
TILE_OF_128 = "its scores fill the registers of eight warps, as many as two programs of 64 rows have"
MASKED = "two where no mask is given, or lengths: a mask of any pattern takes it past 128 registers"
SEVERAL_BLOCKS = "the running maxima of several blocks of queries take registers beside the products"
ONE_RESIDENT = {
    **{(f"sm_{n}", "self forward half narrow tile 128x128"): TILE_OF_128 for n in ARCHITECTURES},
    ("sm_80", "cross forward half wide blocks 64x32, 8 warps, 2 stages"): (
        "sums of 64 rows and 128 channels fill the registers of eight warps, as many as two programs of four"
    ),
    ("sm_100", "cross forward half wide blocks 64x32, 8 warps, 3 stages"): (
        "two where an image is one chunk: with several it holds the sums of two"
    ),
    **{("sm_80", f"similarity forward half {n} queries"): SEVERAL_BLOCKS for n in (111, 95, 127)},
    ("sm_90", "latent scores half K64 N128 R128, 8 warps, 3 stages"): MASKED,
    ("sm_100", "latent scores half K64 N128 R128, 8 warps, 3 stages"): MASKED,
}
"""Forward kernels in half precision that may have a multiprocessor to themselves, by target and beginning of
the name, and why."""
RESIDENT = {
    "self-attention, tile of 16 rows": "self forward half narrow tile 16x16",
    "self-attention, tile of 32 rows": "self forward half narrow tile 32x32",
    "self-attention, tile of 64 rows": "self forward half narrow tile 64x64",
    "self-attention, tile of 128 rows": "self forward half narrow tile 128x128",
    "self-attention by blocks": "self forward half narrow blocks",
    "self-attention, head dim 128, tile of 64 rows": "self forward half wide tile 64x64",
    "self-attention by blocks, head dim 128": "self forward half wide blocks",
    "cross-attention": "cross forward half narrow blocks",
    "cross-attention, head dim 128": "cross forward half wide blocks",
    "cross-attention's merge": "cross merge half narrow",
    "latent attention's scores, 384 rows": "latent scores half",
    "latent attention's output, 384 rows": "latent output half",
    "latent attention's softmax, 257 tokens": "latent softmax half 512",
    "similarity, 32 queries": "similarity forward half 32 queries",
}
"""Rows of `resident_table`: what they are called there, and how the names of their kernels begin."""


# -------------------------------------------------------------------------------------------------- measuring


@contextmanager
def _gpu(arch: int) -> Iterator[fake_driver.Recorder]:
    processors = fake_driver.LIMITS[arch].processors
    with (
        fake_driver.drive(arch) as recorder,
        mock.patch.object(launching, "architecture", lambda device: arch),
        mock.patch.object(launching, "processors", lambda device: processors),
        mock.patch.object(launching, "_compiled", {}),
        mock.patch.object(launching, "_too_large", {}),
    ):
        yield recorder


def compiled(item: Shipped, arch: int) -> fake_driver.Compilation:
    """The kernel as it is launched, or what it would take where it does not fit."""
    with _gpu(arch) as recorder, ExitStack() as stack:
        for table, config in item.tables:
            stack.enter_context(table.overridden(config))
        try:
            item.call()
        except RuntimeError:
            if recorder.compilations[-1].asm:
                raise
            return recorder.compilations[-1]
    return next(launch.compilation for launch in recorder.launches if launch.kernel == item.kernel)


def measure(item: Shipped, arch: int) -> dict[str, int]:
    """What a kernel takes; `resident` programs are 0 where it does not fit."""
    made = compiled(item, arch)
    if not made.asm:
        return {"shared": made.metadata.shared, "warps": made.metadata.num_warps, "resident": 0}
    found = report(made)
    return {
        "registers": found.registers,
        "stack": found.stack_bytes,
        **({"stack_in_loops": found.local_in_loops} if found.stack_bytes else {}),
        "shared": found.shared_bytes,
        "tensor_core": found.tensor_core,
        "atomics": found.atomics,
        "warps": found.num_warps,
        "resident": resident_programs(found, arch),
    }


def one_of_each_kernel() -> Iterator[Shipped]:
    """The kernels that are compiled for AMD: each once, the first in half precision with dropout."""
    seen = set()
    for item in shipped(0):
        direction = item.name.split(" half ")[0].split(" fp32 ")[0]
        plain = item.name.startswith(("latent", "similarity", "cross group", "cross merge"))
        if direction not in seen and (plain or (item.half and "dropout" in item.name)):
            seen.add(direction)
            yield item


def _kernel(item: Shipped) -> object:
    """The `@triton.jit` function behind an entry."""
    package = {"self": "self_attention", "cross": "cross_attention", "latent": "latent_attention"}
    folder = f"blip2_kernels.ops.{package.get(item.name.split()[0], 'image_text_similarity')}.triton"
    names = [f"{folder}.{file}" for file in ("forward", "backward", "group", "kernels")]
    return next(
        getattr(sys.modules[name], item.kernel)
        for name in names
        if hasattr(sys.modules.get(name), item.kernel)
    )


def measure_amd(item: Shipped) -> dict[str, int]:
    """What a kernel takes on AMD, compiled as it is launched on an NVIDIA GPU."""
    made = compiled(item, 90)
    kernel = _kernel(item)
    found = report(
        compile_kernel(
            kernel,
            made.signature,
            made.constants,
            target=AMD,
            divisible=made.divisible,
            num_warps=made.metadata.num_warps,
            num_stages=made.metadata.num_stages,
        )
    )
    return {
        "registers": found.registers,
        "stack": found.stack_bytes,
        "shared": found.shared_bytes,
        "tensor_core": found.tensor_core,
        "atomics": found.atomics,
        "warps": found.num_warps,
    }


# -------------------------------------------------------------------------------------------------- comparing


def broken_rules(name: str, figures: Mapping[str, int], target: str, version: str = VERSION) -> list[str]:
    """What no configuration may do, whatever was recorded: not fit, spill, miss tensor cores, use atomics.

    In fp32 the compiler may put up to FEW_BYTES a thread aside before a loop and fetch them behind it, to let
    one more program be resident: it does so where it has registers left. No innermost loop may touch them.
    Of a forward kernel in half precision a multiprocessor runs two programs or more, or it stands in
    ONE_RESIDENT with the reason.
    """
    if "registers" not in figures or figures.get("resident") == 0:
        return [f"{name}: does not fit, it takes {figures['shared']} bytes of shared memory"]
    broken = []
    registers = min(255, 65536 // (32 * figures["warps"]))
    few = figures["stack"] <= FEW_BYTES and figures.get("stack_in_loops") == 0
    chosen = " half " not in name and figures["registers"] < registers and few
    if figures["stack"] > EXCUSED.get((version, target, name), 0) and not chosen:
        inside = f", {figures['stack_in_loops']} accesses in loops" if "stack_in_loops" in figures else ""
        broken.append(f"{name}: {figures['stack']} bytes of stack{inside}, {figures['registers']} registers")
    multiplies = " half " in name and not name.startswith(WITHOUT_PRODUCTS)
    if multiplies and not figures["tensor_core"]:
        broken.append(f"{name}: no tensor-core instructions")
    if figures.get("atomics") and not name.startswith(WITH_ATOMICS):
        broken.append(f"{name}: {figures['atomics']} atomics")
    if is_forward(name) and figures.get("resident") == 1 and not one_resident(target, name):
        broken.append(f"{name}: one program a multiprocessor")
    return broken


def is_forward(name: str) -> bool:
    return name.startswith(FORWARD)


def one_resident(target: str, name: str) -> str | None:
    """Why a forward kernel may have a multiprocessor to itself, None if it may not."""
    found = (
        reason
        for (where, start), reason in ONE_RESIDENT.items()
        if where == target and name.startswith(start)
    )
    return next(found, None)


def resident_table(budget: Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]) -> str:
    """Programs that a multiprocessor runs at once, of each forward kernel in half precision, as Markdown.

    Of the first configuration of a key, with and without dropout and in both Triton versions: the fewest
    programs, the most registers and the most shared memory. Then why some run alone.
    """
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHITECTURES) + " |", "|---" * 4 + "|"]
    for said, start in RESIDENT.items():
        cells = []
        for arch in ARCHITECTURES:
            tables = [targets[f"sm_{arch}"] for targets in budget.values()]
            first = next(name for name in tables[-1] if name.startswith(start))
            stem = first.removesuffix(", one chunk")
            found = [f for table in tables for name, f in table.items() if name.startswith(stem)]
            registers, shared = (max(f[key] for f in found) for key in ("registers", "shared"))
            programs = min(f["resident"] for f in found)
            cells.append(f"{programs} ({registers}, {shared / 1024:.0f} KiB)")
        lines.append(f"| {said} | {' | '.join(cells)} |")
    alone: dict[tuple[str, str], list[str]] = {}
    for (target, start), reason in ONE_RESIDENT.items():
        alone.setdefault((start, reason), []).append(target)
    lines.append("")
    lines += [f"- `{start}` on {', '.join(found)}: {reason}." for (start, reason), found in alone.items()]
    return "\n".join(lines)


def worse(name: str, figures: Mapping[str, int], recorded: Mapping[str, int]) -> list[str]:
    """In what a kernel exceeds what was recorded."""
    found = []
    for key, more in (("registers", MORE_REGISTERS), ("stack", 0), ("shared", 0), ("atomics", 0)):
        if figures.get(key, 0) > recorded.get(key, 0) + more:
            found.append(f"{name}: {figures[key]} {key}, recorded are {recorded.get(key, 0)}")
    if recorded.get("tensor_core") and not figures.get("tensor_core"):
        found.append(f"{name}: no tensor-core instructions, recorded are {recorded['tensor_core']}")
    return found


def read() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """What was recorded: figures by Triton version, target ("sm_90") and name."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def write(budget: Mapping[str, Mapping[str, Mapping[str, Mapping[str, int]]]]) -> None:
    """Record, a kernel a line."""
    versions = []
    for version, targets in sorted(budget.items()):
        tables = []
        for target, entries in sorted(targets.items(), key=lambda pair: (len(pair[0]), pair[0])):
            lines = [f"   {json.dumps(name)}: {json.dumps(figures)}" for name, figures in entries.items()]
            tables.append(f"  {json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n  }")
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(tables) + "\n }")
    FILE.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def targets(architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, list[str]]:
    """The names that are shipped, by target."""
    names = {f"sm_{arch}": [item.name for item in shipped(arch)] for arch in architectures}
    return names | {AMD: [item.name for item in one_of_each_kernel()]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="record the figures")
    parser.add_argument("--arch", nargs="+", default=[*map(str, ARCHITECTURES), AMD], help="80 90 100 gfx942")
    parser.add_argument("--only", default="", help="kernels whose name has this text")
    parser.add_argument("--resident", action="store_true", help="print the table of resident programs")
    options = parser.parse_args()
    if options.resident:
        print(resident_table(read()))
        return 0
    budget, said = read(), []
    for arch in options.arch:
        target = arch if arch == AMD else f"sm_{arch}"
        recorded = budget.get(VERSION, {}).get(target, {})
        items = list(one_of_each_kernel() if arch == AMD else shipped(int(arch)))
        found = {}
        for item in items:
            if options.only not in item.name:
                continue
            figures = measure_amd(item) if arch == AMD else measure(item, int(arch))
            found[item.name] = figures
            print(
                f"{target} {item.name}: {', '.join(f'{n} {key}' for key, n in figures.items())}", flush=True
            )
            problems = broken_rules(item.name, figures, target)
            if not options.write:
                problems += worse(item.name, figures, recorded.get(item.name, {}))
            said += [f"{target} {problem}" for problem in problems]
        if options.write:
            names = [item.name for item in items]
            merged = {name: found.get(name) or recorded.get(name) for name in names}
            kept = {name: figures for name, figures in merged.items() if figures}
            budget.setdefault(VERSION, {})[target] = kept
            write(budget)
    print(f"Triton {VERSION}: {len(said)} problems")
    print("\n".join(said))
    return bool(said)


if __name__ == "__main__":
    sys.exit(main())
