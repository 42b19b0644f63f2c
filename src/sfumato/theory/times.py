"""Times: where to sample (grids), how to train (densities), what fits one model (schedule_search)."""

from sfumato.theory.densities import Density, densities, density, stratified, weighting, weightings
from sfumato.theory.grids import (
    beta,
    cosine,
    custom,
    grid,
    grids,
    karras,
    linear,
    log_snr,
    resolution_shift,
    shifted,
    time_of_step,
    two_sided,
)
from sfumato.theory.schedule_search import FittedGrid, fit

__all__ = [
    "Density",
    "FittedGrid",
    "beta",
    "cosine",
    "custom",
    "densities",
    "density",
    "fit",
    "grid",
    "grids",
    "karras",
    "linear",
    "log_snr",
    "resolution_shift",
    "shifted",
    "stratified",
    "time_of_step",
    "two_sided",
    "weighting",
    "weightings",
]
