"""Evaluation: how good the pictures are, as numbers with error bars."""

from sfumato.evaluation.latent_kernel_distance import kernel_distance
from sfumato.evaluation.measure import Measure, mean_with_error
from sfumato.evaluation.memorization import Memorization, measure_memorization
from sfumato.evaluation.neighbors import Neighbors, is_right

__all__ = [
    "Measure",
    "Memorization",
    "Neighbors",
    "is_right",
    "kernel_distance",
    "mean_with_error",
    "measure_memorization",
]
