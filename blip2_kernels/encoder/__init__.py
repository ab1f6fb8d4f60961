"""The Q-Former as it is run when `use_fused=True`: packed rows through the ops, nothing computed twice."""

from .encoder import FusedEncoder
from .images import ImageKeyValues
from .layer import LayerCall
from .plan import Saving, Workload
from .rows import EncodedRows

__all__ = ["EncodedRows", "FusedEncoder", "ImageKeyValues", "LayerCall", "Saving", "Workload"]
