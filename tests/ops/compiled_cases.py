"""What the tests of compiled operators share: sizes, dtypes, and results beside the plain ones."""

import pytest
import torch
from tolerances import assert_yardstick

from blip2_kernels import extension

WIDTHS = (1, 7, 33, 384, 768, 1024, 1408, 3072, 4096)
ROWS = (0, 1, 3, 1000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = (
    *((dtype, dtype) for dtype in DTYPES),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
)
"""Dtypes of x and of the residual."""

ON_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
"""Sends a call with tensors of several devices to what must refuse it, not to the shapes for tracing."""

needs_extension = pytest.mark.skipif(extension.reason() is not None, reason=str(extension.reason()))


def with_gradients(function, tensors, dtype=None):
    """The output of function(*tensors) and the gradients of all tensors, for a fixed output gradient.

    None among the tensors stays None, without a gradient. `dtype` is what the output gradient is rounded to,
    default the output's.
    """
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(out.numel())
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator)
    grad = grad.to(out.device, dtype or out.dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], grad)]


def compare(names, compiled, plain, tensors):
    """Assert that a compiled function is as near the fp64 truth as twice what the plain one is."""
    got, reference = with_gradients(compiled, tensors), with_gradients(plain, tensors)
    truth = with_gradients(plain, [None if t is None else t.double() for t in tensors], got[0].dtype)
    for name, *values in zip(names, got, reference, truth, strict=True):
        assert values[0].dtype == values[1].dtype, name
        assert_yardstick(name, *values)


def strided(tensor):
    """The same values, rows apart and off the start of their storage."""
    rows, width = tensor.shape
    room = tensor.new_full((rows + 2, width + 5), float("nan"))
    room[1:-1, 3:-2] = tensor
    return room[1:-1, 3:-2]
