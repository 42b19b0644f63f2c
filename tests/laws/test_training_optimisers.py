"""Laws of every optimizer and schedule: it learns, resumes to the bit, and ends where it should."""

import importlib.util
import itertools

import pytest
import torch
from training_world import fingerprint, make, train

from sfumato.errors import Refused
from sfumato.training.average import Average, decay_at
from sfumato.training.optimiser import Optimiser
from sfumato.training.schedule import SCHEDULES, factor
from sfumato.training.settings import OPTIMIZERS

HAS_PACKAGE = importlib.util.find_spec("pytorch_optimizer") is not None
RATES = {"lion": 1e-3, "prodigy": 1.0, "muon": 3e-3}


def available(name: str) -> str:
    if name in ("prodigy", "schedule-free") and not HAS_PACKAGE:
        pytest.skip("pytorch-optimizer is not installed")
    return name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_resumes_to_the_bit(tmp_path, name: str):
    changes = {"optimizer": available(name), "learning_rate": RATES.get(name, 1e-2), "held_out_every": 0}
    train(tmp_path / "through", steps=6, **changes)
    train(tmp_path / "resumed", steps=3, **changes)
    assert train(tmp_path / "resumed", steps=6, **changes).resumed == 3
    assert fingerprint(tmp_path / "resumed") == fingerprint(tmp_path / "through")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_down(name: str):
    _, network, settings = make(optimizer=available(name), learning_rate=RATES.get(name, 1e-2), steps=40)
    optimiser = Optimiser(network, settings)
    goal = {name: weight + 0.3 for name, weight in network.state_dict().items()}
    losses = []
    for step in range(40):
        loss = sum(((weight - goal[name]) ** 2).mean() for name, weight in network.named_parameters())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimiser.step(step)
        for weight in network.parameters():
            weight.grad = None
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.skipif(HAS_PACKAGE, reason="pytorch-optimizer is installed")
def test_a_missing_package_is_named():
    _, network, settings = make(optimizer="prodigy")
    with pytest.raises(Refused, match="pip install pytorch-optimizer"):
        Optimiser(network, settings)


def test_matrices_decay_and_vectors_do_not():
    _, network, settings = make(weight_decay=0.5)
    groups = Optimiser(network, settings).parts[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert {weight.ndim for weight in groups[1]["params"]} == {1}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_warm_up_stay_within_one_and_never_rise_again(name: str):
    rates = [factor(name, step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(0 <= rate <= 1 for rate in rates) and rates[10] == 1
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert name == "constant" or factor(name, 100, 100, 10) == pytest.approx(0)


def test_the_average_is_the_weighted_sum_of_what_it_saw():
    network = torch.nn.Linear(2, 1, bias=False)
    average = Average(network, 0.8)
    expected = network.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            network.weight.add_(1.0)
        average.update(step)
        beta = decay_at(step, 0.8)
        expected = beta * expected + (1 - beta) * network.weight.detach()
    torch.testing.assert_close(average.state()["weight"], expected)
    own = network.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(network.weight.detach(), expected)
    assert torch.equal(network.weight, own)
