"""Laws of drawing on a GPU: every solver and every form of guidance, and nothing mixes devices."""

import pytest
import torch

from sfumato.theory import get, integrate, noise
from sfumato.theory import guidance as forms
from sfumato.theory.solvers.solver import methods

from .make_believe import plain
from .small_world import SHAPE

THEORIES = ("flow-matching", "ddpm-epsilon")


def denoiser(device: str, theory, lean: float = 0.9):
    """An answer that is some of the state, on the device."""
    weight = torch.tensor(lean).to(device)
    return lambda x_t, t: x_t * weight + 0.01 * torch.ones_like(t).view(-1, 1, 1, 1)


def some(names):
    """The slow ones apart."""
    return [pytest.param(*one, marks=[pytest.mark.slow] if is_slow(*one) else []) for one in names]


def is_slow(solver: str, theory: str) -> bool:
    return (theory != THEORIES[0] and solver not in ("euler", "dpm++")) or solver == "adaptive"


@pytest.mark.parametrize(
    ("solver", "theory"), some((solver, theory) for solver in methods() for theory in THEORIES)
)
def test_every_solver_draws_on_the_device_what_it_draws_on_the_cpu(solver, theory, gpu):
    """Law: the same states, but for rounding, and no device mixed."""
    found = get(theory)
    ends = []
    for device in ("cpu", "cuda"):
        x_T = noise.normal(SHAPE, 0, [0, 1]).to(device)
        ends.append(plain(integrate(denoiser(device, found), x_T, found, 8, solver, noise=noise.of(5))))
    torch.testing.assert_close(ends[1], ends[0], atol=1e-4, rtol=1e-3)


FORMS = {
    "cfg": lambda strong, weak, theory: forms.classifier_free(strong, weak, 3.0),
    "cfg-zero-star": lambda strong, weak, theory: forms.zero_star(strong, weak, 3.0, theory),
    "apg": lambda strong, weak, theory: forms.adaptive_projected(strong, weak, 3.0, theory, momentum=-0.5),
    "rescaled": lambda strong, weak, theory: forms.rescale_std(
        strong, forms.classifier_free(strong, weak, 3.0), theory
    ),
    "in an interval": lambda strong, weak, theory: forms.only_in_interval(
        strong, forms.classifier_free(strong, weak, 3.0), theory
    ),
    "perturbed": lambda strong, weak, theory: forms.plus_perturbed(strong, strong, weak, 2.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_guidance_leans_on_the_device_as_on_the_cpu(form, gpu):
    """Law: the same answer, but for rounding, and no device mixed."""
    theory, ends = get("flow-matching"), []
    for device in ("cpu", "cuda"):
        strong, weak = denoiser(device, theory), denoiser(device, theory, 0.5)
        guided = FORMS[form](strong, weak, theory)
        x_T = noise.normal(SHAPE, 0, [0, 1]).to(device)
        ends.append(plain(integrate(guided, x_T, theory, 6, "dpm++")))
    torch.testing.assert_close(ends[1], ends[0], atol=1e-4, rtol=1e-3)
