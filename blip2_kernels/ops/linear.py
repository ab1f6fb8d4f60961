"""Linear layers in fp32 on the CPU, by the faster of the two libraries that torch carries.

torch sends products of fp32 matrices to MKL, which keeps its AVX-512 kernels for Intel's processors and takes
AVX2 elsewhere. oneDNN has AVX-512 kernels for all: on an AMD EPYC it multiplies the matrices of a Q-Former,
forward and backward, 1.9 to 2.3 times as fast on a core. Both compute and sum in fp32.
"""

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense_attention import autocasts


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as `torch.nn.functional.linear`; gradients of any order too.

    Args:
        x: [..., in].
        weight: [out, in], any strides.
        bias: [out].

    Returns:
        [..., out].
    """
    if plain_linear_reason(x, weight, bias) is not None:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, weight, bias):
        return _Product.apply(x, weight, bias)
    return _product(x, weight, bias)


def linear_by_head(x: Tensor, weight: Tensor) -> Tensor:
    """A product of its own for each head, without gradients.

    Args:
        x: [rows, heads, in].
        weight: [heads, out, in], any strides.

    Returns:
        [rows, heads, out].
    """
    if plain_linear_reason(x, weight) is not None:
        return (x.transpose(0, 1) @ weight.transpose(1, 2)).transpose(0, 1)
    return torch.stack([linear(x[:, head], each) for head, each in enumerate(weight)], 1)


def plain_linear_reason(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """None where oneDNN multiplies, else why `torch.nn.functional.linear` does."""
    # Asked a hundred times a pass, and no core computes until it is answered.
    if not x.is_cpu:
        return f"a tensor is on {x.device}"
    if torch.compiler.is_compiling():
        return "the compiler chooses"
    if (reason := _fast_blas_reason()) is not None:
        return reason
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if not tensor.is_cpu:
            return f"a tensor is on {tensor.device}"
        if tensor.dtype != torch.float32:
            return f"a tensor is {str(tensor.dtype).removeprefix('torch.')}"
    if not torch._C._get_mkldnn_enabled():
        return "torch.backends.mkldnn is switched off"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func has no rule for oneDNN's product"
    if autocasts(x.device):
        return "autocast computes in half precision"
    if x.dim() < 2 or x.numel() == 0 or weight.numel() == 0:
        return "there is next to nothing to multiply"
    if x.shape[-1] != weight.shape[-1] or (bias is not None and bias.shape != weight.shape[:1]):
        return "the shapes do not fit"  # which torch says better, and oneDNN's product does not look at
    return None


@cache
def _fast_blas_reason() -> str | None:
    """None where torch's BLAS leaves half of this CPU's speed unused."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch has no oneDNN product"
    if not torch.backends.mkl.is_available():
        return "torch's BLAS is not MKL"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "the CPU has no AVX-512"
    return "MKL has AVX-512 kernels for Intel's CPUs" if "GenuineIntel" in _cpu_description() else None


def _cpu_description() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        bias = bias.contiguous()  # oneDNN's product takes it to be
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    # Without a `setup_context`: with one, torch binds every call's arguments to a signature in Python.
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        d_x = linear(grad, weight.t()) if wants_x else None
        d_weight = linear(rows.t(), x.flatten(0, -2).t()) if wants_weight else None
        return d_x, d_weight, rows.sum(0) if wants_bias else None
