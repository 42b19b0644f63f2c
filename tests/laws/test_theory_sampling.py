"""Laws of ways to walk: from any time, back to the noise, with own times per sample, with fresh noise."""

from functools import cache

import pytest
import torch

from sfumato.errors import Refused
from sfumato.theory import get, integrate, methods, names, noise, oracle, schedule_search, solve, times

FLOW = get("flow-matching")
SMOOTH = oracle.mixture([[0.9, -0.3], [-0.6, 0.8], [-0.2, -0.9]], 0.3)
DENOISE = SMOOTH.denoiser(FLOW)
X_T = noise.normal((2,), 9, range(32)).double()
EXACT = sorted(name for name, one in methods().items() if one.eta != 1 and not one.needs_noise)
RANDOM = sorted(set(methods()) - set(EXACT))
exact_solvers = pytest.mark.parametrize("solver", EXACT)
random_solvers = pytest.mark.parametrize("solver", RANDOM)


@cache
def half_way():
    x_t = FLOW.mix(SMOOTH.sample(32), X_T, 0.6)
    return x_t, SMOOTH.reference(x_t, FLOW, 0.6)


@exact_solvers
def test_every_solver_starts_at_any_time(solver):
    x_t, wanted = half_way()
    steps = 400 if solver == "euler" else 60
    found = integrate(DENOISE, x_t, FLOW, torch.linspace(0.6, 0, steps + 1).tolist(), solver)
    assert float((found - wanted).square().mean().sqrt()) < 4e-3


@exact_solvers
def test_every_solver_inverts_and_comes_back(solver):
    x_0 = SMOOTH.sample(16)
    grid = times.two_sided(FLOW, 400 if solver == "euler" else 60)
    there = integrate(DENOISE, x_0, FLOW, grid.flip(0), solver)
    back = integrate(DENOISE, there, FLOW, grid, solver)
    assert float((back - x_0).square().mean().sqrt()) < 6e-3


@pytest.mark.parametrize("solver", sorted(set(methods()) - {"restart"}))
def test_with_its_own_times_a_sample_walks_as_if_alone(solver):
    rows = torch.stack([times.two_sided(FLOW, 7), times.cosine(FLOW, 7)])
    both = integrate(DENOISE, X_T[:2], FLOW, rows, solver, noise=noise.of([1, 2]))
    for i in range(2):
        alone = integrate(DENOISE, X_T[i : i + 1], FLOW, rows[i], solver, noise=noise.of([1 + i]))
        torch.testing.assert_close(both[i : i + 1], alone)


@random_solvers
def test_fresh_noise_on_the_way_keeps_the_distribution(solver):
    data = oracle.mixture([[1.0], [-1.0]], 0.05, [0.7, 0.3])
    draws = noise.normal((1,), 3, range(1024)).double()
    theory = get("ddpm-velocity")
    found = integrate(data.denoiser(theory), draws, theory, 120, solver, noise=noise.of(7))
    assert abs(float((found > 0).double().mean()) - 0.7) < 0.04
    assert abs(float(found[found > 0].std()) - 0.05**0.5) < 0.03
    other = integrate(data.denoiser(theory), draws[:8], theory, 120, solver, noise=noise.of(8))
    assert not torch.equal(found[:8], other)


def test_a_smaller_tolerance_asks_more_and_errs_less():
    wanted, asked, errors = SMOOTH.reference(X_T, FLOW), [], []
    for tolerance in (1e-2, 1e-3, 1e-4):
        count = 0

        def counted(x, t):
            nonlocal count
            count += 1
            return DENOISE(x, t)

        found = integrate(counted, X_T, FLOW, 10, "adaptive", tolerance=tolerance)
        asked.append(count)
        errors.append(float((found - wanted).square().mean().sqrt()))
        assert errors[-1] < 10 * tolerance
    assert asked == sorted(asked) and errors == sorted(errors, reverse=True)


# ---------------------------------------------------------------- fitted times


@cache
def fitted():
    data = oracle.mixture([[0.3, 0.1], [0.3, -0.1], [-0.3, 0.2]], 0.002)  # all scales below the default's
    pilot = times.fit(data.denoiser(FLOW), noise.normal((2,), 1, range(32)).double(), FLOW, (8,))
    return data, pilot


def test_fitted_times_err_less_on_noise_they_have_not_seen():
    data, pilot = fitted()
    x_T = noise.normal((2,), 2, range(48)).double()
    for theory in (FLOW, get("edm")):
        wanted = data.reference(x_T, theory)
        plain, own = (
            float((integrate(data.denoiser(theory), x_T, theory, grid) - wanted).square().mean().sqrt())
            for grid in (8, pilot.grid(theory, 8))
        )
        assert own < 0.7 * plain


@pytest.mark.parametrize("name", names())
def test_fitted_times_serve_every_theory_and_any_number(name):
    theory, pilot = get(name), times.FittedGrid.from_dict(fitted()[1].to_dict())
    for steps in (1, 2, 13, 50):
        grid = pilot.grid(theory, steps)
        assert grid.shape == (steps + 1,) and bool((grid.diff() < 0).all())
        assert float(grid[0]) == theory.t_noise and float(grid[-1]) == theory.t_data
    assert times.FittedGrid.from_dict(pilot.to_dict()) == pilot


def test_an_unbent_pilot_is_the_default_grid():
    flat = times.FittedGrid.bent([0.0] * 7)
    torch.testing.assert_close(flat.grid(FLOW, 12), times.two_sided(FLOW, 12), rtol=0, atol=1e-12)


def test_fitting_asks_no_more_than_it_says():
    count = []
    times.fit(lambda x, t: count.append(1) or DENOISE(x, t), X_T[:8], FLOW, (3,))
    assert len(count) <= schedule_search.cost((3,))
    with pytest.raises(Refused, match="at least 3"):
        times.fit(DENOISE, X_T, FLOW, (2,))
    with pytest.raises(Refused, match="Fit them again"):
        times.FittedGrid.from_dict({"angles": [1.0, 0.0], "shares": [0.0]})


def test_states_before_the_last_stand_on_the_grid():
    """Law: what `solve` yields at a time is near the exact flow there, whichever space a solver walks in."""
    grid = times.two_sided(FLOW, 24)
    for solver in ("auto", "multistep", "dpm++", "unipc", "heun"):
        state = list(solve(DENOISE, X_T, FLOW, grid, solver))[11]
        middle = float(grid[12])
        wanted = SMOOTH.endpoint(X_T[:8], float(FLOW.angle(1.0)), float(FLOW.angle(middle)), 1e-7)
        radius = float(torch.hypot(*FLOW.data(middle)))
        assert float((state[:8] / radius - wanted).square().mean().sqrt()) < 2e-2, solver
