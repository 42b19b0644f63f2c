"""Laws of precision: whatever a run computes in, it says so, keeps to it, and loses no small gradient."""

import pytest
import torch
from training_world import fingerprint, make, train

from sfumato.errors import Refused
from sfumato.run_folder import RunFolder
from sfumato.training import precision as precisions
from sfumato.training.precision import AUTO_PRECISION, LossScale, effective_precision
from sfumato.training.state.checkpoint import read_state

CPU = torch.device("cpu")


def started_in(folder) -> list[str]:
    return [one["precision"] for one in RunFolder.open(folder).events() if one["kind"] == "start"]


@pytest.mark.parametrize("fast", [False, True])
def test_auto_is_bf16_where_it_is_fast_unless_the_environment_says_otherwise(monkeypatch, fast: bool):
    monkeypatch.delenv(AUTO_PRECISION)
    monkeypatch.setattr(precisions, "has_fast_bf16", lambda device: fast)
    assert effective_precision("auto", CPU) == ("bf16" if fast else "fp32")
    for name in ("fp32", "bf16", "fp16"):
        assert effective_precision(name, CPU) == name
        monkeypatch.setenv(AUTO_PRECISION, name)
        assert effective_precision("auto", CPU) == name
    assert effective_precision("auto", CPU, "bf16-masters") == "bf16"
    monkeypatch.setenv(AUTO_PRECISION, "bf8")
    with pytest.raises(Refused, match=r'SFUMATO_AUTO_PRECISION "bf8" is not known.*bf16'):
        effective_precision("auto", CPU)


def test_a_run_goes_on_as_it_began_on_a_machine_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.setenv(AUTO_PRECISION, "bf16")
    train(tmp_path / "stayed")
    train(tmp_path / "moved", steps=5)
    monkeypatch.setenv(AUTO_PRECISION, "fp32")
    train(tmp_path / "moved")
    assert started_in(tmp_path / "moved") == ["bf16", "bf16"]
    assert fingerprint(tmp_path / "moved") == fingerprint(tmp_path / "stayed")
    train(tmp_path / "moved", steps=14, precision="fp32")  # what is said outright holds
    assert started_in(tmp_path / "moved")[-1] == "fp32"


def test_bf16_and_fp16_learn_what_fp32_learns(tmp_path):
    ends = {name: train(tmp_path / name, precision=name, steps=60).loss for name in ("fp32", "bf16", "fp16")}
    steps = (one for one in RunFolder.open(tmp_path / "fp32").events() if one["kind"] == "step")
    first = next(steps)["loss"]
    assert ends["fp32"] < 0.8 * first
    assert ends["bf16"] == pytest.approx(ends["fp32"], rel=0.02)
    assert ends["fp16"] == pytest.approx(ends["fp32"], rel=0.01)


def test_a_gradient_too_small_for_fp16_moves_the_weights(tmp_path):
    """2^-26 of a gradient is nothing in fp16; scaled by 2^16 it is kept, and adamw asks only for its sign."""
    from sfumato.training.loop.loop import fit

    ends = {}
    for name in ("fp32", "fp16"):
        objective, network, settings = make(precision=name, steps=4, validate_every=0, max_grad_norm=0.0)
        before = network.second.weight.detach().clone()
        objective.weighting = lambda theory, t: torch.full_like(t, 2.0**-20)
        fit(objective, network, settings, RunFolder.create(tmp_path / name), 3, say=lambda _: None)
        ends[name] = float((network.second.weight.detach() - before).norm())
    assert ends["fp16"] == pytest.approx(ends["fp32"], rel=0.02)


def test_a_step_that_overflows_is_left_out_and_halves_the_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(LossScale, "FIRST", 2.0**40)
    train(tmp_path / "run", precision="fp16", steps=40)
    run = RunFolder.open(tmp_path / "run")
    notes = [one["text"] for one in run.events() if one["kind"] == "note"]
    assert notes and notes[0] == "step 1 overflowed in fp16 and moved nothing"
    scale, good = read_state(run.checkpoint_folders()[-1])["loss_scale"]
    assert scale == 2.0 ** (40 - len(notes)) and good == 40 - int(notes[-1].split()[1])
    for steps in (7, 40):
        train(tmp_path / "parts", precision="fp16", steps=steps)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "run")


def test_a_scale_grows_after_many_good_steps_and_is_exhausted_below_one():
    scale = LossScale("fp16")
    for _ in range(LossScale.PATIENCE):
        scale.update(True)
    assert scale.value == 2 * LossScale.FIRST
    again = LossScale("fp16")
    again.load(scale.state())
    assert again.state() == scale.state()
    while not scale.is_exhausted:
        scale.update(False)
    assert scale.value == 0.5
    assert LossScale("bf16").value == 1 and not LossScale("bf16").is_needed
