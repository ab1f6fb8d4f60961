"""The operators, one folder each: semantics (api.py), the plain truth (reference.py), its backends."""

from .cross_attention.api import cross_attention
from .self_attention.api import self_attention

__all__ = ["cross_attention", "self_attention"]
