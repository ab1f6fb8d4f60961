"""Where the package's operators are registered with torch (namespace `blip2_kernels`)."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("blip2_kernels", "FRAGMENT")


def define(
    schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], *, tags: tuple = ()
) -> Callable[..., Any]:
    """Define an operator and return it.

    Args:
        schema: such as ``"name(Tensor x, int n) -> Tensor"``.
        implementation: runs on CUDA tensors, and on CPU tensors through Triton's interpreter. It must import
            kernels only when it is called: registering must not need Triton.
        fake: shapes, dtypes and strides of the outputs, for tracing.
        tags: of `torch.Tag`.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    for key in ("CUDA", "CPU"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"blip2_kernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.blip2_kernels, name).default


def describe_compiled(name: str, fake: Callable[..., Any]) -> None:
    """Register the shapes, dtypes and strides of the outputs of an operator that the extension defines."""
    torch.library.register_fake(f"blip2_kernels::{name}", fake, lib=_LIBRARY)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Register the gradient of an operator; `setup_context` saves what `backward` reads."""
    torch.library.register_autograd(
        f"blip2_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY
    )
