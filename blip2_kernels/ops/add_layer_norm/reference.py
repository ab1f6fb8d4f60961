"""The plain truth: add, drop, add, normalise."""

import torch.nn.functional as F
from torch import Tensor

from ..philox import Site, dropout_hidden


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    input_bias: Tensor | None,
    eps: float,
    dropout: float,
    dropout_key: Tensor | None,
    row_keys: Tensor | None,
    layer: int,
    site: Site,
) -> Tensor:
    """See `add_layer_norm`; any floating dtype, any device."""
    if input_bias is not None:
        x = x + input_bias
    if dropout > 0:
        x = dropout_hidden(x, dropout, dropout_key, row_keys, layer=layer, site=site)
    return F.layer_norm(residual + x, weight.shape, weight, bias, eps)
