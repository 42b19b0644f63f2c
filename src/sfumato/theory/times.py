"""Times: where to sample (grids.py), how to train (densities.py), what fits one model (fitting.py)."""

from .densities import Density, densities, density, stratified, weighting, weightings
from .fitting import Pilot, fit
from .grids import (
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
    trained,
    two_sided,
)

__all__ = [
    "Density",
    "Pilot",
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
    "trained",
    "two_sided",
    "weighting",
    "weightings",
]
