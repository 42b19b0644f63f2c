"""Laws of averages chosen after training: what is reconstructed is what would have been kept."""

import pytest
import torch
from training_world import fingerprint, train

from sfumato.errors import Failed, Refused
from sfumato.run_folder import RunFolder
from sfumato.training.state import posthoc_ema
from sfumato.training.state.posthoc_ema import (
    EMASnapshot,
    PosthocEMA,
    exponent,
    relative_length,
    snapshot_weights,
)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.2])
def test_the_exponent_has_the_length_it_was_asked_for(length: float):
    assert relative_length(exponent(length)) == pytest.approx(length, rel=1e-9)


def test_the_papers_exponents_are_ours():
    """γ = 6.94 for 10 % and 16.97 for 5 %: arXiv:2312.02696, section 3.1."""
    assert exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)


@pytest.mark.parametrize(("length", "error"), [(0.05, 1e-6), (0.10, 1e-6), (0.07, 0.02), (0.15, 0.2)])
def test_a_reconstructed_average_is_the_one_that_would_have_been_kept(tmp_path, length: float, error: float):
    """Law: on a random walk of weights, reconstruction and direct average agree."""
    torch.manual_seed(0)
    network = torch.nn.Linear(20, 20)
    kept, direct = PosthocEMA(network), PosthocEMA(network, [length])
    run = RunFolder.create(tmp_path / "run")
    for step in range(1, 401):
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.05)
        kept.update(step)
        direct.update(step)
        if step % 25 == 0:
            kept.write(run, step)
    found, missed = posthoc_ema.reconstruct(run, length)
    wanted = next(iter(direct.groups().values()))
    apart = sum(float(((found[name] - wanted[name]) ** 2).sum()) for name in wanted) ** 0.5
    walked = (
        sum(float((wanted[name] - weight).norm() ** 2) for name, weight in network.named_parameters()) ** 0.5
    )
    assert missed < max(error, 1e-6)
    assert apart / walked < max(error, 5e-3)


def test_snapshots_resume_to_the_bit_and_damage_is_named(tmp_path):
    changes = {"ema_snapshot_every": 4, "validate_every": 0}
    train(tmp_path / "through", **changes)
    train(tmp_path / "resumed", steps=7, **changes)
    train(tmp_path / "resumed", **changes)
    assert fingerprint(tmp_path / "resumed") == fingerprint(tmp_path / "through")
    run = RunFolder.open(tmp_path / "through")
    assert [one.step for one in posthoc_ema.snapshots(run)] == [4, 4, 8, 8, 12, 12]
    file = run.path / "averages" / "step-000008" / "power-0.050.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(Failed, match=r"power-0\.050"):
        posthoc_ema.reconstruct(run, 0.1)
    with pytest.raises(Refused, match="ema_snapshot_every"):
        posthoc_ema.reconstruct(RunFolder.create(tmp_path / "none"), 0.1)
    with pytest.raises(Refused, match="length"):
        exponent(0.5)


def test_the_weights_of_a_snapshot_itself_are_one():
    taken = [EMASnapshot(step, length, None) for step in (100, 200) for length in (0.05, 0.1)]  # pyright: ignore[reportArgumentType]
    weights, missed = snapshot_weights(taken, 200, 0.1)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0, 0, 1], dtype=torch.float64), atol=1e-6, rtol=0)
    assert missed < 1e-5


def test_few_snapshots_stay_evenly_spread(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    averages = PosthocEMA(torch.nn.Linear(2, 2))
    for step in range(1, 131):
        averages.update(step)
        if step % 5 == 0:
            averages.write(run, step, 5)
    kept = sorted({one.step for one in posthoc_ema.snapshots(run)})
    assert kept == [20, 40, 60, 80, 100, 120, 130]
    assert not list((run.path / "averages").glob(".*"))


def test_an_average_that_sees_fewer_steps_is_nearly_the_one_that_sees_all():
    """Law: the stride costs less than a hundredth of what the average smooths away."""
    torch.manual_seed(1)
    network = torch.nn.Linear(8, 8)
    kept, (gamma,) = PosthocEMA(network, [0.1]), [exponent(0.1)]
    mean = torch.zeros(8, 8)
    for step in range(1, 2001):
        with torch.no_grad():
            network.weight.add_(torch.randn(8, 8), alpha=0.05)
        kept.update(step)
        mean.lerp_(network.weight.detach(), 1 - (1 - 1 / step) ** (gamma + 1))
    found = kept.groups()["power-0.100"]["weight"]
    assert (found - mean).norm() < 0.01 * (network.weight.detach() - mean).norm() + 0.05
