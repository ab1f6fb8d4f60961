"""The main job: BLIP-2 in two stages on real pictures, on one's own machine, in minutes (`blip2-kernels
demo`).
"""

from .paths import compare
from .pipeline import run

__all__ = ["compare", "run"]
