"""Laws of solvers, grids and noise, on data whose perfect denoiser is known."""

import math
from functools import cache

import pytest
import torch

from sfumato.errors import Refused
from sfumato.theory import (
    Theory,
    evaluations,
    get,
    guidance,
    integrate,
    methods,
    names,
    noise,
    oracle,
    solve,
    times,
    widest_step,
)

F64 = torch.float64
EVERY = [get(name) for name in names()]
SMOOTH = oracle.mixture([[0.9, -0.3], [-0.6, 0.8], [-0.2, -0.9]], 0.3)
X_T = noise.normal((2,), 5, range(64)).double()
each_theory = pytest.mark.parametrize("theory", EVERY, ids=lambda theory: theory.name)


@cache
def exact_end():
    return SMOOTH.reference(X_T, get("trigflow"))


def error(theory, steps, **how):
    found = integrate(SMOOTH.denoiser(theory), X_T, theory, times.two_sided(theory, steps), **how)
    return float((found - exact_end()).square().mean().sqrt())


SOLVERS = [
    (name, k)
    for name, method in methods().items()
    if method.eta != 1 and not method.needs_noise and not method.own_times
    for k in method.orders or (None,)
]


@pytest.mark.parametrize("solver, order", SOLVERS)
def test_halving_the_step_divides_the_error_by_two_to_the_order(solver, order):
    theory = get("trigflow")
    promised = methods()[solver].expected_order(order or methods()[solver].default_order)
    coarse, fine = (error(theory, steps, solver=solver, order=order) for steps in (32, 64))
    assert math.log2(coarse / fine) > promised - 0.3, (coarse, fine)


@pytest.mark.parametrize("solver", ["multistep", "unipc"])
@pytest.mark.parametrize("most", [0.5, 0.9])
def test_a_fourth_order_is_fourth_wherever_it_starts(solver, most):
    """Law: what the first steps lose does not cap the order, also where the path begins half in the data."""
    theory = Theory(data=lambda t: (1 - most * t, most * t), model=lambda t: (-1, 1))
    wanted, errors, steps = SMOOTH.reference(X_T[:16], theory), [], []
    for count in (48, 96):
        grid = times.linear(theory, count)
        found = integrate(SMOOTH.denoiser(theory), X_T[:16], theory, grid, solver, 4)
        errors.append(float((found - wanted).square().mean().sqrt()))
        steps.append(widest_step(theory, grid, solver))
    assert math.log(errors[0] / errors[1]) / math.log(steps[0] / steps[1]) > 3.7


@pytest.mark.parametrize("solver, order", [("dpm++", 3), ("unipc", 2), ("unipc", 4), ("deis", 2)])
def test_a_last_step_that_ends_close_to_the_data_is_as_exact_as_one_that_reaches_them(solver, order):
    ends = []
    for last in (0.0, 1e-5):
        theory = Theory(data=lambda t: (1 - t, t), model=lambda t: (-1, 1), t_data=last)
        found = integrate(SMOOTH.denoiser(theory), X_T, theory, times.karras(theory, 60), solver, order)
        ends.append(float((found - SMOOTH.reference(X_T, theory)).square().mean().sqrt()))
    assert ends[1] < 1.1 * ends[0] + 1e-5


def test_the_widest_step_is_along_what_a_solver_carries():
    flow, edm = get("flow-matching"), get("edm")
    assert math.isclose(widest_step(flow, times.cosine(flow, 10)), math.pi / 20)
    assert math.isclose(
        widest_step(edm, times.linear(edm, 80), "euler"), math.pi / 4
    )  # the last step: σ from 1 to 0
    assert widest_step(edm, times.linear(edm, 80), "dpm++") > 2  # … is nearly half of all log-SNR there is


@pytest.mark.parametrize("solver, order", SOLVERS)
def test_the_same_noise_gives_the_same_picture_in_every_theory(solver, order):
    pictures = []
    for name in ("flow-matching", "trigflow", "flow-x0"):
        theory = get(name)
        grid = theory.time_of(get("trigflow").angle(times.two_sided(get("trigflow"), 12)))
        pictures.append(integrate(SMOOTH.denoiser(theory), X_T[:8], theory, grid, solver, order))
    for picture in pictures[1:]:
        torch.testing.assert_close(picture, pictures[0], rtol=1e-12, atol=1e-12)


@each_theory
def test_euler_is_the_derived_step(theory):
    """Law: the solver's Euler equals Theory.step, which equals DDIM."""
    denoise, grid = SMOOTH.denoiser(theory), times.shifted(theory, 7)
    states = list(solve(denoise, X_T, theory, grid, "euler"))
    assert len(states) == 7
    for x, t, s, wanted in zip(states, grid[1:-1], grid[2:], states[1:], strict=False):
        torch.testing.assert_close(theory.step(x, denoise(x, t.expand(64)), t, s), wanted)


@pytest.mark.parametrize("solver", sorted(methods()))
@pytest.mark.parametrize("name", ["ddpm-x0", "edm", "score"])
def test_evaluations_are_as_many_as_the_solver_says_and_never_at_the_data(name, solver):
    theory, seen = get(name), []

    def denoise(x, t):
        seen.append(t.clone())
        return SMOOTH.denoiser(theory)(x, t)

    last = integrate(denoise, X_T[:4], theory, 9, solver, noise=noise.of(1))
    if not methods()[solver].own_times:
        assert 7 <= len(seen) <= 9
        assert len(seen) in [evaluations(solver, steps) for steps in range(1, 10)]
    assert all(float(t[0]) != theory.t_data and t.shape == (4,) for t in seen)
    assert bool(last.isfinite().all())


@each_theory
def test_every_grid_fits_every_theory(theory):
    for name in times.grids():
        grid = (
            times.custom(theory, times.linear(theory, 6)) if name == "custom" else times.grid(name, theory, 6)
        )
        assert grid.shape == (7,) and grid.dtype == F64
        assert float(grid[0]) == theory.t_noise and float(grid[-1]) == theory.t_data
        assert bool((grid.diff() < 0).all()), name


def test_grids_in_the_noise_ratio_end_where_a_theory_that_is_never_clean_ends():
    theory = Theory(data=lambda t: (1, 0.01 * 5000**t), model=lambda t: (0.0, 1.0))
    for make in (times.karras, times.log_snr):
        for steps in (1, 2, 12):
            grid = times.custom(theory, make(theory, steps))
            assert grid.shape == (steps + 1,) and float(grid[-1]) == theory.t_data
    ratio = theory.data(times.log_snr(theory, 8))[1]
    torch.testing.assert_close(ratio[1:] / ratio[:-1], ratio[1:2] / ratio[:1] * torch.ones(8, dtype=F64))


def test_the_textbook_grids():
    edm, flow = get("edm"), get("flow-matching")
    ramp = torch.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 10, dtype=F64) ** 7
    torch.testing.assert_close(times.karras(edm, 10)[:-1], ramp, rtol=1e-10, atol=1e-12)
    even = torch.linspace(1, 0, 11, dtype=F64)
    torch.testing.assert_close(times.shifted(flow, 10, shift=3.0), 3 * even / (1 + 2 * even))
    torch.testing.assert_close(
        times.beta(flow, 4, 1.0, 1.0), torch.linspace(1, 0, 5, dtype=F64), rtol=1e-6, atol=1e-6
    )


def test_every_sample_may_have_its_own_times():
    theory = get("flow-matching")
    rows = torch.stack([times.linear(theory, 6), times.karras(theory, 6)])
    denoise = SMOOTH.denoiser(theory)
    for solver in ("auto", "euler", "heun", "multistep"):
        both = integrate(denoise, X_T[:2], theory, rows, solver)
        for i in range(2):
            torch.testing.assert_close(
                both[i : i + 1], integrate(denoise, X_T[i : i + 1], theory, rows[i], solver)
            )


def test_image_to_image_and_inversion_follow_the_exact_flow():
    theory = get("flow-matching")
    denoise = SMOOTH.denoiser(theory)
    x_0 = SMOOTH.sample(64)
    x_t = theory.mix(x_0, X_T, 0.6)
    found = integrate(denoise, x_t, theory, times.custom(theory, torch.linspace(0.6, 0, 60).tolist()))
    torch.testing.assert_close(found, SMOOTH.reference(x_t, theory, 0.6), rtol=0, atol=1e-3)
    there = integrate(denoise, x_0, theory, times.two_sided(theory, 60).flip(0))
    torch.testing.assert_close(integrate(denoise, there, theory, 60), x_0, rtol=0, atol=1e-3)


def test_ancestral_sampling_draws_the_data_distribution():
    data = oracle.mixture([[1.0], [-1.0]], 0.05, [0.7, 0.3])
    theory = get("ddpm-epsilon")
    draws = noise.normal((1,), 3, range(2048)).double()
    for eta in (0.0, 0.5, 1.0):
        found = integrate(data.denoiser(theory), draws, theory, 40, "euler", eta=eta, noise=noise.of(7))
        assert abs(float((found > 0).double().mean()) - 0.7) < 0.04
        assert abs(float(found[found > 0].std()) - 0.05**0.5) < 0.025


def test_ddim_eta_is_the_published_formula():
    theory = get("ddpm-epsilon")
    eps, grid = torch.full((1, 3), 0.3, dtype=F64), [1.0, 0.6, 0.2]
    x = torch.tensor([[0.5, -1.0, 2.0]], dtype=F64)
    found = next(solve(lambda x, t: eps, x, theory, grid, "euler", eta=0.7, noise=noise.of(2)))
    kept, later = (float(theory.data(t)[0]) ** 2 for t in grid[:2])
    sigma = 0.7 * math.sqrt((1 - later) / (1 - kept)) * math.sqrt(1 - kept / later)
    x_0 = (x - math.sqrt(1 - kept) * eps) / math.sqrt(kept)
    wanted = math.sqrt(later) * x_0 + math.sqrt(1 - later - sigma**2) * eps + sigma * noise.of(2)(x, 0)
    torch.testing.assert_close(found, wanted)


def test_a_picture_does_not_depend_on_its_batch():
    theory = get("flow-matching")
    source = noise.of(4)
    both = integrate(SMOOTH.denoiser(theory), X_T[:2], theory, 8, "ancestral", noise=source)
    second = integrate(SMOOTH.denoiser(theory), X_T[1:2], theory, 8, "ancestral", noise=noise.of([5]))
    torch.testing.assert_close(both[1:], second)


def test_states_keep_their_dtype_and_gradients():
    theory = get("flow-matching")
    gain = torch.ones((), requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = integrate(lambda x, t: gain * (x - t[:, None]), X_T.to(dtype), theory, 3)
        assert x.dtype == dtype
    x.float().sum().backward()
    assert gain.grad is not None


@pytest.mark.parametrize(
    "how, words",
    [
        ({"solver": "eulr"}, 'mean "euler"'),
        ({"grid": 0}, "too few"),
        ({"grid": [1.0, 0.5, 0.7]}, "one way"),
        ({"grid": [2.0, 0.0]}, "outside"),
        ({"eta": 1.0, "solver": "euler"}, "noise.of"),
        ({"eta": 2.0, "solver": "euler"}, "runs from 0"),
        ({"solver": "multistep", "order": 9}, "no order 9"),
        ({"solver": "euler", "speed": 9}, '"speed"'),
    ],
)
def test_what_a_solver_cannot_do_is_refused_before_sampling(how, words):
    with pytest.raises(Refused, match=words):
        solve(lambda x, t: pytest.fail("asked"), X_T, get("flow-matching"), **how)


@pytest.mark.parametrize("solver", sorted(methods()))
def test_a_singular_time_is_refused_before_sampling_with_its_remedy(solver):
    theory = Theory(data=lambda t: (1 - t, t), model=lambda t: (torch.zeros_like(t), torch.ones_like(t)))
    with pytest.raises(Refused, match=r"t = 1.*velocity"):
        solve(lambda x, t: pytest.fail("asked"), X_T, theory, 8, solver, noise=noise.of(0))
    with pytest.raises(Refused, match="shape"):
        integrate(lambda x, t: x[:1], X_T, get("trigflow"), 8, solver, noise=noise.of(0))


def test_guidance_of_scale_one_is_the_prompted_network_and_batched_agrees():
    theory = get("trigflow")
    strong, weak = SMOOTH.denoiser(theory), oracle.ring().denoiser(theory)
    t = torch.full((64,), 0.7, dtype=F64)
    assert guidance.classifier_free(strong, weak, 1.0) is strong
    both = guidance.batched_call(
        lambda x, t: torch.cat([strong(x[:64], t[:64]), weak(x[64:], t[64:])]),
        lambda s, w: guidance.classifier_free(s, w, 3.0),
    )
    torch.testing.assert_close(both(X_T, t), guidance.classifier_free(strong, weak, 3.0)(X_T, t))


# ---------------------------------------------------------------- noise


def test_philox_gives_the_published_words():
    word = lambda text: torch.tensor(int(text, 16))  # noqa: E731
    for counter, key, wanted in (
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        found = noise.philox(tuple(map(word, counter.split())), tuple(map(word, key.split())))
        assert [f"{int(w):08x}" for w in found] == wanted.split()


def test_noise_is_a_function_of_seed_sample_step_and_purpose():
    drawn = noise.normal((3, 4), 1, [10, 2**62 + 1, 12], step=5, purpose="training")
    assert drawn.shape == (3, 3, 4) and drawn.dtype == torch.float32
    assert torch.equal(drawn[1:2], noise.normal((3, 4), 1, [2**62 + 1], step=5, purpose="training"))
    assert torch.equal(drawn[:1], noise.normal((3, 4), [1], [10], step=5, purpose="training"))
    for other in ({"step": 6}, {"purpose": "else"}):
        assert not torch.equal(
            drawn, noise.normal((3, 4), 1, [10, 11, 12], **({"step": 5, "purpose": "training"} | other))
        )


def test_noise_is_normal_uniform_and_even():
    drawn = noise.normal((1000,), 0, range(100)).double()
    assert abs(float(drawn.mean())) < 0.01 and abs(float(drawn.std()) - 1) < 0.01
    assert abs(float((drawn.abs() < 1).double().mean()) - 0.6827) < 0.005
    assert abs(float(torch.corrcoef(drawn[:2])[0, 1])) < 0.1
    u = noise.uniform(0, range(20000))
    assert u.dtype == F64 and float(u.min()) > 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.01
    for count in (1, 2, 7, 1000):
        assert torch.equal(noise.permutation(count, 0).sort()[0], torch.arange(count))
    assert not torch.equal(noise.permutation(1000, 0, epoch=1), noise.permutation(1000, 0))
    assert int(noise.permutation(1000, 0)[:500].max()) > 900


@each_theory
def test_training_densities_stay_inside_the_theory(theory):
    u = noise.uniform(0, range(512))
    for name in times.densities():
        t = times.density(name)(theory, u)
        low, high = sorted((theory.t_data, theory.t_noise))
        assert t.shape == u.shape and float(t.min()) >= low and float(t.max()) <= high
