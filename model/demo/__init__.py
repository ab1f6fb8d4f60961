"""The main job: BLIP-2 in two stages on real pictures, on one's own machine, in minutes (`blip2-kernels
demo`). What it leaves behind, `load_stage1_checkpoint` opens.
"""

from .paths import compare
from .pipeline import load_stage1_checkpoint, run

__all__ = ["compare", "load_stage1_checkpoint", "run"]
