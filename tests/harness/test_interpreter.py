"""The interpreter guard itself: what it switches, patches, orders and records."""

import os
import sys
import types

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
from triton.runtime.jit import JITFunction

from harness import interpreter
from harness.faults import OutOfBounds

if not interpreter.available():
    pytest.skip("a GPU is visible: kernels are compiled in this process", allow_module_level=True)

with interpreter.switched_on():
    from harness import toys


@pytest.mark.parametrize("order", ["forward", "reversed", 7])
def test_programs_run_in_the_order_asked_for(order):
    turns = torch.zeros(25, dtype=torch.int32)
    with interpreter.guard() as outer, interpreter.guard(order=order) as inner:
        toys.own_place[(2, 3, 4)](turns)
    turns = turns[:24].tolist()
    assert sorted(turns) == list(range(24))
    assert {"forward": turns == list(range(24)), "reversed": turns == list(range(23, -1, -1))}.get(
        order, turns != sorted(turns) and turns != sorted(turns, reverse=True)
    )
    assert [(launch.kernel, launch.grid) for launch in inner] == [("own_place", (2, 3, 4))]
    assert outer == inner


def test_a_guard_leaves_the_interpreter_as_it_was():
    def hooks():
        return dict(vars(InterpreterBuilder)), triton.language.load, triton.runtime.interpreter._patch_lang

    before = hooks()
    with pytest.raises(OutOfBounds), interpreter.guard():
        assert hooks() != before
        toys.copy[(1,)](torch.empty(15), torch.empty(16), 16, 0, BLOCK=16)
    assert hooks() == before
    assert tl.core.is_builtin(tl.load)


def test_errors_of_other_kinds_pass_through():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="input_precision"):
        toys.product[(1,)](
            *(torch.zeros(16, 16, dtype=torch.float64),) * 3, M=16, N=16, K=16, PRECISION="wrong"
        )


def test_the_switch_is_on_inside_a_guard_and_nowhere_else(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    @triton.jit
    def outside(x_ptr):
        tl.store(x_ptr, 1.0)

    with pytest.raises(ValueError), interpreter.guard():

        @triton.jit
        def inside(x_ptr):
            tl.store(x_ptr, 1.0)

        assert triton.knobs.runtime.interpret
        assert "TRITON_INTERPRET" not in os.environ
        raise ValueError
    assert not triton.knobs.runtime.interpret
    assert (type(outside), type(inside)) == (JITFunction, InterpretedFunction)


def test_kernels_imported_too_early_are_found(monkeypatch):
    early = types.ModuleType("blip2_kernels.early")
    early.kernel = JITFunction(toys.copy.fn)
    monkeypatch.setitem(sys.modules, early.__name__, early)
    message = r"blip2_kernels.early was imported before .*: \['kernel'\]"
    with pytest.raises(RuntimeError, match=message), interpreter.guard():
        pass


def test_nothing_is_interpreted_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not interpreter.available()
    with pytest.raises(RuntimeError, match="a GPU is visible"), interpreter.guard():
        pass
