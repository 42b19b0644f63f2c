"""Laws of theories: what the two definitions promise, for every member of the catalogue."""

import math

import pytest
import torch

from sfumato.errors import Refused
from sfumato.theory import Theory, get, names, noise, oracle, times

F64 = torch.float64
MINE = Theory(
    data=lambda t: (torch.cos(t) ** 2, torch.sin(t) ** 2),
    model=lambda t: (-torch.sin(2 * t), torch.sin(2 * t)),
    t_noise=math.pi / 2 * 0.99,
    name="mine",
)
EVERY = [get(name) for name in names()] + [
    MINE,
    get("flow-matching", shift=3.0),
    get("ddpm-epsilon", betas="cosine"),
]
each_theory = pytest.mark.parametrize("theory", EVERY, ids=lambda theory: theory.name)


def points(theory, fractions=(0.1, 0.4, 0.9)):
    x_0, x_T = noise.normal((2, 3, 4), 0, [0, 1]).double().unbind(1)[:2]
    t = theory.t_data + (theory.t_noise - theory.t_data) * torch.tensor(fractions, dtype=F64)
    return x_0[:1].repeat(len(t), 1, 1), x_T[:1].repeat(len(t), 1, 1), t


@each_theory
def test_a_perfect_answer_rebuilds_data_and_noise(theory):
    """Law: split ∘ target is the identity."""
    x_0, x_T, t = points(theory)
    found = theory.split(theory.mix(x_0, x_T, t), theory.target(x_0, x_T, t), t)
    torch.testing.assert_close(found, (x_0, x_T), rtol=1e-9, atol=1e-9)


@each_theory
def test_a_step_with_a_perfect_answer_lands_on_the_path(theory):
    """Law: step(t → s) = C_s · (x_0, x_T), forwards and back, to the data end and for a time per sample."""
    x_0, x_T, t = points(theory)
    x_t, out = theory.mix(x_0, x_T, t), theory.target(x_0, x_T, t)
    for s in (theory.t_data, t.flip(0), t * 0.5 + 0.5 * theory.t_noise):
        torch.testing.assert_close(theory.step(x_t, out, t, s), theory.mix(x_0, x_T, s), rtol=1e-8, atol=1e-8)


@each_theory
def test_every_theory_is_sound(theory):
    assert theory.check().ok, str(theory.check())
    assert theory.check(times.linear(theory, 10)).ok


@each_theory
def test_times_and_signal_to_noise_are_each_others_inverse(theory):
    t = theory.t_noise * torch.linspace(0.01, 0.99, 23, dtype=F64)
    torch.testing.assert_close(theory.time_at(theory.log_snr(t)), t, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(theory.time_of(theory.angle(t)), t, rtol=1e-6, atol=1e-9)
    assert float(theory.time_at(math.inf)) == theory.t_data
    assert float(theory.time_at(-math.inf)) == theory.t_noise
    assert theory.log_snr(t).diff().max() < 0


@pytest.mark.parametrize("there", EVERY, ids=lambda theory: theory.name)
@each_theory
def test_a_change_of_theory_keeps_the_perfect_answer(theory, there):
    """Law: convert(A's exact denoiser) = B's exact denoiser at the converted point."""
    data = oracle.ring()
    t = theory.time_at(torch.tensor([5.0, 0.0, -4.0], dtype=F64))
    x_t = theory.mix(data.sample(3), noise.normal((2,), 1, range(3)).double(), t)
    out, x, moved = theory.convert(data.denoiser(theory)(x_t, t), x_t, t, to=there)
    torch.testing.assert_close(out, data.denoiser(there)(x, moved), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(there.log_snr(moved), theory.log_snr(t), rtol=1e-10, atol=1e-10)


@each_theory
@pytest.mark.parametrize("ask", ["log_snr", "angle", "coefficients", "velocity_coefficients", "singular"])
def test_outside_its_times_a_theory_answers_with_a_sentence(theory, ask):
    low, high = sorted((theory.t_data, theory.t_noise))
    for t in (low - 0.1, 1.1 * high, [0.5 * (low + high), high + 5], math.nan):
        with pytest.raises(Refused, match=f'outside "{theory.name}", whose times lie between'):
            getattr(theory, ask)(t)
    assert bool(theory.angle([low, high]).isfinite().all())


def test_the_textbook_coefficients():
    half = torch.tensor(0.25, dtype=F64)
    flow, ddpm, edm = get("flow-matching"), get("ddpm-epsilon"), get("edm")
    assert [float(c) for c in (*flow.data(half), *flow.model(half))] == [0.75, 0.25, -1, 1]
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0)
    step = torch.tensor([0, 499, 999])
    a, s = ddpm.data((step + 1) / 1000.0)
    torch.testing.assert_close(a.double(), kept[step].sqrt(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((a**2 + s**2).double(), torch.ones(3, dtype=F64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ddpm.clock((step + 1) / 1000.0), step.float(), rtol=0, atol=1e-3)
    assert float(ddpm.data(0.0)[0]) == 1
    x_0, x_T = torch.randn(2, 5, 3, dtype=F64)
    x_t, sigma = edm.mix(x_0, x_T, 2.0), 2.0
    skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
    torch.testing.assert_close(skip * x_t + out * edm.target(x_0, x_T, 2.0), x_0)
    assert float(get("flow-matching", shift=3.0).data(0.5)[1]) == 0.75


def test_a_trained_step_is_a_time_and_the_network_hears_its_number():
    table = [0.1, 0.2, 0.4, 0.5]
    theory, steps = get("ddpm-velocity", betas=table), torch.arange(4)
    t = times.time_of_step(steps, steps=4)
    kept = (1 - torch.tensor(table, dtype=F64)).cumprod(0)
    torch.testing.assert_close(theory.data(t)[0].square(), kept)
    torch.testing.assert_close(theory.clock(t), steps.double())
    half = theory.data((t[1] + t[2]) / 2)[0].square()  # between two steps, log ᾱ is halfway
    torch.testing.assert_close(half, (kept[1] * kept[2]).sqrt())


def test_zero_terminal_snr_ends_in_pure_noise_and_epsilon_says_so():
    velocity, epsilon = (get(f"ddpm-{kind}", zero_terminal_snr=True) for kind in ("velocity", "epsilon"))
    assert float(velocity.data(1.0)[0]) == 0
    assert velocity.check().ok
    report = epsilon.check()
    assert not report.ok
    assert "t = 1" in report.problems[0] and "velocity" in report.problems[0]
    with pytest.raises(Refused, match="t = 1"):
        epsilon.split(torch.randn(1, 2), torch.randn(1, 2), 1.0)


def test_a_shuffled_angle_a_negative_level_and_a_wrong_shape_are_found():
    flat = Theory(
        data=lambda t: (1 - t * t * (3 - 2 * t) * 0 - (t > 0.5) * 0.1 - 0.5, 0.5 + 0 * t),
        model=lambda t: (0 * t, 1 + 0 * t),
    )
    negative = Theory(data=lambda t: (1 - 2 * t, t), model=lambda t: (-1 + 0 * t, 1 + 0 * t))
    shape = Theory(data=lambda t: (torch.ones(3), t), model=lambda t: (0 * t, 1 + 0 * t))
    same = Theory(data=lambda t: (1 - t, t), model=lambda t: (1 - t, t))
    told = Theory(data=lambda t: (1 - t, t), model=lambda t: (-1, 1), clock=lambda t: t / 0)
    blind = Theory(data=lambda t: (1 - t, t), model=lambda t: (-1, 1), input_scale=lambda t: 0 * t)
    between = Theory(data=lambda t: (1 - t, t), model=lambda t: (0.3337 + 0 * t, 0.6663 + 0 * t))
    ripple = Theory(
        data=lambda t: (1 - t, t + 1e-3 * torch.sin(512 * math.pi * t)), model=lambda t: (-1, 1), t_data=0.1
    )
    jump = Theory(data=lambda t: (1 - t, torch.where(t < 0.5, t, 2 * t)), model=lambda t: (-1, 1))
    wave = Theory(data=lambda t: (1 - t, t * (1 + 0j)), model=lambda t: (-1, 1))
    for theory, word in (
        (blind, "input_scale"),
        (between, "near t = 0.6663"),
        (ripple, "rise"),
        (jump, "t = 0.5 φ jumps"),
        (wave, "complex"),
        (flat, "rise"),
        (negative, "negative"),
        (shape, "shape"),
        (same, "same mixture"),
        (told, "clock"),
    ):
        report = theory.check()
        assert not report.ok and word in str(report), str(report)
    with pytest.raises(Refused, match="one coefficient per time"):
        shape.mix(torch.randn(2, 2), torch.randn(2, 2), 0.5)


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda: get("flow-maching"), 'mean "flow-matching"'),
        (lambda: get("flow-matching", shft=3), 'mean "shift"'),
        (lambda: get("ddpm-x0", betas="liner"), 'mean "linear"'),
        (lambda: Theory(data=lambda t: (t, t), model=lambda t: (t, t), t_noise=0.0), "finite and differ"),
        (lambda: get("ddpm-x0", betas=[0.1, 0.2], steps=5), "leave nothing for steps"),
        (lambda: get("ddpm-x0", betas="cosine", beta_end=0.1), "Leave them out"),
        (lambda: get("flow-matching", shift="3"), "must be a number"),
        (lambda: get("ddpm-x0").mix(torch.randn(2, 2), torch.randn(2, 2), 500), r"t = \(n \+ 1\)/N"),
        (lambda: get("flow-matching").mix(torch.randn(2, 2), torch.randn(2, 2), math.nan), "outside"),
        (lambda: get("flow-matching").time_at(math.nan), "not a number"),
        (lambda: get("flow-matching").time_of(math.nan), "not a number"),
        (lambda: get("flow-matching").step_weights(0.5, -0.5), "outside"),
        (lambda: Theory(data=lambda t: (1, t, t), model=lambda t: (-1, 1)).data(0.5), "not 3"),
        (lambda: get("flow-matching").data(torch.ones(2) + 1j), "no time"),
        (lambda: times.time_of_step(1000), "from 0 to 999"),
        (lambda: get("trigflow").mix(torch.randn(2, 2), torch.randn(2, 3), 0.5), "make them equal"),
        (lambda: get("trigflow").mix(torch.randn(2, 2), torch.randn(2, 2), torch.ones(3)), "one per sample"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_a_way_out(act, words):
    with pytest.raises(Refused, match=words):
        act()
