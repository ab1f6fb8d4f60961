"""Weights made from other weights: a norm folded into a linear layer, and a cache of such for inference."""

from collections.abc import Callable, Iterable, Sequence
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

Join = Callable[[Sequence[nn.Linear]], FoldedLinear | None]
"""`WeightCache.joined`."""


@dataclass(frozen=True)
class _Source:
    """A parameter that something was made of, as it was then.

    Attributes:
        parameter: the tensor itself.
        memory: another view of what it held. While this lives no other tensor can get the same address, so
            that an equal address means equal memory, `parameter.data = ...` included.
        version: how often torch had counted a write to it.
    """

    parameter: Tensor
    memory: Tensor
    version: int

    @classmethod
    def of(cls, parameter: Tensor | None) -> "_Source | None":
        if parameter is None:
            return None
        return cls(parameter, parameter.detach(), _version(parameter))

    def is_still(self, parameter: Tensor | None) -> bool:
        """Whether this is the tensor it was, not replaced, moved or written to."""
        return (
            parameter is self.parameter
            and parameter.data_ptr() == self.memory.data_ptr()
            and parameter.dtype == self.memory.dtype
            and parameter.shape == self.memory.shape
            and _version(parameter) == self.version
        )


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


@dataclass(frozen=True)
class _Entry:
    """Weights made of others, and the modules and parameters they were made of, whose ids and addresses stay
    theirs while this lives."""

    modules: tuple[nn.Module | None, ...]
    sources: tuple[_Source | None, ...]
    made: FoldedLinear

    def holds(self, parameters: Sequence[Tensor | None]) -> bool:
        """Whether it would be made the same of these parameters."""
        return all(
            parameter is None if source is None else source.is_still(parameter)
            for source, parameter in zip(self.sources, parameters, strict=True)
        )


@dataclass
class WeightCache:
    """Weights made of others, kept between calls (`FusedEncoder.prepare_inference`).

    An entry is made anew when a parameter it came from was replaced, moved, or written to in place. Writes
    that torch does not count (through `.data`, or to an inference tensor) cannot be noticed: call
    `prepare_inference` again.
    """

    entries: dict[tuple[object, ...], _Entry] = field(default_factory=dict)

    def fold(self, linear: nn.Linear, norm: nn.LayerNorm | None, *, with_bias: bool = True) -> FoldedLinear:
        """As `FoldedLinear.fold`, from the cache where it is still valid."""

        def make() -> FoldedLinear:
            return FoldedLinear.fold(linear, norm, with_bias=with_bias)

        if not _may_keep(linear):
            return make()
        return self._kept((linear, norm), with_bias, make)

    def joined(self, linears: Sequence[nn.Linear]) -> FoldedLinear | None:
        """Linear layers that read the same rows as one, their outputs side by side; None where weights are
        not kept now (see `fold`) or do not go together."""
        weights, biases = [one.weight for one in linears], [one.bias for one in linears]
        alike = {(w.dtype, w.device, bias is None) for w, bias in zip(weights, biases, strict=True)}
        if len(alike) > 1 or not _may_keep(linears[0]):
            return None

        def make() -> FoldedLinear:
            return FoldedLinear(torch.cat(weights), None if biases[0] is None else torch.cat(biases))

        return self._kept(tuple(linears), None, make)

    def _kept(
        self, modules: tuple[nn.Module | None, ...], how: bool | None, make: Callable[[], FoldedLinear]
    ) -> FoldedLinear:
        read = [t for m in modules for t in ((None, None) if m is None else (m.weight, m.bias))]
        name = (*map(id, modules), how)
        entry = self.entries.get(name)
        if entry is None or not entry.holds(read):
            entry = self.entries[name] = _Entry(modules, tuple(map(_Source.of, read)), make())
        return entry.made


def _may_keep(linear: nn.Linear) -> bool:
    """Whether what is made of a linear layer's weights now may serve later calls."""
    graph = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not graph and not autocasts(linear.weight.device)
