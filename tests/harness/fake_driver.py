"""The fake driver: Triton's own launch path, `kernel[grid](...)`, for a GPU that is not there.

    with drive(90) as recorder:
        some_op(*cpu_tensors)  # whatever launches compiled kernels
    recorder.launches, recorder.compilations

Arguments are bound and specialised, kernels compiled for the architecture, and its shared memory limits
launches, by Triton itself: `OutOfResources` is raised where a GPU would raise it. Only the last step, handing
the kernel to the GPU, is replaced by a record. Tensors are CPU tensors, of which only dtype and address are
looked at; nothing is computed, so outputs stay as they were allocated.

A launch is checked against what its kernel was compiled for. Triton's own launcher does not do that, so code
that keeps compiled kernels (to launch them faster than Triton does) could hand one the wrong arguments
unnoticed.

It needs a process in which Triton compiles: see `harness.fresh_process`. One process may drive several GPUs
in turn; each begins with no kernel loaded, and refuses those that code under test kept from another.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, mangle_type


class Limits(NamedTuple):
    """Of one GPU, beyond what its architecture says to the compiler.

    Attributes:
        shared: bytes of shared memory a program can have.
        processors: multiprocessors, of a common model.
    """

    shared: int
    processors: int


LIMITS = {
    80: Limits(163 * 1024, 108),
    86: Limits(99 * 1024, 84),
    89: Limits(99 * 1024, 128),
    90: Limits(227 * 1024, 132),
    100: Limits(227 * 1024, 148),
    120: Limits(99 * 1024, 170),
}


class StaleKernel(Exception):
    """A compiled kernel was launched with arguments it was not compiled for."""


@dataclass(frozen=True, eq=False)
class Compilation:
    """A kernel as compiled for one specialisation; `compile_report.report` takes it.

    Attributes:
        name: of the kernel.
        signature: each parameter's type, such as "*bf16", "i32" or "constexpr".
        constants: parameters that are compiled in: constexprs, None, and integers that are 1.
        divisible: parameters taken to be multiples of 16 (pointers: addresses in bytes).
        metadata: Triton's: num_warps, num_stages, shared, target and more.
        asm: {"cubin": the binary}; empty where the kernel does not fit.
    """

    name: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: frozenset[str]
    metadata: Any = field(repr=False)
    asm: dict[str, bytes] = field(repr=False, default_factory=dict)


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel handed to the GPU.

    Attributes:
        kernel: its name.
        grid: programs along three axes.
        num_warps: warps a program.
        shared: bytes of shared memory a program.
        args: all parameters by name, constexprs too.
        compilation: of the kernel.
    """

    kernel: str
    grid: tuple[int, int, int]
    num_warps: int
    shared: int
    args: dict[str, Any] = field(repr=False)
    compilation: Compilation = field(repr=False)


@dataclass
class Recorder:
    """What happened since the driver was installed.

    Attributes:
        launches: in order.
        compilations: one for each specialisation that was made ready to launch, compiled or found in Triton's
            cache on disk; also those that turned out not to fit.
    """

    launches: list[Launch] = field(default_factory=list)
    compilations: list[Compilation] = field(default_factory=list)


@contextmanager
def drive(arch: int) -> Iterator[Recorder]:
    """Launch kernels on a GPU of this architecture (80, 86, 89, 90, 100, 120) that only keeps a record.

    Raises:
        ValueError: an architecture whose limits are not known.
        RuntimeError: Triton interprets kernels in this process.
    """
    if arch not in LIMITS:
        raise ValueError(f"arch: expected one of {sorted(LIMITS)}, got {arch!r}")
    if triton.knobs.runtime.interpret or not isinstance(tl.sum, JITFunction):
        raise RuntimeError("Triton interprets kernels in this process: see harness.fresh_process")
    recorder = Recorder()
    former = driver._active
    driver.set_active(_Driver(arch, recorder))
    try:
        yield recorder
    finally:
        driver._active = former


_numbers = itertools.count()


class _Driver:
    """What Triton asks of a driver. Each has its own device: Triton keeps loaded kernels by device."""

    def __init__(self, arch: int, recorder: Recorder) -> None:
        self.device = next(_numbers)
        self.arch = arch
        self.recorder = recorder
        self.utils = self
        self._loading: Compilation | None = None

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        limits = LIMITS[self.arch]
        return {
            "max_shared_mem": limits.shared,
            "multiprocessor_count": limits.processors,
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def launcher_cls(self, source: Any, metadata: Any) -> "_Launcher":
        """Triton makes a launcher, then loads the binary if it fits."""
        names = source.fn.arg_names
        compilation = Compilation(
            name=metadata.name,
            signature=dict(source.signature),
            constants={names[path[0]]: value for path, value in source.constants.items()},
            divisible=frozenset(names[path[0]] for path, marks in source.attrs.items() if _divisible(marks)),
            metadata=metadata,
        )
        self.recorder.compilations.append(compilation)
        self._loading = compilation
        return _Launcher(compilation, self)

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, str, int, int, int]:
        self._loading.asm["cubin"] = binary
        module, registers, spills, threads = 1, 0, 0, 1024
        return module, name, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass


def _divisible(marks: list) -> bool:
    return any(mark == "tt.divisibility" and value == 16 for mark, value in marks)


@dataclass(frozen=True)
class _Launcher:
    compilation: Compilation
    driver: _Driver

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args):
        made, metadata = self.compilation, self.compilation.metadata
        if driver.active is not self.driver:
            raise StaleKernel(f"{made.name}: loaded on another GPU, of architecture {self.driver.arch}")
        if len(args) != len(made.signature):
            raise StaleKernel(f"{made.name}: expected {len(made.signature)} arguments, got {len(args)}")
        named = dict(zip(made.signature, args, strict=True))
        for name, value in named.items():
            reason = _mismatch(made, name, value)
            if reason:
                raise StaleKernel(f"{made.name}: {name}: compiled for {reason}")
        launch = Launch(made.name, (x, y, z), metadata.num_warps, metadata.shared, named, made)
        self.driver.recorder.launches.append(launch)


def _mismatch(made: Compilation, name: str, value: Any) -> str | None:
    """What a parameter was compiled for, and what came, where they differ."""
    expected = made.signature[name]
    if name in made.constants:
        constant = made.constants[name]
        same = value is constant or (type(value) is type(constant) and value == constant)
        return None if same else f"the constant {constant!r}, got {value!r}"
    given = mangle_type(value)
    integers = {"i32": range(-(2**31), 2**31), "i64": range(-(2**63), 2**63), "u64": range(2**64)}
    if type(value) is int and expected in integers:
        if value not in integers[expected]:
            return f"{expected}, got {value}"
    elif given != expected:
        return f"{expected}, got {given}"
    number = value.data_ptr() if hasattr(value, "data_ptr") else value
    if name in made.divisible and number % 16:
        return f"multiples of 16, got {number % 16} more than one"
    return None
