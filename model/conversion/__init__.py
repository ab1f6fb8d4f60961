"""Checkpoints in every direction: LAVIS's files, transformers' folders, and ours."""

from .check import CheckedOutput, check_loading
from .convert import Conversion, Plan, convert, plan_conversion

__all__ = ["CheckedOutput", "Conversion", "Plan", "check_loading", "convert", "plan_conversion"]
