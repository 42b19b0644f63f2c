"""Laws of change: theories exchanged, densities and weightings carried, answers guided."""

import math

import pytest
import torch

from sfumato.errors import Refused
from sfumato.theory import get, guidance, integrate, names, noise, oracle, times, translate

F64 = torch.float64
DATA = oracle.ring()
X_T = noise.normal((2,), 5, range(4)).double()
EVERY = [get(name) for name in names()]
each_theory = pytest.mark.parametrize("theory", EVERY, ids=lambda theory: theory.name)


@each_theory
def test_a_network_of_any_theory_serves_under_every_other(theory):
    """Law: the translated exact denoiser is the other theory's exact denoiser."""
    for there in EVERY:
        t = there.time_at(torch.tensor([7.0, 2.0, -1.0, -6.0], dtype=F64))
        x_t = there.mix(DATA.sample(4), X_T, t)
        found = translate(DATA.denoiser(theory), trained=theory, to=there)(x_t, t)
        torch.testing.assert_close(found, DATA.denoiser(there)(x_t, t), rtol=1e-10, atol=1e-10)


def test_sampling_a_translated_network_gives_the_same_picture():
    flow = get("flow-matching")
    own = integrate(DATA.denoiser(flow), X_T, flow, 12)
    for theory in (get("trigflow"), get("ddpm-x0", zero_terminal_snr=True)):
        found = integrate(translate(DATA.denoiser(theory), theory, flow), X_T, flow, 12)
        torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-9)
    edm = translate(DATA.denoiser(get("edm")), get("edm"), flow)
    assert (
        float((integrate(edm, X_T, flow, 50) - integrate(DATA.denoiser(flow), X_T, flow, 50)).abs().max())
        < 0.05
    )


def test_gradients_pass_through_a_change_of_theory():
    gain = torch.ones((), dtype=F64, requires_grad=True)
    flow, edm = get("flow-matching"), get("edm")
    x = X_T.clone().requires_grad_()
    out = translate(lambda x, t: gain * x, edm, flow)(x, torch.tensor(0.5))
    out.square().sum().backward()
    assert gain.grad is not None and x.grad is not None
    with pytest.raises(Refused, match="never trained"):
        translate(lambda x, t: x, get("edm", sigma_max=2.0), flow)(X_T, torch.tensor(0.9))


# ---------------------------------------------------------------- densities and weightings


@each_theory
@pytest.mark.parametrize("name", times.densities())
def test_a_density_is_normalized_and_is_what_its_quantiles_draw(name, theory):
    density = times.density(name)
    u = torch.linspace(0.001, 0.999, 41, dtype=F64)
    t = density(theory, u)
    assert bool((t.diff() > 0).all())
    # the density integrates to the share of draws between two quantiles: trapezoid on 400 points each
    part = t[:-1, None] + t.diff()[:, None] * torch.linspace(0, 1, 401, dtype=F64)
    share = torch.trapezoid(density.pdf(theory, part.flatten()).reshape(part.shape), part)
    torch.testing.assert_close(share, u.diff(), rtol=5e-3, atol=1e-5)


def test_the_published_densities():
    flow, u = get("flow-matching"), torch.tensor([0.25, 0.5, 0.9], dtype=F64)
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=F64), 1.0)
    torch.testing.assert_close(times.density("logit-normal")(flow, u), torch.sigmoid(normal.icdf(u)))
    torch.testing.assert_close(
        times.density("log-normal")(get("edm"), u)[1], torch.tensor(-1.2, dtype=F64).exp(), rtol=1e-3, atol=0
    )
    paper = lambda u: 1 - u - 1.29 * ((math.pi / 2 * u).cos() ** 2 - 1 + u)  # noqa: E731
    torch.testing.assert_close(times.density("mode")(flow, u), paper(1 - u))
    torch.testing.assert_close(times.density("cosmap")(flow, u), 1 - 1 / ((math.pi / 2 * u).tan() + 1))


def test_stratified_times_hit_every_part_once_and_are_dealt_to_processes():
    u = times.stratified(0, 64, step=3)
    assert torch.equal((u * 64).long().sort()[0], torch.arange(64))
    torch.testing.assert_close(times.stratified(0, 64, 3, rows=range(16, 32)), u[16:32])
    assert not torch.equal(u, times.stratified(0, 64, step=4))


@pytest.mark.parametrize("name", times.weightings())
def test_a_weighted_loss_is_the_same_in_every_theory_of_a_path(name):
    """Law: one error in x_0 costs the same whether the network answers noise, data, velocity or score."""
    if name == "unit":
        return
    costs = []
    for kind in ("ddpm-epsilon", "ddpm-x0", "ddpm-velocity", "score"):
        theory, t = get(kind), torch.tensor([0.1, 0.5, 0.9], dtype=F64)
        _, s, _, _, det = theory.coefficients(t)
        miss = det / s  # what an error of 1 in x_0 is in the answer
        costs.append(times.weighting(name)(theory, t) * miss.square())
    for cost in costs[1:]:
        torch.testing.assert_close(cost, costs[0])


def test_the_published_weightings():
    t = torch.tensor([0.3, 2.0], dtype=F64)
    torch.testing.assert_close(times.weighting("edm")(get("edm"), t), torch.ones(2, dtype=F64))
    epsilon, t = get("ddpm-epsilon"), torch.tensor([0.2, 0.7], dtype=F64)
    snr = epsilon.log_snr(t).exp()
    torch.testing.assert_close(times.weighting("min-snr")(epsilon, t), snr.clamp(max=5) / snr)
    torch.testing.assert_close(times.weighting("p2")(epsilon, t), 1 / (1 + snr))
    torch.testing.assert_close(times.weighting("debiased")(epsilon, t), snr**-0.5)
    with pytest.raises(Refused, match='mean "gamma"'):
        times.weighting("min-snr", gama=3.0)
    with pytest.raises(Refused, match="above 0"):
        times.weighting("min-snr", gamma=-1.0)
    with pytest.raises(Refused, match="between 0 and 1"):
        times.density("uniform")(epsilon, torch.tensor([1.5], dtype=F64))


# ---------------------------------------------------------------- guidance


def answers(theory):
    t = theory.time_at(torch.tensor([2.0, 0.5, -1.0, -3.0], dtype=F64))
    x_t = theory.mix(DATA.sample(4), X_T, t)
    strong = oracle.mixture(DATA.means[:3], 0.01).denoiser(theory)
    return strong, DATA.denoiser(theory), x_t, t


FORMS = {
    "rescaled": lambda s, w, scale, theory: guidance.rescale_std(
        s, guidance.classifier_free(s, w, scale), theory, share=0.5
    ),
    "interval": lambda s, w, scale, theory: guidance.only_in_interval(
        s, guidance.classifier_free(s, w, scale), theory
    ),
    "zero-star": lambda s, w, scale, theory: guidance.zero_star(s, w, scale, theory),
    "projected": lambda s, w, scale, theory: guidance.adaptive_projected(
        s, w, scale, theory, most=0.5, momentum=-0.5
    ),
    "plain": lambda s, w, scale, theory: guidance.classifier_free(s, w, scale),
}


@pytest.mark.parametrize("form", FORMS)
def test_guidance_means_the_same_in_every_theory(form):
    """Law: guided x_0 does not depend on what the network answers."""
    seen = []
    for name in ("ddpm-epsilon", "ddpm-x0", "ddpm-velocity", "score"):
        theory = get(name)
        strong, weak, x_t, t = answers(theory)
        seen.append(theory.split(x_t, FORMS[form](strong, weak, 4.0, theory)(x_t, t), t)[0])
    for x_0 in seen[1:]:
        torch.testing.assert_close(x_0, seen[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_guidance_of_scale_one_is_the_prompted_network(form):
    theory = get("flow-matching")
    strong, weak, x_t, t = answers(theory)
    torch.testing.assert_close(FORMS[form](strong, weak, 1.0, theory)(x_t, t), strong(x_t, t))


def test_each_refinement_does_what_it_is_for():
    theory = get("flow-matching")
    strong, weak, x_t, t = answers(theory)
    plain = guidance.classifier_free(strong, weak, 6.0)(x_t, t)
    six = guidance.classifier_free(strong, weak, 6.0)
    outside = guidance.only_in_interval(strong, six, theory, low=0.5, high=2.0)(x_t, t)
    torch.testing.assert_close(outside[[0, 3]], strong(x_t, t)[[0, 3]])
    torch.testing.assert_close(outside[[1, 2]], plain[[1, 2]])
    x_0 = theory.split(x_t, guidance.rescale_std(strong, six, theory, share=1.0)(x_t, t), t)[0]
    torch.testing.assert_close(x_0.std(1), theory.split(x_t, strong(x_t, t), t)[0].std(1))
    prompted = theory.split(x_t, strong(x_t, t), t)[0]
    x_0 = theory.split(x_t, guidance.adaptive_projected(strong, weak, 6.0, theory)(x_t, t), t)[0]
    torch.testing.assert_close(
        ((x_0 - prompted) * prompted).sum(1), torch.zeros(4, dtype=F64), atol=1e-8, rtol=0
    )
    both = guidance.batched_call(
        lambda x, t: torch.cat([strong(x[:4], t[:4]), weak(x[4:], t[4:])]),
        lambda s, w: guidance.rescale_std(s, guidance.classifier_free(s, w, 6.0), theory),
    )
    torch.testing.assert_close(both(x_t, t), guidance.rescale_std(strong, six, theory)(x_t, t))
    torch.testing.assert_close(
        guidance.plus_perturbed(strong, strong, weak, 2.0)(x_t, t),
        guidance.classifier_free(strong, weak, 3.0)(x_t, t),
    )
