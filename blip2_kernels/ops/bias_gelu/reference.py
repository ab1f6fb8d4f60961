"""The plain truth: add, then GELU by the error function."""

import torch.nn.functional as F
from torch import Tensor


def bias_gelu_reference(x: Tensor, bias: Tensor | None) -> Tensor:
    """See `bias_gelu`; any floating dtype, any device."""
    return F.gelu(x if bias is None else (x + bias.to(x.dtype)))
