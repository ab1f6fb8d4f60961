"""The budget: what the compiler makes of every shipped launch configuration, against what it made before.

    python tests/kernels/budget.py                      compare all with budget.json, no GPU needed
    python tests/kernels/budget.py --arch 90            for one architecture
    python tests/kernels/budget.py --only "cross"       kernels whose name has this text
    python tests/kernels/budget.py --write              record the figures of the running Triton version

Kernels are compiled exactly as the operators launch them (`harness.fake_driver`), with the packed projections
of twelve heads, and what makes the code largest: bf16 for half precision, the unimodal and the causal part
side by side, samples grouped by image, a visibility mask, several chunks of image tokens, and what the
backward needs kept. To keep the list short, bf16 stands for fp16, tiles of one sample are square, and the
first configuration for a dtype and head dim is compiled with and without dropout, those behind it, taken only
where the first does not fit, with dropout alone.

Rules that hold whatever was recorded are in `broken_rules`, what counts as worse than recorded in `worse`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from harness import fake_driver
from harness.compile_report import compile_kernel, report, resident_programs

from blip2_kernels.ops import launching
from blip2_kernels.ops.cross_attention import launch as cross_launch
from blip2_kernels.ops.cross_attention.triton import op as cross_op
from blip2_kernels.ops.launching import Config, LaunchTable
from blip2_kernels.ops.self_attention import launch as self_launch
from blip2_kernels.ops.self_attention.triton import op as self_op

FILE = Path(__file__).with_name("budget.json")
ARCHITECTURES = (80, 90, 100)
AMD = "gfx942"
"""Compiled for once a kernel: that it compiles and multiplies matrices."""
MORE_REGISTERS = 4
"""How many more than recorded are let pass."""
FEW_BYTES = 32
"""See `broken_rules`."""
EXCUSED = {
    ("sm_80", "self backward half narrow tile 64x64, dropout"): 24,
    ("sm_80", "self backward half narrow tile 128x128, dropout"): 80,
    ("sm_80", "cross backward shared half narrow blocks 32x32, 4 warps, 1 stages, dropout"): 8,
    ("sm_80", "self backward rows half narrow blocks 32x16, 4 warps, 1 stages, dropout"): 8,
    ("sm_80", "cross backward alone half wide blocks 32x32, 8 warps, 1 stages"): 16,
    ("sm_80", "cross backward keys half wide blocks 32x32, 8 warps, 1 stages"): 8,
    ("sm_80", "cross backward keys half wide blocks 32x32, 4 warps, 1 stages, dropout"): 8,
    ("sm_90", "cross backward alone half narrow blocks 32x64, 4 warps, 3 stages, dropout"): 48,
    ("sm_90", "cross backward keys half wide blocks 32x32, 4 warps, 1 stages, dropout"): 8,
    ("sm_100", "self backward half narrow tile 128x128"): 8,
    ("sm_100", "self backward rows half narrow blocks 32x16, 4 warps, 1 stages, dropout"): 16,
    ("sm_100", "self backward rows half wide blocks 64x64, 8 warps, 1 stages"): 24,
    ("sm_100", "cross backward alone half narrow blocks 32x64, 4 warps, 2 stages, dropout"): 24,
    ("sm_100", "cross backward shared half narrow blocks 64x32, 4 warps, 1 stages, dropout"): 8,
    ("sm_100", "cross backward shared half wide blocks 64x32, 8 warps, 1 stages, dropout"): 8,
    ("sm_100", "cross backward alone half wide blocks 32x32, 4 warps, 1 stages, dropout"): 8,
    ("sm_100", "cross backward keys half wide blocks 32x32, 4 warps, 1 stages, dropout"): 8,
    (AMD, "cross backward shared half narrow blocks 128x64, 8 warps, 2 stages, dropout"): 1528,
    (AMD, "cross backward keys half narrow blocks 64x64, 8 warps, 1 stages, dropout"): 476,
}
"""Bytes of stack that are let pass, by target and name, in the Triton version that spills more: tiles that
fill their warps' registers, most of them in one of the two versions only. No table is made for AMD, which
takes the default."""
VERSION = ".".join(triton.__version__.split(".")[:2])

HEADS = 12
KINDS = {
    ("half", "narrow"): (torch.bfloat16, 64),
    ("half", "wide"): (torch.bfloat16, 128),
    ("fp32", "narrow"): (torch.float32, 64),
    ("fp32", "wide"): (torch.float32, 128),
}
"""Dtype and head dim that stand for a key of the launch tables."""


@dataclass(frozen=True)
class Shipped:
    """One kernel in one configuration that may be launched.

    Attributes:
        name: which it is, in words.
        kernel: the kernel's own name.
        call: launches it, perhaps after others.
        tables: what to launch with, for each table that is asked.
    """

    name: str
    kernel: str
    call: Callable[[], None]
    tables: tuple[tuple[LaunchTable, Config], ...] = ()

    @property
    def half(self) -> bool:
        return " half " in self.name


def shipped(arch: int) -> Iterator[Shipped]:
    """Every kernel and configuration that the operators launch on an architecture."""
    yield from _self_tiles()
    yield from _self_blocks(arch)
    yield from _cross(arch)


def _self_tiles() -> Iterator[Shipped]:
    for kind, (dtype, head_dim) in KINDS.items():
        for rows in (16, 32, 64, 128):
            if rows > self_launch.one_tile_rows(dtype, head_dim):
                continue
            for dropout in (0.0, 0.1):
                end = f"{' '.join(kind)} tile {rows}x{rows}{_said(dropout)}"
                for direction, kernel in (
                    ("forward", "forward_kernel"),
                    ("backward", "backward_tile_kernel"),
                ):
                    call = _call(_self, kind, rows, dropout, direction == "backward")
                    yield Shipped(f"self {direction} {end}", kernel, call)


def _self_blocks(arch: int) -> Iterator[Shipped]:
    for kind in KINDS:
        for config, dropout in _choices(self_launch.FORWARD, arch, kind):
            call = _call(_self, kind, 1024, dropout, False)
            name = f"self forward {_named(kind, config, dropout)}"
            yield Shipped(name, "forward_kernel", call, ((self_launch.FORWARD, config),))
        for config, dropout in _choices(self_launch.BACKWARD, arch, kind):
            call = _call(_self, kind, 1024, dropout, True)
            for part in ("rows", "keys"):
                name = f"self backward {part} {_named(kind, config, dropout)}"
                yield Shipped(name, f"backward_{part}_kernel", call, ((self_launch.BACKWARD, config),))


def _cross(arch: int) -> Iterator[Shipped]:
    yield Shipped("cross group", "group_kernel", _call(_cross_forward, ("half", "narrow"), 0.0, "one"))
    for kind in KINDS:
        first = cross_launch.FORWARD.configs(arch, kind)[0]
        for config, dropout in _choices(cross_launch.FORWARD, arch, kind):
            tables = ((cross_launch.FORWARD, config),)
            # What most images have, what makes the code largest, and what a small batch is given.
            for chunks in ("one", "many", "split") if config is first else ("many",):
                name = (
                    f"cross forward {_named(kind, config, dropout)}, {chunks} chunk{'s' * (chunks != 'one')}"
                )
                call = _call(_cross_forward, kind, dropout, chunks)
                yield Shipped(
                    name.replace("split chunks", "a chunk a program"), "forward_kernel", call, tables
                )
            if dropout:
                name = f"cross merge {' '.join(kind)} {config['BLOCK_M']} rows"
                if config["BLOCK_M"] not in _rows_before(cross_launch.FORWARD.configs(arch, kind), config):
                    yield Shipped(name, "merge_kernel", _call(_cross_forward, kind, dropout, "split"), tables)
        for table, grouped, what in (
            (cross_launch.BACKWARD_SHARED, True, "shared"),
            (cross_launch.BACKWARD_ALONE, False, "alone"),
        ):
            for config, dropout in _choices(table, arch, kind):
                name = f"cross backward {what} {_named(kind, config, dropout)}"
                call = _call(_cross_backward, kind, dropout, grouped)
                yield Shipped(name, "backward_rows_kernel", call, ((table, config),))
        shared = cross_launch.BACKWARD_SHARED.configs(arch, kind)[-1]
        for config, dropout in _choices(cross_launch.BACKWARD_KEYS, arch, kind):
            name = f"cross backward keys {_named(kind, config, dropout)}"
            tables = ((cross_launch.BACKWARD_SHARED, shared), (cross_launch.BACKWARD_KEYS, config))
            call = _call(_cross_backward, kind, dropout, True)
            yield Shipped(name, "backward_keys_kernel", call, tables)


def _choices(table: LaunchTable, arch: int, kind: tuple[str, str]) -> Iterator[tuple[Config, float]]:
    """Configurations, and the dropout each is compiled with."""
    for i, config in enumerate(table.configs(arch, kind)):
        if i == 0:
            yield config, 0.0
        yield config, 0.1


def _rows_before(configs: tuple[Config, ...], config: Config) -> set[int]:
    return {other["BLOCK_M"] for other in configs[: configs.index(config)]}


def _said(dropout: float) -> str:
    return ", dropout" if dropout else ""


def _named(kind: tuple[str, str], config: Config, dropout: float) -> str:
    sizes = f"{config['BLOCK_M']}x{config['BLOCK_N']}, {config.num_warps} warps, {config.num_stages} stages"
    return f"{' '.join(kind)} blocks {sizes}{_said(dropout)}"


# -------------------------------------------------------------------------------------------------- the calls


def _call(function: Callable, *args: object) -> Callable[[], None]:
    return lambda: function(*args)


def _integers(size: int = 16) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32)


def _self(kind: tuple[str, str], rows: int, dropout: float, backward: bool) -> None:
    """Samples of that many rows, half of them queries, beside a unimodal text as long."""
    dtype, head_dim = KINDS[kind]
    half = rows // 2
    sizes = self_op.Sizes(2, 3, 3, 3, 3, half, half, half, half, rows, rows, causal=1, need_backward=1)
    q, k, v = torch.empty(2, 3, HEADS, head_dim, dtype=dtype).unbind(1)
    key = torch.tensor(1) if dropout else None
    layout = (*(_integers() for _ in self_op.Rows._fields), key, list(sizes), 0.125, dropout, 3)
    if not backward:
        self_op._run_forward(q, k, v, *layout)
        return
    grad = torch.empty(q.shape, dtype=dtype)
    self_op._run_backward(grad, q, k, v, torch.empty(q.shape[:2]), *layout)


def _cross_tensors(kind: tuple[str, str], dropout: float, grouped: bool, tokens: int) -> tuple:
    """q, k and v of samples of 32 queries, then what the operators take of images and dropout."""
    dtype, head_dim = KINDS[kind]
    samples, images = 64, 32 if grouped else 64
    q = torch.empty(1, dtype=dtype).expand(samples, 32, HEADS, head_dim)
    q = torch.empty_like(q, memory_format=torch.contiguous_format)
    k, v = torch.empty(images, tokens, 2, HEADS, head_dim, dtype=dtype).unbind(2)
    index = _integers(samples) if grouped else None
    visible = torch.empty(images, tokens, dtype=torch.uint8)
    key, row_keys = (torch.tensor(1), _integers()) if dropout else (None, None)
    return q, k, v, index, visible, row_keys, key, 0.125, dropout, 3


def _cross_forward(kind: tuple[str, str], dropout: float, chunks: str) -> None:
    tokens = 257 if chunks == "one" else 677
    split = mock.patch.object(cross_launch, "split_chunks", lambda *_: chunks == "split")
    with split:
        cross_op._run_forward(*_cross_tensors(kind, dropout, True, tokens), True)


def _cross_backward(kind: tuple[str, str], dropout: float, grouped: bool) -> None:
    q, *given = _cross_tensors(kind, dropout, grouped, 257)
    cross_op._run_backward(torch.empty_like(q), q, *given[:2], torch.empty(q.shape[:3]), *given[2:])


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
        "shared": found.shared_bytes,
        "tensor_core": found.tensor_core,
        "warps": found.num_warps,
        "resident": resident_programs(found, arch),
    }


def one_of_each_kernel() -> Iterator[Shipped]:
    """The kernels that are compiled for AMD: each once, the first in half precision with dropout."""
    seen = set()
    for item in shipped(0):
        direction = item.name.split(" half ")[0].split(" fp32 ")[0]
        plain = item.name == "cross group" or "merge" in item.name
        if direction not in seen and (plain or (item.half and "dropout" in item.name)):
            seen.add(direction)
            yield item


def measure_amd(item: Shipped) -> dict[str, int]:
    """What a kernel takes on AMD, compiled as it is launched on an NVIDIA GPU."""
    made = compiled(item, 90)
    module = "group" if item.kernel == "group_kernel" else "forward"
    module = "backward" if item.kernel.startswith("backward") else module
    package = f"blip2_kernels.ops.{item.name.split()[0]}_attention.triton.{module}"
    kernel = getattr(sys.modules[package], item.kernel)
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
        "warps": found.num_warps,
    }


# -------------------------------------------------------------------------------------------------- comparing


def broken_rules(name: str, figures: Mapping[str, int], target: str) -> list[str]:
    """What no configuration may do, whatever was recorded: not fit, spill, miss the tensor cores.

    In fp32 the compiler may put up to FEW_BYTES a thread aside to let one more program be resident, which it
    does where it has registers left.
    """
    if "registers" not in figures or figures.get("resident") == 0:
        return [f"{name}: does not fit, it takes {figures['shared']} bytes of shared memory"]
    broken = []
    registers = min(255, 65536 // (32 * figures["warps"]))
    chosen = " half " not in name and figures["registers"] < registers and figures["stack"] <= FEW_BYTES
    if figures["stack"] > EXCUSED.get((target, name), 0) and not chosen:
        broken.append(f"{name}: {figures['stack']} bytes of stack, {figures['registers']} registers")
    if " half " in name and "merge" not in name and not figures["tensor_core"]:
        broken.append(f"{name}: no tensor-core instructions")
    return broken


def worse(name: str, figures: Mapping[str, int], recorded: Mapping[str, int]) -> list[str]:
    """In what a kernel exceeds what was recorded."""
    found = []
    for key, more in (("registers", MORE_REGISTERS), ("stack", 0), ("shared", 0)):
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
    options = parser.parse_args()
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
