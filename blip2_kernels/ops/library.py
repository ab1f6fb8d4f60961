"""How the package's operators are registered with torch (namespace `blip2_kernels`), and how they are called.

A registered operator can be compiled, traced, counted and profiled, but torch's way to one that is written in
Python takes longer than all the rest of a call on the host, several hundred microseconds with its gradient.
While nobody watches, a call goes past it: straight to the implementation, or through an `autograd.Function`
of the same gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

_LIBRARY = torch.library.Library("blip2_kernels", "FRAGMENT")
_TENSORS = (Tensor, Parameter)
_OTHERS = (type(None), int, float, bool, list)


class Gradient(NamedTuple):
    """The gradient of an operator, in the words of `torch.library.register_autograd`.

    Attributes:
        backward: takes a context and the outputs' gradients, returns one for each argument.
        save: takes a context, the arguments and the outputs, keeps what `backward` reads.
    """

    backward: Callable[..., Any]
    save: Callable[[Any, tuple, Any], None]


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Gradient | None = None,
) -> Callable[..., Any]:
    """Define an operator and return what calls it.

    Args:
        schema: such as ``"name(Tensor x, int n) -> Tensor"``.
        implementation: runs on CUDA tensors, and on CPU tensors through Triton's interpreter. It must import
            kernels only when it is called: registering must not need Triton.
        fake: shapes, dtypes and strides of the outputs, for tracing.
        gradient: None for an operator without.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, implementation, key)
    return _register(name, implementation, fake, gradient)


def complete(name: str, fake: Callable[..., Any], gradient: Gradient | None = None) -> Callable[..., Any]:
    """Add what an operator of the extension lacks in Python, and return what calls it; see `define`."""
    operator = getattr(torch.ops.blip2_kernels, name).default

    def implementation(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return _register(name, implementation, fake, gradient)


def _register(
    name: str, implementation: Callable[..., Any], fake: Callable[..., Any], gradient: Gradient | None
) -> Callable[..., Any]:
    qualified = f"blip2_kernels::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    operator = getattr(torch.ops.blip2_kernels, name).default
    function = None
    if gradient is not None:
        torch.library.register_autograd(
            qualified, gradient.backward, setup_context=gradient.save, lib=_LIBRARY
        )
        function = _function(name, implementation, gradient)

    def call(*arguments: Any) -> Any:
        if _watched(arguments):
            return operator(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return operator(*arguments) if function is None else function.apply(*arguments)
        return implementation(*arguments)

    return call


def _function(
    name: str, implementation: Callable[..., Any], gradient: Gradient
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *arguments: Any) -> Any:
        outputs = implementation(*arguments)
        gradient.save(ctx, arguments, outputs)
        return outputs

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        differentiated_again = torch.is_grad_enabled()
        with torch.no_grad():
            outputs = gradient.backward(ctx, *grads)
        return _once(name, outputs) if differentiated_again else outputs

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _once(name: str, outputs: tuple) -> Any:
    """Gradients that raise where they are differentiated: what flows back would be lost in silence."""
    message = f"blip2_kernels::{name} has no gradient of its gradient"
    leaves = [None if t is None else t.detach().requires_grad_() for t in outputs]
    return torch._C._functions.DelayedError(message, len(leaves))(*leaves)


def traced() -> bool:
    """Whether a compiler, tracer, mode or transform wants to see operators, and may make tensors its own."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
    )


def _watched(arguments: tuple) -> bool:
    """Whether someone wants to see operators, a profiler too, or an argument is more than a plain tensor on a
    CPU or GPU."""
    if traced() or torch._C._autograd._profiler_enabled():
        return True
    for argument in arguments:
        kind = type(argument)
        if kind in _TENSORS:
            if argument.is_meta or argument.is_neg():
                return True
        elif kind not in _OTHERS:
            return True
    return False
