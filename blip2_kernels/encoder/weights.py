"""Weights made from other weights: a norm folded into a linear layer, and a cache of such for inference."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        bias: [out], W beta + b, or None where there is neither.
        biases: the parameters whose effect is lost where `bias` is left out.
    """

    weight: Tensor
    bias: Tensor | None
    biases: tuple[Tensor, ...] = ()

    @classmethod
    def fold(cls, linear: nn.Linear, norm: nn.LayerNorm | None) -> "FoldedLinear":
        """Fold a norm (None for none) into the linear layer behind it."""
        if norm is None:
            return cls(linear.weight, linear.bias, () if linear.bias is None else (linear.bias,))
        weight: Tensor = linear.weight
        bias: Tensor | None = linear.bias
        biases: list[Tensor] = []
        if linear.bias is not None:
            biases.append(linear.bias)
        if norm.bias is not None:
            bias = F.linear(norm.bias, linear.weight, linear.bias)
            biases.append(norm.bias)
        if norm.weight is not None:
            weight = weight * norm.weight
        return cls(weight, bias, tuple(biases))

    @property
    def weight_without_bias(self) -> Tensor:
        """The weight, to be used without the bias where that cancels: its parts then get zeros."""
        return with_zero_gradients(self.weight, self.biases)


Signature = tuple[tuple[object, ...] | None, ...]


def _signature(*tensors: Tensor | None) -> Signature:
    """What tells a tensor that was replaced, moved or written to from the one it was."""

    def one(t: Tensor) -> tuple[object, ...]:
        return t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device, t.shape

    return tuple(None if t is None else one(t) for t in tensors)


@dataclass(frozen=True)
class _Entry:
    """A folded linear layer, and what it was made of (which keeps both modules, and so their ids, alive)."""

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

    entries: dict[tuple[int, int], _Entry] = field(default_factory=dict)

    def fold(self, linear: nn.Linear, norm: nn.LayerNorm | None) -> FoldedLinear:
        """As `FoldedLinear.fold`, from the cache where it is still valid."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled(linear.weight.device.type):
            return FoldedLinear.fold(linear, norm)
        read = (linear.weight, linear.bias) + ((None, None) if norm is None else (norm.weight, norm.bias))
        name, signature = (id(linear), id(norm)), _signature(*read)
        entry = self.entries.get(name)
        if entry is None or entry.signature != signature:
            folded = FoldedLinear.fold(linear, norm)
            entry = self.entries[name] = _Entry(linear, norm, signature, folded)
        return entry.folded
