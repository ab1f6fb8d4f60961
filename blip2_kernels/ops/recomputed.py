"""A computation that keeps its inputs for the backward and nothing else, and is run again there."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dense_attention import no_autocast


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        return compute(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        inputs = [
            t.detach().requires_grad_() if needed else t
            for t, needed in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        # The forward ran without autocast, and whoever calls the backward may have it on.
        with torch.enable_grad(), no_autocast(grad.device):
            leaves = [t for t, needed in zip(inputs, wanted, strict=True) if needed]
            grads = iter(torch.autograd.grad(ctx.compute(*inputs), leaves, grad))
        return None, *(next(grads) if needed else None for needed in wanted)


def recomputed(compute: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """compute(*inputs), whose intermediate results are not kept.

    Unlike `torch.utils.checkpoint` it keeps its inputs where tools that look at saved tensors see them. While
    a graph is traced, and where no input needs a gradient, it is an ordinary call.

    Args:
        compute: deterministic, of tensors to one tensor, each of which it reads; runs without autocast.
        inputs: all tensors that it needs, so that one that was written to before the backward is noticed.
    """
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if not recorded or torch.compiler.is_compiling():
        return compute(*inputs)
    return _Recomputed.apply(compute, *inputs)
