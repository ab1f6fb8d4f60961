"""Gathering over the ranks of a job; the identity where there is no process group or one rank only."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def get_world_size() -> int:
    """Ranks in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_rank() -> int:
    """Number of this rank in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def end_process_group() -> None:
    """Wait for all ranks, then end the default process group; nothing without one. The last thing a program
    does: one that ends with its group alive may find a thread of it running, and abort."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """Concatenate x [B, …] of all ranks in rank order, [world * B, …], without gradient.

    Every rank must pass the same shape and dtype (see `check_same_batch`). With one rank this is x itself,
    gradient included.
    """
    world_size = get_world_size()
    if world_size == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def all_gather_with_grad(x: Tensor) -> Tensor:
    """As `all_gather`, and the gradient that any rank has for a row flows back to the rank that owns it.

    The gradients of the ranks are summed, which is the gradient of the sum of the ranks' losses: after DDP
    has averaged parameter gradients, that of their mean.
    """
    return x if get_world_size() == 1 else _AllGather.apply(x)


def global_sum(x: Tensor) -> Tensor:
    """Sum of x over the ranks, without gradient."""
    if get_world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total


def check_same_batch(tensors: Mapping[str, Tensor], choices: Mapping[str, tuple[str, Sequence[str]]]) -> None:
    """Refuse batches that differ between ranks, before a gather hangs, aborts or reads garbage.

    Costs one small collective and one synchronisation; nothing with one rank.

    Args:
        tensors: by argument name, as many and of the same rank everywhere; their shapes must agree.
        choices: by argument name, what holds on this rank among the words for all that may; the same words
            everywhere.

    Raises:
        ValueError: on every rank, naming the argument and what each rank has.
    """
    world_size = get_world_size()
    if world_size == 1:
        return
    device = next(iter(tensors.values())).device
    numbers = [size for x in tensors.values() for size in x.shape]
    numbers += [words.index(word) for word, words in choices.values()]
    everywhere = all_gather(torch.tensor(numbers, device=device)).view(world_size, -1).tolist()
    start = 0
    for name, x in tensors.items():
        shapes = [numbers[start : start + x.dim()] for numbers in everywhere]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"{name}: expected one shape on all ranks, got {shapes}")
        start += x.dim()
    for name, (_, words) in choices.items():
        chosen = [words[numbers[start]] for numbers in everywhere]
        if len(set(chosen)) > 1:
            raise ValueError(f"{name}: expected the same on all ranks, got {chosen}")
        start += 1


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        if dist.get_backend() == "nccl":
            own = grad.new_empty(ctx.rows, *grad.shape[1:])
            dist.reduce_scatter_tensor(own, grad)
            return own
        # gloo has no reduce_scatter: reduce everything and keep the own rows.
        grad = grad.clone()
        dist.all_reduce(grad)
        start = get_rank() * ctx.rows
        return grad[start : start + ctx.rows]
