"""Guides: networks beside a denoiser that let a picture guide it.

A guide reads tensors of the condition (`control`, `reference`, `edit_source`) and reaches into its base by
hooks, so the base's own code knows nothing of it. Where its tensor is missing, and before it has learned
anything, the answer is the base's own, bit for bit.
"""

from .elsewhere import attach
from .guide import WEAK, ControlledDenoiser, Guide, weight_of
from .plan import KINDS, GuidePlan, guide, plans_of

__all__ = [
    "KINDS",
    "WEAK",
    "ControlledDenoiser",
    "Guide",
    "GuidePlan",
    "attach",
    "guide",
    "plans_of",
    "weight_of",
]
