"""The workflow: from a recipe to a trained run, each step done once and never twice.

recipe → pictures and captions → codec → encodings in the store → training → pictures, numbers, page
"""

from .agreement import agree
from .averaging import average
from .course import Run, encode, gather, ready, train
from .forecast import fitted, plan

__all__ = ["Run", "agree", "average", "encode", "fitted", "gather", "plan", "ready", "train"]
