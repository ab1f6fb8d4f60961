"""The compile report: what a GPU's compiler made of a kernel, read from the binary; no GPU needed.

    compiled = compile_kernel(kernel, {"x_ptr": "*bf16", "length": "i32"}, {"BLOCK": 64}, target=90)
    report(compiled).registers

    with fake_driver.drive(90) as recorder:
        some_op(*tensors)
    reports = [report(compilation) for compilation in recorder.compilations]  # compiled exactly as launched

Both need a process in which Triton compiles: see `harness.fresh_process`. NVIDIA binaries are read with the
cuobjdump that Triton brings along (or the one TRITON_CUOBJDUMP_PATH names), AMD's from the assembly.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel


class Compiled(Protocol):
    """What `report` reads: Triton's CompiledKernel, or the fake driver's Compilation."""

    name: str
    metadata: Any
    asm: Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """What one kernel takes and consists of; `dataclasses.asdict` makes JSON of it.

    Attributes:
        kernel: its name.
        target: "sm_90", "gfx942", …
        num_warps: warps a program.
        registers: a thread; vector registers on AMD.
        scalar_registers: a wave on AMD, 0 on NVIDIA.
        stack_bytes: a thread: spilled registers, and arrays that are indexed at run time.
        spilled_registers: a thread; on NVIDIA what would fill the stack.
        shared_bytes: a program.
        tensor_memory: columns a program, on Blackwell.
        mma: tensor-core instructions of a warp (HMMA, IMMA, …).
        wgmma: of four warps together, on Hopper (HGMMA, …).
        tcgen05: from tensor memory, on Blackwell (UTCHMMA, …).
        mfma: on AMD, WMMA too.
        local_loads, local_stores: instructions that access the stack.
        local_in_loops: of them, those in an innermost loop; 0 on AMD, where this is not looked for.
        atomics: on global memory, with and without a result.
        barriers: of a whole program.
        instructions: in all.
    """

    kernel: str
    target: str
    num_warps: int
    registers: int
    scalar_registers: int
    stack_bytes: int
    spilled_registers: int
    shared_bytes: int
    tensor_memory: int
    mma: int
    wgmma: int
    tcgen05: int
    mfma: int
    local_loads: int
    local_stores: int
    local_in_loops: int
    atomics: int
    barriers: int
    instructions: int

    @property
    def tensor_core(self) -> int:
        """Tensor-core instructions of any kind."""
        return self.mma + self.wgmma + self.tcgen05 + self.mfma

    @property
    def spills(self) -> bool:
        return self.spilled_registers > 0 or self.local_loads + self.local_stores > 0


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    target: int | str,
    divisible: Collection[str] | None = None,
    num_warps: int = 4,
    **options: Any,
) -> CompiledKernel:
    """Compile a kernel for a GPU that is not there.

    Args:
        kernel: a `@triton.jit` function.
        signature: type of each parameter that is not constant: "*bf16", "i32", "fp32", …
        constants: the others.
        target: compute capability of an NVIDIA GPU (80, 90, 100, …), or an AMD architecture ("gfx942").
        divisible: parameters that are multiples of 16; default the pointers.
        options: num_stages, maxnreg and others of Triton.
    """
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    if divisible is None:
        divisible = [name for name, kind in types.items() if kind.startswith("*")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, types, dict(constants), attributes)
    gpu = GPUTarget("cuda", target, 32) if isinstance(target, int) else GPUTarget("hip", target, 64)
    return triton.compile(source, gpu, {"num_warps": num_warps, "enable_fp_fusion": True} | options)


def report(compiled: Compiled) -> Report:
    """Read what the compiler made.

    Raises:
        ValueError: there is no binary, as the kernel does not fit its GPU.
        RuntimeError: Triton finds no cuobjdump.
    """
    metadata = compiled.metadata
    if metadata.target.backend == "hip":
        found = _read_amd(compiled.asm["amdgcn"])
    elif "cubin" in compiled.asm:
        found = _read_nvidia(compiled.name, compiled.asm["cubin"])
    else:
        raise ValueError(f"{compiled.name}: not loaded: it takes {metadata.shared} bytes of shared memory")
    return Report(
        kernel=compiled.name,
        target=f"sm_{metadata.target.arch}" if metadata.target.backend == "cuda" else metadata.target.arch,
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        **found,
    )


def _read_nvidia(name: str, binary: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing of {name}: {text[:1000]}")
    registers, stack = map(int, usage.groups())
    # A line of code: its address, perhaps a predicate, and the instruction with its suffixes behind a dot.
    counts = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", text, re.MULTILINE))
    return {
        "registers": registers,
        "scalar_registers": 0,
        "stack_bytes": stack,
        "spilled_registers": stack // 4,
        "mma": _total(counts, r"[A-FH-Z]MMA"),
        "wgmma": _total(counts, r"[A-Z]GMMA"),
        "tcgen05": _total(counts, r"UTC[A-Z]*MMA"),
        "mfma": 0,
        "local_loads": _total(counts, "LDL"),
        "local_stores": _total(counts, "STL"),
        "local_in_loops": _local_in_loops(text),
        "atomics": _total(counts, "ATOMG?|REDG?"),
        "barriers": _total(counts, "BAR"),
        "instructions": counts.total() - counts["NOP"],
    }


def _local_in_loops(text: str) -> int:
    """Instructions that access the stack in a loop without another in it. A loop is what branches to one
    place jump back over, and has a memory access: waiting for a barrier is none."""
    code = [(int(at, 16), said) for at, said in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.M)]
    branches = [(re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", said), at) for at, said in code]
    ends = {int(found[1], 16): at for found, at in branches if found and int(found[1], 16) < at}
    memory = [at for at, said in code if re.search(r"\b(LD|ST|RED|ATOM)[A-Z]*\b", said)]
    loops = {b: e for b, e in ends.items() if any(b <= at <= e for at in memory)}
    innermost = [
        (begin, end)
        for begin, end in loops.items()
        if not any(begin < b and e <= end for b, e in loops.items())
    ]
    accesses = [at for at, said in code if re.search(r"\b(LDL|STL)\b", said)]
    return sum(any(begin <= at <= end for begin, end in innermost) for at in accesses)


def _read_amd(text: str) -> dict[str, int]:
    counts = Counter(re.findall(r"^\t([a-z]\w*)", text, re.MULTILINE))

    def noted(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    return {
        "registers": noted("vgpr_count"),
        "scalar_registers": noted("sgpr_count"),
        "stack_bytes": noted("private_segment_fixed_size"),
        "spilled_registers": noted("vgpr_spill_count") + noted("sgpr_spill_count"),
        "mma": 0,
        "wgmma": 0,
        "tcgen05": 0,
        "mfma": _total(counts, r"v_s?w?mf?mac?_\w+"),
        "local_loads": _total(counts, r"scratch_load_\w+"),
        "local_stores": _total(counts, r"scratch_store_\w+"),
        "local_in_loops": 0,
        "atomics": _total(counts, r"(global|flat|buffer)_atomic_\w+"),
        "barriers": _total(counts, r"s_barrier\w*"),
        "instructions": counts.total(),
    }


def _total(counts: Counter, pattern: str) -> int:
    return sum(count for name, count in counts.items() if re.fullmatch(pattern, name))


# -------------------------------------------------------------------------------------------------- occupancy


class Multiprocessor(NamedTuple):
    """What the programs that run on one multiprocessor share.

    Attributes:
        shared: bytes of shared memory.
        warps, programs: at most.
    """

    shared: int
    warps: int
    programs: int


MULTIPROCESSORS = {
    80: Multiprocessor(164 * 1024, 64, 32),
    86: Multiprocessor(100 * 1024, 48, 16),
    89: Multiprocessor(100 * 1024, 48, 24),
    90: Multiprocessor(228 * 1024, 64, 32),
    100: Multiprocessor(228 * 1024, 64, 32),
    120: Multiprocessor(100 * 1024, 48, 24),
}
PARTITIONS = 4
"""Of a multiprocessor; a warp runs in one of them."""
REGISTERS_OF_PARTITION = 16384
REGISTER_UNIT = 256
"""Registers are given to a warp in multiples of this."""
SHARED_UNIT = 128
RESERVED_SHARED = 1024
"""Bytes of shared memory that each program has beyond its own."""
TENSOR_MEMORY = 512
"""Columns, on Blackwell."""


def resident_programs(report: Report, arch: int | None = None) -> int:
    """How many programs of a kernel one multiprocessor runs at once; 0 if it does not fit.

    Args:
        arch: compute capability of the GPU (86 runs what was compiled for 80); default the report's own.

    Raises:
        ValueError: an architecture that is not in MULTIPROCESSORS.
    """
    if arch is None and report.target.startswith("sm_"):
        arch = int(report.target.removeprefix("sm_"))
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"arch: expected one of {sorted(MULTIPROCESSORS)}, got {arch or report.target}")
    limits = MULTIPROCESSORS[arch]
    registers_of_warp = _round_up(report.registers * 32, REGISTER_UNIT)
    warps = min(limits.warps, REGISTERS_OF_PARTITION // registers_of_warp * PARTITIONS)
    programs = [limits.programs, warps // report.num_warps]
    programs.append(limits.shared // (_round_up(report.shared_bytes, SHARED_UNIT) + RESERVED_SHARED))
    if report.tensor_memory:
        programs.append(TENSOR_MEMORY // report.tensor_memory)
    return min(programs)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
