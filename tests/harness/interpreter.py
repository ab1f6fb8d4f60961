"""The interpreter guard: Triton's CPU interpreter with a GPU's numbers, and with its crimes refused.

A kernel test needs no more than to run inside a guard, as a fixture in `tests/kernels/conftest.py` can see
to:

    from harness import interpreter

    @pytest.fixture(autouse=True)
    def launches():
        if not interpreter.available():
            pytest.skip("a GPU is visible: kernels are tested compiled")
        with interpreter.guard() as launches:
            yield launches

What `@triton.jit` makes of a kernel is decided when its module is imported, by a knob of Triton that is on
inside a guard, so an op that imports its kernels when it first launches one gets interpreted kernels. What
imports kernels at the top of a file does it in a block of its own:

    with interpreter.switched_on():
        from blip2_kernels.ops.some_op.triton import forward

One process of pytest runs many files, and an earlier one has imported Triton for compilation, by way of
transformers: TRITON_INTERPRET=1 would come too late for Triton's own library (`tl.sum`, `tl.max`, Philox). So
that library is turned into interpreted functions in place, for the rest of the process. That is no loss:
without a GPU nothing can launch a compiled kernel in it, and what needs the compiler runs in a process of its
own. Outside of guards the knob is off again, and no environment variable is set: the other tests of the
process, and the processes that tests start, do not take the CPU for a device that runs kernels. Where there
is a GPU nothing may be interpreted, since its own tests need the compiled kernels in this process;
CUDA_VISIBLE_DEVICES="" hides it.

Inside a guard bf16 and tf32 are right (`harness.numerics`), every access is checked (`harness.memory`),
programs run in an order of choice, and Triton's functions are patched once rather than at each call: kernels
run in about half the time they take without a guard.
"""

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from harness import numerics
from harness.hooks import Checks, Hooks, Launch
from harness.patches import Patches

PACKAGE = "blip2_kernels"

_hooks = Hooks()


def available() -> bool:
    """Whether kernels may be interpreted in this process: no GPU is visible."""
    return not torch.cuda.is_available()


@contextmanager
def switched_on() -> Iterator[None]:
    """Let kernels whose modules are imported in this block be interpreted.

    Raises:
        RuntimeError: a GPU is visible, or kernels of this package were imported for compilation before.
    """
    if not available():
        raise RuntimeError(
            "kernels cannot be interpreted here: a GPU is visible, its tests need them compiled"
        )
    _refuse_compiled_kernels()
    _interpret_library()
    # The attribute behind Triton's descriptor, which would set the environment variable as well.
    knobs = vars(triton.knobs.runtime)
    former = dict(knobs)
    knobs["interpret"] = True
    try:
        yield
    finally:
        knobs.clear()
        knobs.update(former)


def _refuse_compiled_kernels() -> None:
    for name, module in list(sys.modules.items()):
        if module is not None and name.partition(".")[0] == PACKAGE:
            kernels = [key for key, value in vars(module).items() if isinstance(value, JITFunction)]
            if kernels:
                raise RuntimeError(f"{name} was imported before the interpreter was switched on: {kernels}")


def _interpret_library() -> None:
    interpreted: dict[Callable, InterpretedFunction] = {}

    def convert(function: JITFunction) -> InterpretedFunction:
        # One for each, under all its names: the interpreter knows tl.max by the identity of its combiner.
        return interpreted.setdefault(function.fn, InterpretedFunction(function.fn))

    for module in (tl.standard, tl.random, tl):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, convert(value))
    for name, value in list(vars(tl.tensor).items()):
        if isinstance(value, JITFunction):
            setattr(tl.tensor, name, _as_method(convert(value)))


def _as_method(function: InterpretedFunction):
    def method(*args, **kwargs):
        return function(*args, **kwargs)

    return method


@contextmanager
def guard(*, races: bool = True, order: str | int = "forward") -> Iterator[list[Launch]]:
    """Check every kernel that is interpreted in this block; gives the list of its launches, as they end.

    A guard within a guard has its place: its own settings, its own list, and its launches are on both lists.

    Args:
        races: look for races between programs. Off, the bounds and duplicate stores are still checked.
        order: in which programs run: "forward", "reversed", or the seed of a random order.

    Raises:
        KernelFault: at the launch of a kernel that does what it must not; names kernel, program and access.
        RuntimeError: as `switched_on`.
    """
    checks = Checks(races, order)
    if _hooks.checks is not None:
        with _hooks.checking(checks):
            yield checks.launches
        return
    patches = Patches()
    with switched_on():
        scope = interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        try:
            numerics.install(patches)
            _hooks.install(patches)
            with _hooks.checking(checks):
                yield checks.launches
        finally:
            patches.undo()
            scope.restore()
