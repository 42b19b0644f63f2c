"""New noise on the way down: solve to a quieter angle than asked, then come back up with fresh noise.

With z at φ_down, ρ·z + √(1 − ρ²)·n lies at φ when cos φ = ρ·cos φ_down. Ancestral sampling, DDIM-η, churn and
restart are this one move, and any solver can make it.
"""

import torch
from torch import Tensor

from .course import Course, Weight, combine
from .shapes import Renoise


def renoising(course: Course, eta: float) -> tuple[Tensor, list[list[Weight]]]:
    """Angles [steps, 1 or B] to solve down to, and the way back up: (ρ, √(1 − ρ²)) per step.

    η = 1 is ancestral sampling; with the rotation it is DDIM-η (Song et al. 2020, arXiv:2010.02502, eq. 16).
    """
    here, there = course.angles[:-1], course.angles[1:]
    if not eta:
        return there, [[1.0, 0.0] for _ in range(course.steps)]
    fresh = (1 - (there.tan() / here.tan()).square()).clamp(min=0).sqrt() * there.sin() * eta
    kept = (1 - fresh.square()).sqrt()
    down = torch.acos((there.cos() / kept).clamp(max=1))
    return torch.where(fresh > 0, down, there), course.weights(torch.stack([kept, fresh], -1))


def rising(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(ρ, √(1 − ρ²)) of the noise that lifts z from angle `low` to `high`."""
    kept = high.cos() / low.cos()
    return kept, (1 - kept.square()).clamp(min=0).sqrt()


def renoised(z: Tensor, back: list[Weight], noise: Renoise | None, step: int) -> Tensor:
    """ρ·z + √(1 − ρ²)·n, or z where nothing is drawn."""
    if noise is None or (isinstance(back[1], float) and back[1] == 0.0):
        return z
    return combine((back[0], z), (back[1], noise(z, step)))
