"""Laws of the sanity ladder and the plan: sound runs pass, each fault falls from its own check."""

import pytest
import torch
from training_world import Network, make

from sfumato.models import interface
from sfumato.models.condition import Condition
from sfumato.theory import get
from sfumato.theory.convert import translate_inputs
from sfumato.training.estimate import memory as memory_estimate
from sfumato.training.estimate import probe, sanity
from sfumato.training.estimate.sanity import run_checks
from sfumato.training.settings import TrainSettings

FAST = TrainSettings(learning_rate=2e-2)


def fallen(objective) -> list[str]:
    return [check.claim for check in run_checks(objective, FAST) if not check.holds]


def test_a_sound_run_climbs_the_whole_ladder_and_keeps_its_weights():
    objective, network, _ = make()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert fallen(objective) == []
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


def test_large_latents_fall():
    objective, _, _ = make()
    objective.encoded.latents *= 20
    assert "the latents are about of unit size" in fallen(objective)


def test_a_network_that_is_deaf_to_its_condition_falls():
    objective, network, _ = make()
    original = Network.forward

    def deaf(self, x, clock, condition):
        return original(self, x, clock, Condition({name: value * 0 + 1 for name, value in condition.items()}))

    network.forward = deaf.__get__(network)
    assert fallen(objective) == ["the answer depends on the condition"]


def test_one_sample_a_step_is_enough_to_climb():
    """Law: times and conditions of one sample alone are told apart by another's."""
    objective, network, _ = make(batch=1)
    assert fallen(objective) == []
    network.forward = lambda x, clock, condition: Network.forward(network, x, clock * 0, condition)
    assert "the answer depends on the time" in fallen(objective)


def test_a_layer_nobody_listens_to_falls():
    objective, network, _ = make()
    network.spare = torch.nn.Linear(3, 3)
    assert fallen(objective) == ["every trained weight gets a gradient"]


def test_experts_for_times_that_are_seldom_drawn_are_asked_too():
    """Law: a network whose second expert answers at the noisiest times alone climbs the ladder."""
    objective, network, _ = make()
    network.noisy = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(8))
    original, last = Network.forward, 1000.0

    def forward(self, x, clock, condition):
        out, rows = original(self, x, clock, condition), clock > 0.992 * last
        added = torch.stack([one(out.new_ones(1)).sum() for one in self.noisy]).sum()
        return out + added * rows.view(-1, 1, 1, 1) if bool(rows.any()) else out

    network.forward = forward.__get__(network)
    claim = "every trained weight gets a gradient"
    checks = {check.claim: check for check in run_checks(objective, FAST, is_pretrained=True)}
    assert checks[claim].holds, checks[claim].detail


KNOWS = "the first loss is what is to be expected of the base"


@pytest.mark.parametrize("theory", ["flow-matching", "ddpm-epsilon", "ddpm-x0"])
@pytest.mark.parametrize(("size", "good"), [(1.0, True), (4.0, False), (-1.0, False)])
def test_a_base_must_answer_better_than_a_guess(theory, size, good):
    """Law: the linear guess itself passes; too loud, or with its sign turned, it falls."""
    objective, _, _ = make(theory)

    def ask(x_t, t, condition):
        return size * sanity.baseline_answer(objective, objective.encoded.latents, t, x_t)

    objective.model.predict = ask
    assert sanity.beats_baseline(objective).holds == good


def test_a_base_of_random_weights_is_told_from_one_that_is_asked_wrongly():
    """Law: answers that have nothing to do with what is asked are remarked upon; the run may begin."""
    objective, _, _ = make("flow-matching")
    draw = torch.Generator().manual_seed(9)
    objective.model.predict = lambda x_t, t, condition: torch.randn(x_t.shape, generator=draw)
    check = sanity.beats_baseline(objective)
    assert check.holds and check.remark and "random weights" in check.detail


@pytest.mark.parametrize("other", ["ddpm-velocity", "trigflow", "edm"])
def test_a_change_of_theory_is_seen_to_lose_nothing(other, monkeypatch):
    """Law: translated exactly, a base means what it meant; translated wrongly, it falls."""
    objective, _, _ = make("ddpm-velocity" if other != "ddpm-velocity" else "flow-matching")
    objective.model.retarget(get(other))
    assert sanity.survives_conversion(objective).holds

    def wrongly(*of):
        x_t, t, read = translate_inputs(*of)
        return x_t, t, lambda out: 0.5 * read(out)

    monkeypatch.setattr(interface, "translate_inputs", wrongly)
    assert not sanity.survives_conversion(objective).holds


@pytest.mark.parametrize("batch", [1, 7])
def test_memory_counted_on_meta_is_memory_saved_for_real(batch: int):
    network = Network()
    rows = [{"tokens": torch.ones(2, 8)}] * batch
    inputs = (
        torch.randn(batch, 2, 4, 4),
        torch.rand(batch),
        Condition.stack(rows),
    )
    forecast = memory_estimate.predict_step(network, inputs, TrainSettings(ema_snapshot_every=5))
    real = memory_estimate.saved_bytes(lambda: network(*inputs), network)
    assert forecast.memory.activations == pytest.approx(real, rel=0.02)
    weights = sum(weight.numel() for weight in network.parameters()) * 4
    memory = forecast.memory
    assert (memory.gradients, memory.optimizer, memory.average) == (weights, 2 * weights, 3 * weights)
    products = 2 * batch * (41 * 16 + 16 * 32)
    assert forecast.flops == 3 * products


def test_a_probe_measures_and_changes_nothing():
    network = torch.nn.Sequential(torch.nn.Linear(512, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 512))
    before = network[0].weight.clone()
    found = probe.probe(network, (torch.randn(256, 512),), TrainSettings())
    assert found.seconds > 0 and found.peak > 4 * sum(weight.nbytes for weight in network.parameters())
    assert torch.equal(network[0].weight, before)


def test_probed_memory_is_the_peak_that_was_measured():
    """Law: whatever was counted, the parts of a probed memory add up to what real steps needed."""
    counted = memory_estimate.MemoryBreakdown(
        weights=4, gradients=4, optimizer=8, average=4, activations=10, scratch=2
    )
    for peak in (25, 32, 60):
        assert counted.probed(peak).peak == peak
    assert counted.probed(60).activations == 10 and counted.probed(25).scratch == 0
