"""The operators, one folder each: semantics (api.py), the plain truth (reference.py), its backends."""

from . import flops  # noqa: F401  (registers FLOP formulas with torch)
from .add_layer_norm.api import add_layer_norm
from .bias_gelu.api import bias_gelu
from .cross_attention.api import cross_attention
from .embed_tokens.api import embed_tokens
from .image_text_similarity.api import image_text_similarity
from .latent_attention.api import latent_attention
from .self_attention.api import self_attention

__all__ = [
    "add_layer_norm",
    "bias_gelu",
    "cross_attention",
    "embed_tokens",
    "image_text_similarity",
    "latent_attention",
    "self_attention",
]
