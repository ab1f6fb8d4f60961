"""The operators: one folder each, with its semantics (api.py), the plain truth (reference.py) and its
backends."""

from .cross_attention.api import cross_attention
from .self_attention.api import self_attention

__all__ = ["cross_attention", "self_attention"]
