"""Evaluation: how good the pictures are, as numbers with error bars."""

from .latent_kernel_distance import kernel_distance
from .measure import Measure, over
from .memory import Memory, memory
from .neighbours import Neighbours, is_right

__all__ = ["Measure", "Memory", "Neighbours", "is_right", "kernel_distance", "memory", "over"]
