"""Weights made from other weights: a norm folded into a linear layer, and a cache of such for inference."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.dense_attention import autocasts


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, *unused: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.unused = [(t.shape, t.dtype, t.device) for t in inputs[1:]]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.unused]
        return grad, *zeros


def with_zero_gradients(x: Tensor, unused: Iterable[Tensor]) -> Tensor:
    """x as it is; parameters whose effect on the result is none, and was left out, get a gradient of zeros.

    So they do where they are computed with; optimizers and DistributedDataParallel tell zeros from None.
    """
    if not torch.is_grad_enabled():
        return x
    unused = [t for t in unused if t.requires_grad]
    return _ZeroGradients.apply(x, *unused) if unused else x


@dataclass(frozen=True)
class FoldedLinear:
    """A linear layer that reads features before the weight and bias of their norm.

        W (x * gamma + beta) + b  =  (W * gamma) x + (W beta + b)

    Attributes:
        weight: [out, in], W * gamma.
        bias: [out], W beta + b; None where there is neither, or where it was left out.
    """

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def fold(cls, linear: nn.Linear, norm: nn.LayerNorm | None, *, with_bias: bool = True) -> "FoldedLinear":
        """Fold a norm into the linear layer behind it.

        Args:
            linear: the layer.
            norm: with weight and bias; None for none.
            with_bias: False where the bias has no effect: `linear.bias` and `norm.bias` then get a gradient
                of zeros through the weight.
        """
        weight: Tensor = linear.weight if norm is None else linear.weight * norm.weight
        if not with_bias:
            biases = (linear.bias, None if norm is None else norm.bias)
            return cls(with_zero_gradients(weight, [bias for bias in biases if bias is not None]), None)
        if norm is None:
            return cls(weight, linear.bias)
        return cls(weight, F.linear(norm.bias, linear.weight, linear.bias))


Fold = Callable[..., FoldedLinear]
"""`FoldedLinear.fold`, or `WeightCache.fold`."""

Signature = tuple[tuple[object, ...] | None, ...]


def _signature(*tensors: Tensor | None) -> Signature:
    """What tells a tensor that was replaced, moved or written to from the one it was."""

    def one(t: Tensor) -> tuple[object, ...]:
        return t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device, t.shape

    return tuple(None if t is None else one(t) for t in tensors)


@dataclass(frozen=True)
class _Entry:
    """A folded linear layer and what it was made of (which keeps both modules, and so their ids, alive)."""

    linear: nn.Linear
    norm: nn.LayerNorm | None
    signature: Signature
    folded: FoldedLinear


@dataclass
class WeightCache:
    """Folded weights kept between calls (`FusedEncoder.prepare_inference`).

    An entry is made anew when a parameter it came from was replaced, moved, or written to in place. Writes
    that torch does not count (through `.data`, or to an inference tensor) cannot be noticed: call
    `prepare_inference` again.
    """

    entries: dict[tuple[int, int, bool], _Entry] = field(default_factory=dict)

    def fold(self, linear: nn.Linear, norm: nn.LayerNorm | None, *, with_bias: bool = True) -> FoldedLinear:
        """As `FoldedLinear.fold`, from the cache where it is still valid."""
        autocast = autocasts(linear.weight.device)
        if torch.is_grad_enabled() or autocast or torch.compiler.is_compiling():
            return FoldedLinear.fold(linear, norm, with_bias=with_bias)
        read = (linear.weight, linear.bias) + ((None, None) if norm is None else (norm.weight, norm.bias))
        name, signature = (id(linear), id(norm), with_bias), _signature(*read)
        entry = self.entries.get(name)
        if entry is None or entry.signature != signature:
            folded = FoldedLinear.fold(linear, norm, with_bias=with_bias)
            entry = self.entries[name] = _Entry(linear, norm, signature, folded)
        return entry.folded
