"""Laws of every optimizer and schedule: it learns, resumes to the bit, and ends where it should."""

import importlib.util
import itertools

import pytest
import torch
from training_world import fingerprint, make, train

from sfumato.errors import Refused
from sfumato.run_folder import RunFolder
from sfumato.settings import Table
from sfumato.training import settings as train_settings
from sfumato.training.distributed.sharding import trained_parameters
from sfumato.training.optim import ema
from sfumato.training.optim.bf16_weights import round_stochastically
from sfumato.training.optim.ema import EMA, decay_at
from sfumato.training.optim.lr_schedule import SCHEDULES, lr_factor
from sfumato.training.optim.optimizers import OPTIMIZERS, spec_of
from sfumato.training.optim.run_optimizer import RunOptimizer
from sfumato.training.settings import TrainSettings
from sfumato.training.state.train_state import TrainState

HAS_PACKAGE = importlib.util.find_spec("pytorch_optimizer") is not None
RATES = {"lion": 1e-3, "lion-8bit": 1e-3, "prodigy": 1.0, "muon": 3e-3}


def available(name: str) -> str:
    spec = OPTIMIZERS[name]
    if spec.package and importlib.util.find_spec(spec.package) is None:
        pytest.skip(f"{spec.package} is not installed")
    if spec.is_paged and not torch.cuda.is_available():
        pytest.skip("paged optimizers need a GPU")
    return name


def test_a_recipe_may_name_every_optimizer_of_the_table():
    """Law: settings list the names without torch; the table has the same ones, in the same order."""
    assert tuple(OPTIMIZERS) == train_settings.OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.precisions("fp32", "bf16")
def test_every_optimizer_learns_and_resumes_to_the_bit(tmp_path, name: str):
    changes = {"optimizer": available(name), "learning_rate": RATES.get(name, 1e-2), "validate_every": 0}
    train(tmp_path / "through", steps=6, **changes)
    train(tmp_path / "resumed", steps=3, **changes)
    assert train(tmp_path / "resumed", steps=6, **changes).resumed == 3
    assert fingerprint(tmp_path / "resumed") == fingerprint(tmp_path / "through")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_down(name: str):
    _, network, settings = make(optimizer=available(name), learning_rate=RATES.get(name, 1e-2), steps=40)
    optimizer = RunOptimizer(trained_parameters(network), settings)
    goal = {name: weight.detach().clone() + 0.3 for name, weight in network.state_dict().items()}
    losses = []
    for step in range(40):
        loss = sum(((weight - goal[name]) ** 2).mean() for name, weight in network.named_parameters())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step(step)
        for weight in network.parameters():
            weight.grad = None
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def stepped(name: str, weight: torch.Tensor, gradients: list[torch.Tensor]) -> RunOptimizer:
    """The optimizer after as many steps of one matrix as there are gradients."""
    network = torch.nn.Linear(*weight.T.shape, bias=False)
    network.weight.data.copy_(weight)
    rate = RATES.get(name, 1e-2)
    settings = TrainSettings(optimizer=name, learning_rate=rate, warmup_steps=0, steps=100, ema=0)
    optimizer = RunOptimizer(trained_parameters(network), settings)
    for step, gradient in enumerate(gradients):
        network.weight.grad = gradient.clone()
        optimizer.step(step)
    return optimizer


def drawn(count: int, *shape: int) -> list[torch.Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_keeps_as_many_numbers_as_is_said_of_it(name: str):
    """Law: what memory and checkpoints are counted by is what the optimizer holds after a step."""
    weight, *gradients = drawn(3, 256, 256)
    held, _ = stepped(available(name), weight, gradients).state()
    states = sum(tensor.nbytes for tensor in held.values()) / weight.nbytes
    assert states == pytest.approx(OPTIMIZERS[name].states, abs=0.03)


@pytest.mark.parametrize("name", [name for name, spec in OPTIMIZERS.items() if spec.is_elementwise])
def test_an_elementwise_optimizer_moves_rows_alone_as_it_moves_the_matrix(name: str):
    """Law: what may be divided among processes does not notice it."""
    weight, *gradients = drawn(4, 6, 5)

    def end(rows: slice) -> torch.Tensor:
        optimizer = stepped(available(name), weight[rows], [one[rows] for one in gradients])
        return optimizer.parts[0].param_groups[0]["params"][0].detach()

    torch.testing.assert_close(torch.cat([end(slice(0, 2)), end(slice(2, 6))]), end(slice(0, 6)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_averages_by_itself_if_it_is_said_to(name: str):
    assert stepped(available(name), *drawn(1, 4, 4), []).keeps_average == OPTIMIZERS[name].keeps_average


def test_of_ones_own_optimizer_is_known_what_most_have_in_common():
    assert spec_of("mine.py:make").states == 2 and spec_of("mine.py:make").bytes_per_weight == 20
    with pytest.raises(Refused, match="adamw"):
        spec_of("adamv")


@pytest.mark.skipif(HAS_PACKAGE, reason="pytorch-optimizer is installed")
def test_a_missing_package_is_named():
    _, network, settings = make(optimizer="prodigy")
    with pytest.raises(Refused, match="pip install pytorch-optimizer"):
        RunOptimizer(trained_parameters(network), settings)


def test_matrices_decay_and_vectors_do_not():
    _, network, settings = make(weight_decay=0.5)
    groups = RunOptimizer(trained_parameters(network), settings).parts[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert {weight.ndim for weight in groups[1]["params"]} == {1}


def test_a_weight_learns_at_the_rate_of_the_first_pattern_it_matches():
    _, network, settings = make(lr_multipliers=Table({"first.*": 0.5, "*.bias": 0.0}), learning_rate=1e-2)
    optimizer = RunOptimizer(trained_parameters(network), settings)
    names = optimizer.names
    rates = {names[id(w)]: group["lr"] for group in optimizer.parts[0].param_groups for w in group["params"]}
    assert rates == {"first.weight": 5e-3, "first.bias": 5e-3, "second.weight": 1e-2, "second.bias": 0.0}
    with pytest.raises(Refused, match=r"frist.*first"):
        RunOptimizer(trained_parameters(network), make(lr_multipliers=Table({"frist.*": 0.5}))[2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["adamw-paged", "adamw-8bit-paged"])
def test_a_paged_optimizer_is_refused_where_there_is_no_gpu(name: str):
    _, network, settings = make(optimizer=name)
    with pytest.raises(Refused, match="GPU"):
        RunOptimizer(trained_parameters(network), settings)


@pytest.mark.parametrize("weights", ["bf16", "bf16-masters"])
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "adafactor"])
def test_weights_in_bfloat16_learn_steps_smaller_than_their_grain(weights: str, optimizer: str):
    """Law: 500 steps of 1e-5 move weights of size 1 as far as float32 moves them, on average."""
    network = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.ones_(network.weight)
    settings = TrainSettings(
        weight_dtype=weights,
        optimizer=optimizer,
        learning_rate=1e-5,
        warmup_steps=0,
        weight_decay=0,
        steps=500,
        ema=0,
    )
    held = TrainState(network, settings)
    assert network.weight.dtype == torch.bfloat16
    for step in range(500):
        network.weight.grad = torch.ones_like(network.weight)
        held.optimizer.step(step)
    assert held.optimizer.master_weights is not None
    kept = held.optimizer.master_weights.named["weight"] if weights == "bf16-masters" else network.weight
    moved = 1 - float(kept.detach().double().mean())
    assert moved == pytest.approx(5e-3, rel=0.1) if optimizer in ("adamw", "lion") else moved > 0


@pytest.mark.parametrize("weights", ["bf16", "bf16-masters"])
def test_weights_in_bfloat16_resume_to_the_bit(tmp_path, weights: str):
    changes = {"weight_dtype": weights, "validate_every": 0}
    train(tmp_path / "through", steps=6, **changes)
    train(tmp_path / "resumed", steps=3, **changes)
    train(tmp_path / "resumed", steps=6, **changes)
    assert fingerprint(tmp_path / "resumed") == fingerprint(tmp_path / "through")


def test_rounding_is_right_on_average_and_exact_where_it_can_be():
    values = torch.full((200_000,), 1.0 + 3 / 2**10)
    rounded = round_stochastically(values, torch.Generator().manual_seed(0))
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.double().mean()) == pytest.approx(float(values[0]), abs=5e-5)
    whole = torch.tensor([0.0, -1.5, 2.0, float("inf"), -float("inf")])
    assert round_stochastically(whole, torch.Generator().manual_seed(0)).tolist() == whole.tolist()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_warm_up_stay_within_one_and_never_rise_again(name: str):
    rates = [lr_factor(name, step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(0 <= rate <= 1 for rate in rates) and rates[10] == 1
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert name == "constant" or lr_factor(name, 100, 100, 10) == pytest.approx(0)


def test_the_average_is_the_weighted_sum_of_what_it_saw():
    network = torch.nn.Linear(2, 1, bias=False)
    mean = EMA(trained_parameters(network), 0.8)
    expected = network.weight.detach().clone()
    for step in range(1, 30):
        with torch.no_grad():
            network.weight.add_(1.0)
        mean.update(step)
        beta = decay_at(step, 0.8)
        expected = beta * expected + (1 - beta) * network.weight.detach()
    torch.testing.assert_close(mean.state()["weight"], expected)
    own = network.weight.detach().clone()
    with mean.applied():
        torch.testing.assert_close(network.weight.detach(), expected)
    assert torch.equal(network.weight, own)


def test_a_long_average_that_sees_every_eighth_step_is_the_one_that_sees_them_all(monkeypatch):
    network = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(network.weight, 0.0)
    often = EMA(trained_parameters(network), 0.999)
    monkeypatch.setattr(ema, "update_interval", lambda step, decay=1.0: 1)
    whole = [follows_all(often, network, step) for step in range(1, 3001)]
    monkeypatch.undo()
    torch.nn.init.constant_(network.weight, 0.0)
    seldom = EMA(trained_parameters(network), 0.999)
    parted = [follows_all(seldom, network, step) for step in range(1, 3001)]
    assert ema.update_interval(3000, 0.999) == 8 and ema.update_interval(3000, 0.9) == 1
    assert max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(whole, parted, strict=True)) < 0.01


def follows_all(mean: EMA, network: torch.nn.Module, step: int) -> float:
    """The average after a step of weights that drift by one a step."""
    torch.nn.init.constant_(network.weight, float(step))  # pyright: ignore[reportArgumentType]
    mean.update(step)
    return float(mean.state()["weight"][0, 0])


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
@pytest.mark.precisions("fp32", "bf16")
def test_a_clipped_gradient_moves_the_weights_as_one_divided_before(tmp_path, optimizer: str):
    """The fused optimizer divides on its way; others are given what was divided."""
    from sfumato.training.loop.loop import fit

    ends = []
    for scale in (1.0, 2.0**13):  # a power of two, which no precision rounds
        objective, network, settings = make(
            optimizer=optimizer, steps=5, max_grad_norm=1e-3, validate_every=0
        )
        objective.weighting = lambda theory, t, s=scale: torch.full_like(t, s)
        fit(objective, network, settings, RunFolder.create(tmp_path / f"{scale}"), 3, say=lambda _: None)
        ends.append([weight.detach().clone() for weight in network.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
