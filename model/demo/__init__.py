"""The main job: BLIP-2 in two stages on real pictures, on one's own machine, in minutes (`blip2-kernels
demo`).
"""

from .pipeline import run

__all__ = ["run"]
