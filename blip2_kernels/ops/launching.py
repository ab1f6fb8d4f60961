"""How a Triton kernel is launched: on which devices, in which configuration, at what cost in Python.

A kernel here takes its pointers and numbers by position, then its constexprs by name:

    kernel(q_ptr, …, row_stride, …, NUM: tl.constexpr, …, BLOCK_M: tl.constexpr, …)

The blocks, warps and stages come from a `Config` of the op's `launch.py`; nothing is tuned at run time. This
module imports Triton only when a kernel is launched: everything else works without it.
"""

import importlib.util
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels compute on."""

MINIMUM_CAPABILITY = (8, 0)
"""bf16 tensor cores and asynchronous copies begin here."""

WARPS_ALONE = (80, 86, 87, 89, 120, 121)
"""Architectures on which each warp multiplies what it holds in registers: tiles are smaller there."""

BLACKWELL = (100, 103)
"""Where products come from tensor memory, and every tile of them passes through registers."""


@dataclass(frozen=True)
class Config:
    """One way to launch a kernel.

    Attributes:
        blocks: its block sizes by constexpr name.
        num_warps: warps a program.
        num_stages: depth of the software pipeline of its loops.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int = 2

    @classmethod
    def of(cls, num_warps: int, num_stages: int = 2, **blocks: int) -> "Config":
        return cls(tuple(sorted(blocks.items())), num_warps, num_stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in self.blocks)
        return f"{sizes}, {self.num_warps} warps, {self.num_stages} stages"


class LaunchTable:
    """Configurations of a kernel, as data: what is asked for, by architecture, with a default for the others.

    Args:
        default: configurations by key, best first; the key is the kernel's own (dtype, head dim, tile).
        architectures: those that differ, by compute capability (80, 90, …).
    """

    def __init__(
        self,
        default: Mapping[Hashable, tuple[Config, ...]],
        architectures: Mapping[int, Mapping[Hashable, tuple[Config, ...]]] | None = None,
    ) -> None:
        self.default = dict(default)
        self.architectures = {number: dict(table) for number, table in (architectures or {}).items()}
        self._override: tuple[Config, ...] | None = None

    def configs(self, architecture: int, key: Hashable) -> tuple[Config, ...]:
        """Configurations for a key, best first."""
        if self._override is not None:
            return self._override
        return self.architectures.get(architecture, {}).get(key) or self.default[key]

    @contextmanager
    def overridden(self, *configs: Config) -> Iterator[None]:
        """Use these configurations, best first, whatever is asked for: for measuring and for tests."""
        before, self._override = self._override, configs
        try:
            yield
        finally:
            self._override = before


def power_of_two(n: int) -> int:
    """The smallest power of two >= n; 1 for n <= 1."""
    return 1 << max(n - 1, 0).bit_length()


SMALLEST_TILE = 16
"""`tl.dot` takes no less."""


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python on CPU tensors (TRITON_INTERPRET=1), as tests do."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def _device_reason(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None if interpreting() else "Triton needs a CUDA device, the tensors are on the CPU"
    return _other_device_reason(device)


@cache
def _other_device_reason(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return f"Triton needs a CUDA device, the tensors are on {device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY:
        return f"the kernels need compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    return None


def supports(tensors: Mapping[str, Tensor], max_head_dim: int | None = None) -> str | None:
    """None where the kernels can take these tensors, else the reason.

    Args:
        tensors: by argument name, all on one device and of one dtype.
        max_head_dim: largest last dimension.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            return (
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}, the kernels take fp16, bf16 and fp32"
            )
        if max_head_dim is not None and tensor.shape[-1] > max_head_dim:
            return f"{name} has head dim {tensor.shape[-1]}, the kernels take at most {max_head_dim}"
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of {name} is not contiguous (its stride is {tensor.stride(-1)})"
    return _device_reason(next(iter(tensors.values())).device)


def architecture(device: torch.device) -> int:
    """Compute capability as one number (80, 90, …); 0 for the interpreter and for other vendors."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def input_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies fp32: exactly, unless torch allows tf32 for matrix products."""
    if dtype != torch.float32:
        return "ieee"
    switches = torch.backends.cuda.matmul
    # Where there is the newer switch, reading the older one raises as soon as someone has used the newer.
    if hasattr(switches, "fp32_precision"):
        return "tf32" if switches.fp32_precision == "tf32" else "ieee"
    return "tf32" if switches.allow_tf32 else "ieee"


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last, tensor by tensor.

    PyTorch may report any stride for a dimension of size 1, and a kernel must not be compiled anew for it:
    such a dimension gets the stride it would have if the tensor were contiguous.
    """
    found: list[int] = []
    for tensor in tensors:
        shape, own = tensor.shape, list(tensor.stride())
        if 1 in shape:
            contiguous = 1
            for i in range(len(shape) - 1, -1, -1):
                if shape[i] == 1:
                    own[i] = contiguous
                contiguous *= max(shape[i], 1)
        found.extend(own[:-1])
    return tuple(found)


def wide(*tensors: Tensor) -> bool:
    """Whether an offset into one of the tensors, or into a contiguous one of its size (an output, a
    gradient), can pass 2**31, in elements: kernels use int64 then.
    """
    for tensor in tensors:
        if tensor.numel() >= 2**31:
            return True
        reach = 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            reach += (size - 1) * stride
        if reach >= 2**31:
            return True
    return False


# ------------------------------------------------------------------------------------------------- launching


_compiled: dict[tuple, "_Compiled"] = {}
_too_large: dict[tuple, str] = {}
"""What the device said of configurations that did not fit, by op, device, what is compiled, configuration."""


def first_that_fits(
    name: str,
    device: torch.device,
    compiled_for: tuple[Hashable, ...],
    configs: Sequence[Config],
    run: Callable[[Config], T],
) -> T:
    """Run with the first configuration that fits the device's shared memory and registers.

    Args:
        name: of the op, for the message.
        device: where it runs.
        compiled_for: dtype, constants and whatever else decides how much a configuration takes: one that does
            not fit for fp32 or a wide head may well fit for others.
        configs: from the preferred one to the smallest.
        run: allocates its outputs and launches; nothing of a failed attempt is kept.

    Raises:
        RuntimeError: none fits; the message names them all.
    """
    from triton.runtime.errors import OutOfResources

    for config in configs:
        if _too_large and (name, device, compiled_for, config) in _too_large:
            continue
        try:
            return run(config)
        except OutOfResources as error:
            _too_large[name, device, compiled_for, config] = str(error)
    tried = "; ".join(f"({config}): {_too_large[name, device, compiled_for, config]}" for config in configs)
    raise RuntimeError(f"{name}: expected a launch configuration that fits this device, tried {tried}")


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple, constants: Mapping[str, Any], config: Config
) -> None:
    """Launch a kernel on the current stream of its tensors' device.

    The compiled form is looked up by what it depends on (dtypes, 16-byte alignment, the constants), which
    costs a few microseconds; Triton's own launch repeats its whole analysis.

    Args:
        kernel: a `@triton.jit` function.
        grid: programs along one to three axes; nothing happens if one of them is 0.
        args: tensors, numbers and None, the kernel's first parameters in order.
        constants: its constexprs, by name.
        config: its blocks, warps and stages.
    """
    grid = (*grid, *(1,) * (3 - len(grid)))
    if 0 in grid:
        return
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, args, constants, config)
    # The kernel and the configuration by identity, which is quicker to hash; the entry keeps both alive.
    key = (id(kernel), id(config), device, *constants.values(), *[_specialisation(arg) for arg in args])
    found = _compiled.get(key)
    if found is not None:
        found.compiled[grid](*args, *found.constants)
        return
    named = {**constants, **dict(config.blocks)}
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        # Triton 3.10 changes the default; the results must not change with it.
        "enable_fp_fusion": True,
    }
    compiled = kernel[grid](*args, **named, **options)
    if hasattr(kernel, "device_caches"):  # it is compiled, not interpreted
        values = tuple(named[name] for name in kernel.arg_names[len(args) :])
        _compiled[key] = _Compiled(compiled, values, kernel, config)


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A compiled kernel, the values of its constexprs in order, and what it was made of."""

    compiled: Any
    constants: tuple
    kernel: Any
    config: Config


def _specialisation(arg: Any) -> Any:
    """What Triton compiles for: dtype and alignment of a pointer, width and divisibility of an int."""
    kind = type(arg)
    if kind is int:
        return arg if arg == 1 else 4 * (arg % 16 == 0) + 8 * (-(2**31) <= arg < 2**31)
    if kind is float or arg is None:
        return kind
    return arg.dtype, arg.data_ptr() % 16
