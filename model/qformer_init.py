"""How a Q-Former starts."""

import torch
from torch import nn

from blip2_kernels.checks import check_finite, describe


def init_bert_weights(module: nn.Module, initializer_range: float = 0.02) -> None:
    """Initialise as BERT: linear layers and embeddings N(0, range), biases 0, LayerNorm 1 and 0, padding row
    0.

    Args:
        module: changed in place with everything in it.
        initializer_range: standard deviation.

    Raises:
        TypeError, ValueError: no module, or no standard deviation.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {describe(module)}")
    check_finite("initializer_range", initializer_range, 0)
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=initializer_range)
        if isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        if isinstance(part, nn.Linear | nn.LayerNorm) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()


@torch.no_grad()
def copy_text_feed_forward_to_query(qformer: nn.Module) -> None:
    """Start the query feed-forward networks from the text ones, as LAVIS does after loading BERT.

    Raises:
        TypeError: no `QFormerModel`.
        ValueError: the Q-Former has no text feed-forward networks.
    """
    if not hasattr(qformer, "has_text"):
        raise TypeError(f"qformer: expected a QFormerModel, got {describe(qformer)}")
    if not qformer.has_text:
        raise ValueError(
            "qformer: expected text feed-forward networks, got a config with use_qformer_text_input=False"
        )
    for layer in qformer.encoder.layer:
        layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
        layer.output_query.load_state_dict(layer.output.state_dict())
