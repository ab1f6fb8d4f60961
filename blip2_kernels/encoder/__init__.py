"""The Q-Former as it is run when `use_fused=True`: packed rows through the ops."""

from .encoder import FusedEncoder
from .images import ImageKeyValues

__all__ = ["FusedEncoder", "ImageKeyValues"]
