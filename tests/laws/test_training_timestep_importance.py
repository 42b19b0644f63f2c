"""Laws of timestep importance sampling: means stay, noise falls, a run is the same function of its steps."""

import pytest
import torch
from training_processes import run_on
from training_world import fingerprint, make, train

from sfumato.training.objective import timestep_importance
from sfumato.training.objective.timestep_importance import BINS, PERIOD, TimestepImportance

EVENLY = (torch.arange(64_000, dtype=torch.float64) + 0.5) / 64_000


def peaked(quantiles: torch.Tensor) -> torch.Tensor:
    """A loss that is large in one place."""
    return 0.05 + 4 * torch.exp(-(((quantiles - 0.3) / 0.06) ** 2))


def learned(loss=peaked) -> TimestepImportance:
    """A density that has heard a loss for four periods, with samples of its own choice."""
    found = TimestepImportance()
    for step in range(4 * PERIOD):
        u = torch.rand(32, generator=torch.Generator().manual_seed(step))
        quantiles, _ = found(u, step)
        found.record(quantiles, loss(quantiles).float())
        found.refresh(step + 1, lambda tensor: tensor)
    return found


def test_the_first_two_periods_are_even():
    for step in (0, PERIOD, 2 * PERIOD - 1):
        quantiles, weights = TimestepImportance()(EVENLY, step)
        torch.testing.assert_close(quantiles, EVENLY)
        assert torch.all(weights == 1)
    assert learned().probabilities(4 * PERIOD).max() > 2 / BINS


@pytest.mark.parametrize("wanted", [peaked, torch.sin, lambda q: q**3], ids=["the loss", "sine", "cube"])
def test_every_mean_stays_as_it_was(wanted):
    """Law: importance weights make any estimate unbiased, of the loss heard and of any other."""
    quantiles, weights = learned()(EVENLY, 4 * PERIOD)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-3) and float(weights.max()) <= 2 + 1e-9
    assert quantiles.min() >= 0 and quantiles.max() < 1 and torch.all(quantiles.diff() >= 0)
    assert float((weights * wanted(quantiles)).mean()) == pytest.approx(
        float(wanted(EVENLY).mean()), rel=2e-3
    )


def test_the_estimate_of_the_mean_is_less_noisy():
    """Law: the variance of a weighed sample is well below that of an even one."""
    quantiles, weights = learned()(EVENLY, 4 * PERIOD)
    assert float((weights * peaked(quantiles)).var()) < 0.6 * float(peaked(EVENLY).var())


def test_a_loss_that_is_the_same_everywhere_leaves_the_density_even():
    found = learned(lambda quantiles: torch.ones_like(quantiles))
    torch.testing.assert_close(found.probabilities(4 * PERIOD), torch.full((BINS,), 1 / BINS).double())


def test_samples_heard_in_any_order_and_by_anyone_make_the_same_density():
    draw = torch.Generator().manual_seed(0)
    quantiles, losses = torch.rand(512, generator=draw), torch.rand(512, generator=draw) * 3
    whole, other, part = TimestepImportance(), TimestepImportance(), TimestepImportance()
    whole.record(quantiles, losses)
    order = torch.randperm(512, generator=draw)
    other.record(quantiles[order[:200]], losses[order[:200]])
    part.record(quantiles[order[200:]], losses[order[200:]])
    whole.refresh(PERIOD, lambda tensor: tensor)
    other.refresh(PERIOD, lambda tensor: tensor + part.period_sums)
    assert torch.equal(whole.probabilities(2 * PERIOD), other.probabilities(2 * PERIOD))


SLOW = {
    "timestep_importance_sampling": True,
    "validate_every": 0,
    "ema_snapshot_every": 0,
    "save_every": 1000,
    "log_every": 50,
}


@pytest.fixture
def often(monkeypatch) -> None:
    """Periods of eight steps."""
    monkeypatch.setattr(timestep_importance, "PERIOD", 8)


def test_a_run_with_adaptive_times_goes_on_bit_for_bit(tmp_path, often):
    """Stopped in a period, at the end of one, and when the third has begun."""
    train(tmp_path / "through", steps=29, **SLOW)
    for steps in (11, 16, 21, 29):
        train(tmp_path / "parted", steps=steps, **SLOW)
    assert fingerprint(tmp_path / "parted") == fingerprint(tmp_path / "through")
    train(tmp_path / "plain", steps=29, **{**SLOW, "timestep_importance_sampling": False})
    assert fingerprint(tmp_path / "plain") != fingerprint(tmp_path / "through")


@pytest.mark.slow
def test_processes_hear_what_one_hears(tmp_path, often):
    changes = {**SLOW, "exact_elastic": True, "elastic_max_ranks": 2, "steps": 29}
    assert run_on(1, tmp_path / "one", **changes) == run_on(2, tmp_path / "two", **changes)


def test_reading_ahead_draws_what_reading_now_draws():
    objective, _, _ = make(timestep_importance_sampling=True)
    ready = objective.prepare(3, 0, 1)
    again = objective.draw(ready.batch.ids, ready.x_0, 3)
    assert torch.equal(ready.drawn.t, again.t) and ready.drawn.importance is not None
