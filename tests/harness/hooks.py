"""Where the interpreter guard takes hold of Triton's interpreter: around each launch, program and access."""

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import TensorWrapper

from harness.faults import KernelFault
from harness.memory import Memory
from harness.patches import Patches


@dataclass(frozen=True)
class Launch:
    """A kernel that ran to its end.

    Attributes:
        kernel: its name.
        grid: programs along the three axes.
    """

    kernel: str
    grid: tuple[int, int, int]


@dataclass
class Checks:
    """What a guard asks for, and what it saw.

    Attributes:
        races: whether to look for races between programs.
        order: in which programs run: "forward", "reversed", or the seed of a random order.
        launches: of kernels that ran to their end.
    """

    races: bool
    order: str | int
    launches: list[Launch] = field(default_factory=list)


class Hooks:
    """What is called around each launch, program and access, and what the running launch has done so far."""

    def __init__(self) -> None:
        self.checks: Checks | None = None
        self.memory = Memory(races=False)
        self.names: dict[tuple, str] = {}
        self.programs: list[tuple[int, int, int]] = []

    @contextmanager
    def checking(self, checks: Checks) -> Iterator[None]:
        """Let these checks stand in for the present ones for a while."""
        outer, self.checks = self.checks, checks
        try:
            yield
        finally:
            self.checks = outer
            if outer is not None:
                outer.launches += checks.launches

    def install(self, patches: Patches) -> None:
        patches.wrap(GridExecutor, "__call__", self._launching)
        patches.wrap(interpreter, "_implicit_cvt", self._converting)
        patches.wrap(InterpreterBuilder, "set_grid_dim", self._ordering)
        patches.wrap(InterpreterBuilder, "set_grid_idx", self._beginning_program)
        patches.wrap(InterpreterBuilder, "create_masked_load", self._loading)
        patches.wrap(InterpreterBuilder, "create_masked_store", self._storing)
        patches.wrap(InterpreterBuilder, "create_atomic_rmw", self._updating)
        patches.wrap(InterpreterBuilder, "create_atomic_cas", self._exchanging)
        patches.wrap(InterpreterBuilder, "create_barrier", self._ordering_threads)
        patches.wrap(InterpreterBuilder, "create_bitcast", _keeping_view)
        patches.wrap(InterpreterBuilder, "create_select", _merging_views)
        # In Triton 3.6 a loop's bounds cannot come from arguments with NumPy 2.4.
        patches.set(tl.tensor, "__index__", lambda value: int(value.handle.data.squeeze()))
        _accelerate(patches)

    # ------------------------------------------------------------------------------------- around a launch

    def _launching(self, original):
        def __call__(executor, *args, **kwargs):
            kernel = executor.fn.__name__
            self.memory = Memory(self.checks.races)
            self.names = _names(executor.arg_names, args, kwargs)
            try:
                # Integers wrap and infinities meet on a GPU, without a word.
                with np.errstate(all="ignore"), warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)
                    original(executor, *args, **kwargs)
            except InterpreterError as error:
                fault = _innermost(error)
                if not isinstance(fault, KernelFault):
                    raise
                fault.args = (f"{kernel}, program {interpreter.interpreter_builder.grid_idx}: {fault}",)
                raise fault from None
            self.checks.launches.append(Launch(kernel, interpreter.interpreter_builder.grid_dim))

        return __call__

    def _converting(self, original):
        def _implicit_cvt(arg):
            converted = original(arg)
            tensor = _tensor(arg)
            if tensor is not None:
                name = self.names.get(_identity(tensor), "a tensor")
                converted.handle.dtype.view = self.memory.add(tensor, name)
            return converted

        return _implicit_cvt

    def _ordering(self, original):
        def set_grid_dim(builder, *grid):
            original(builder, *grid)
            self.programs = list(np.ndindex(*grid))
            if self.checks.order == "reversed":
                self.programs.reverse()
            elif self.checks.order != "forward":
                random.Random(self.checks.order).shuffle(self.programs)

        return set_grid_dim

    def _beginning_program(self, original):
        def set_grid_idx(builder, x, y, z):
            _, height, depth = builder.grid_dim
            original(builder, *self.programs[(x * height + y) * depth + z])
            self.memory.begin_program()

        return set_grid_idx

    # ------------------------------------------------------------------------------------- around an access

    def _loading(self, original):
        def create_masked_load(builder, pointers, mask, *rest, **options):
            self.memory.access("load", pointers, np.asarray(mask.data), _size(pointers))
            return original(builder, pointers, mask, *rest, **options)

        return create_masked_load

    def _storing(self, original):
        def create_masked_store(builder, pointers, value, mask, *rest, **options):
            self.memory.access("store", pointers, np.asarray(mask.data), _size(pointers))
            return original(builder, pointers, value, mask, *rest, **options)

        return create_masked_store

    def _updating(self, original):
        def create_atomic_rmw(builder, operation, pointers, value, mask, *rest):
            self.memory.access("atomic", pointers, np.asarray(mask.data), _size(pointers))
            return original(builder, operation, pointers, value, mask, *rest)

        return create_atomic_rmw

    def _exchanging(self, original):
        def create_atomic_cas(builder, pointers, *rest):
            self.memory.access("atomic", pointers, None, _size(pointers))
            return original(builder, pointers, *rest)

        return create_atomic_cas

    def _ordering_threads(self, original):
        def create_barrier(builder, *args):
            self.memory.barrier()
            return original(builder, *args)

        return create_barrier


def _accelerate(patches: Patches) -> None:
    """Leave out what the interpreter does over and over: half of its time on small tiles."""
    # tl's functions are patched for the whole guard, not at each call of a function.
    patches.set(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
    patches.set(
        InterpretedFunction, "__call__", lambda function, *args, **kw: function.rewrite()(*args, **kw)
    )
    # int32 arithmetic is repeated in int64 for an assertion that only debug=True evaluates.
    builder = interpreter.interpreter_builder
    patches.set(builder, "options", replace(builder.options, sanitize_overflow=False))
    find, known = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    patches.set(interpreter, "_get_np_dtype", numpy_dtype)


def _size(pointers: TensorHandle) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _tensor(arg: object) -> torch.Tensor | None:
    """A tensor argument itself, or what a reinterpreted one (`triton.reinterpret`) holds."""
    arg = arg.base if isinstance(arg, TensorWrapper) else arg
    return arg if isinstance(arg, torch.Tensor) else None


def _identity(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _names(parameters: list[str], args: tuple, kwargs: dict) -> dict[tuple, str]:
    """The parameter each tensor of a launch is passed for, by address, shape and strides."""
    names: dict[tuple, str] = {}
    for name, arg in [*zip(parameters, args, strict=False), *kwargs.items()]:
        tensor = _tensor(arg)
        if tensor is not None:
            key = _identity(tensor)
            names[key] = f"{names[key]} or {name}" if key in names else name
    return names


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _keeping_view(original):
    """A pointer to bool becomes one to int8 on the way to memory: it still points to the same tensor."""

    def create_bitcast(builder, source, target):
        result = original(builder, source, target)
        view = getattr(source.dtype, "view", None)
        if view is not None and isinstance(result.dtype, tl.pointer_type):
            result.dtype = copy.copy(result.dtype)
            result.dtype.view = view
        return result

    return create_bitcast


def _merging_views(original):
    """A pointer selected from two may point to either's tensor."""

    def create_select(builder, condition, first, second):
        result = original(builder, condition, first, second)
        view = getattr(second.dtype, "view", None)
        if view is not None and getattr(first.dtype, "view", None) is not view:
            result.dtype = copy.copy(result.dtype)
            result.dtype.view = None
        return result

    return create_select
