"""A computation that keeps its inputs for the backward and nothing else, and is run again there."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        return compute(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        inputs = [
            t.detach().requires_grad_(needed) for t, needed in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        with torch.enable_grad():
            out = ctx.compute(*inputs)
        grads = iter(torch.autograd.grad(out, [t for t in inputs if t.requires_grad], grad))
        return None, *(next(grads) if needed else None for needed in wanted)


def recomputed(compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """compute(*inputs), whose intermediate results are not kept.

    Unlike `torch.utils.checkpoint` it keeps its inputs where tools that look at saved tensors see them. While
    a graph is traced, and where no input needs a gradient, it is an ordinary call.

    Args:
        compute: deterministic; of tensors to one tensor.
        inputs: what it may be differentiated by. Nothing it closes over may need a gradient.
    """
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if not recorded or torch.compiler.is_compiling():
        return compute(*inputs)
    return _Recomputed.apply(compute, *inputs)
