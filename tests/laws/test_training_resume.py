"""Laws of the loop: an interrupted run is the uninterrupted one, bit for bit."""

import json
import os
import signal
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from training_world import Encoded, fingerprint, make, train

from sfumato.errors import Failed, Refused
from sfumato.run_folder import RunFolder
from sfumato.settings import Table
from sfumato.training.loop.signals import Stopped
from sfumato.training.optim.run_optimizer import RunOptimizer


def losses(folder: Path) -> list[tuple[int, float]]:
    events = RunFolder.open(folder).events()
    return [(event["step"], event["loss"]) for event in events if event["kind"] == "step"]


def measured(folder: Path) -> list[object]:
    names = ("step", "split", "weights", "loss", "error", "by_level")
    events = RunFolder.open(folder).events()
    return [[event[name] for name in names] for event in events if event["kind"] == "validation"]


@pytest.mark.parametrize(
    ("at", "number", "gradient_accumulation"),
    [(1, signal.SIGINT, 1), (5, signal.SIGTERM, 3), (7, signal.SIGINT, 2), (12, signal.SIGTERM, 1)],
)
@pytest.mark.precisions("fp32", "bf16", "fp16")
def test_interrupted_and_continued_equals_uninterrupted(
    tmp_path, at: int, number: int, gradient_accumulation: int
):
    """Law: weights, EMA, optimizer, losses and held-out losses are those of the run that ran through."""
    train(tmp_path / "through", gradient_accumulation=gradient_accumulation)

    class Interrupting(Exception):
        pass

    from sfumato.training.loop import loop as training_loop

    advance = training_loop._Loop.advance

    def advance_and_signal(self: training_loop._Loop) -> float:
        rate = advance(self)
        if self.step == at:
            os.kill(os.getpid(), number)
        return rate

    training_loop._Loop.advance = advance_and_signal  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with pytest.raises(Stopped) as stopped:
            train(tmp_path / "stopped", gradient_accumulation=gradient_accumulation)
    finally:
        training_loop._Loop.advance = advance
    assert stopped.value.code == 128 + number
    assert RunFolder.open(tmp_path / "stopped").checkpoint_folders()[-1].name == f"step-{at:06d}"
    outcome = train(tmp_path / "stopped", gradient_accumulation=gradient_accumulation)
    assert (outcome.resumed, outcome.step) == (at, 12)
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "through")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "through")
    assert measured(tmp_path / "stopped") == measured(tmp_path / "through")


@pytest.mark.precisions("fp32", "bf16")
def test_a_run_lost_at_any_moment_goes_on_from_its_last_checkpoint(tmp_path):
    """Law: a crash in the middle of accumulation, of a preview or of a save costs steps, not bits."""
    train(tmp_path / "through", gradient_accumulation=2)

    class Crash(Exception):
        pass

    objective, _, _ = make()
    original = type(objective).losses
    for fatal in ((0, 1), (3, 1), (7, 0), (7, 1), (11, 1)):

        def losses_or_crash(self, step, part, parts, fatal=fatal):
            if (step, part) == fatal:
                raise Crash
            return original(self, step, part, parts)

        type(objective).losses = losses_or_crash
        try:
            with pytest.raises(Crash):
                train(tmp_path / "lost", gradient_accumulation=2)
        finally:
            type(objective).losses = original
    train(tmp_path / "lost", gradient_accumulation=2)
    assert fingerprint(tmp_path / "lost") == fingerprint(tmp_path / "through")
    assert losses(tmp_path / "lost") == losses(tmp_path / "through")


def test_a_signal_during_a_preview_stops_it_and_the_picture_is_drawn_later(tmp_path):
    drawn: list[tuple[int, float]] = []

    def preview(network: torch.nn.Module, step: int) -> None:
        if step == 6 and not drawn:
            drawn.append((0, 0.0))
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal did not stop the preview")
        drawn.append((step, float(network.first.weight.sum())))

    with pytest.raises(Stopped):
        train(tmp_path / "run", preview=preview)
    train(tmp_path / "run", preview=preview)
    through: list[tuple[int, float]] = []
    train(tmp_path / "through", preview=lambda n, step: through.append((step, float(n.first.weight.sum()))))
    assert drawn[1:] == through
    assert [step for step, _ in through] == [6, 12]
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "through")


@pytest.mark.precisions("fp32", "bf16")
def test_more_steps_of_a_finished_run_equal_a_longer_run(tmp_path):
    train(tmp_path / "short", steps=7)
    train(tmp_path / "short", steps=12)
    train(tmp_path / "long", steps=12)
    assert fingerprint(tmp_path / "short") == fingerprint(tmp_path / "long")
    assert train(tmp_path / "long", steps=12).resumed == 12


@pytest.mark.precisions("fp32", "bf16")
def test_parts_of_a_batch_add_up_to_the_batch():
    """Law: a sample's loss does not depend on the part it is computed in."""
    objective, network, _ = make()
    network.eval()
    whole = objective.losses(3, 0, 1)
    for parts in (2, 3, 6):
        split = [objective.losses(3, part, parts) for part in range(parts)]
        assert [i for part in split for i in part.ids] == whole.ids
        torch.testing.assert_close(torch.cat([part.per_sample for part in split]), whole.per_sample)


@pytest.mark.parametrize("what", ["flip", "truncate", "missing", "manifest", "state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, what: str):
    train(tmp_path / "run")
    before = fingerprint(tmp_path / "run")
    last = RunFolder.open(tmp_path / "run").checkpoint_folders()[-1]
    file = last / {"manifest": "manifest.json", "state": "state.json"}.get(what, "optimizer.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    if what == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:100] if what == "truncate" else data)
    outcome = train(tmp_path / "run")
    assert outcome.resumed == 10
    assert fingerprint(tmp_path / "run") == before
    said = capsys.readouterr().err
    assert file.name in said and "step-000010" in said
    aside = [
        event for event in RunFolder.open(tmp_path / "run").events() if event["kind"] == "damaged_checkpoint"
    ]
    assert len(aside) == 1 and file.name in aside[0]["reason"]
    assert (tmp_path / "run" / aside[0]["file"]).is_dir()


def test_when_no_checkpoint_is_whole_nothing_is_overwritten(tmp_path):
    train(tmp_path / "run", keep_checkpoints=1, keep_best=False)
    folder = RunFolder.open(tmp_path / "run").checkpoint_folders()[0]
    (folder / "model.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(Failed, match="no earlier checkpoint"):
            train(tmp_path / "run", keep_checkpoints=1, keep_best=False)


def test_old_checkpoints_go_and_chosen_ones_stay(tmp_path):
    train(tmp_path / "run", save_every=2, keep_checkpoints=2, keep_every=4, keep_best=False)
    names = [folder.name for folder in RunFolder.open(tmp_path / "run").checkpoint_folders()]
    assert names == ["step-000004", "step-000008", "step-000010", "step-000012"]


@pytest.mark.parametrize("gradient_accumulation", [1, 3])
@pytest.mark.precisions("fp32", "bf16")
def test_a_loss_that_is_not_finite_stops_before_the_weights_move(
    tmp_path, gradient_accumulation: int, monkeypatch
):
    original = Encoded.read

    def poisoned(self, indices, seed, epoch):
        batch = original(self, indices, seed, epoch)
        for row, sample in enumerate(batch.ids):
            if sample == 1007 and epoch == 2:
                batch.latents[row, 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(Encoded, "read", poisoned)
    with pytest.raises(Failed, match=r"cat_007\.png.*came out of first") as failed:
        train(tmp_path / "run", gradient_accumulation=gradient_accumulation)
    assert "cat_006.png" not in str(failed.value)
    box = json.loads((tmp_path / "run" / "black_box.json").read_text())
    assert box["samples"] == ["cat_007.png"]
    step = box["step"]
    assert RunFolder.open(tmp_path / "run").checkpoint_folders()[-1].name == f"step-{step:06d}"
    monkeypatch.setattr(Encoded, "read", original)
    train(tmp_path / "run", gradient_accumulation=gradient_accumulation)
    train(tmp_path / "clean", gradient_accumulation=gradient_accumulation)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "clean")


def test_another_network_is_refused_by_name(tmp_path):
    train(tmp_path / "run", steps=2)
    objective, network, settings = make(steps=4)
    network.second = torch.nn.Linear(16, 33)
    from sfumato.training.loop.loop import fit

    with pytest.raises(Refused, match=r"second\.bias"):
        fit(objective, network, settings, RunFolder.open(tmp_path / "run"))


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    import shutil

    train(tmp_path / "run", steps=5)
    before = fingerprint(tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(Failed, match="GB"):
        train(tmp_path / "run", steps=12)
    assert fingerprint(tmp_path / "run") == before


def test_changed_settings_are_said(tmp_path, capsys):
    train(tmp_path / "run", steps=2)
    train(tmp_path / "run", steps=4, learning_rate=1e-3)
    assert "learning_rate was 0.01 and is 0.001" in capsys.readouterr().err


NEW_RATES = {
    "the rate": {"learning_rate": 1e-3},
    "the schedule": {"lr_schedule": "cosine"},
    "a longer warm-up": {"warmup_steps": 9},
    "multipliers": {"lr_multipliers": Table({"first*": 0.5, "second.bias": 3.0})},
    "no multipliers": {"lr_multipliers": Table()},
    "all of it": {"learning_rate": 3e-3, "lr_schedule": "linear", "lr_multipliers": Table({"second*": 0.1})},
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("change", NEW_RATES.values(), ids=NEW_RATES)
def test_rates_changed_on_the_way_are_rates_planned_for_that_step(
    tmp_path, monkeypatch, capsys, change: dict[str, object], optimizer: str
):
    """Law: a run that goes on with other rates has the bits of one whose optimizer got them at that step."""
    before = {"optimizer": optimizer, "lr_multipliers": Table({"first*": 2.0})}
    after = before | change
    train(tmp_path / "resumed", steps=5, **before)
    train(tmp_path / "resumed", **after)
    train(tmp_path / "resumed", steps=12, **after)

    step = RunOptimizer.step
    _, _, settings = make(**after)

    def planned(self: RunOptimizer, number: int, *args: object) -> float:
        if number == 5:  # the judge: rates of each weight by its name, nothing of checkpoints
            for part in self.parts:
                for group in part.param_groups:
                    group["rates"] = [
                        next((by for p, by in settings.lr_multipliers.items() if fnmatchcase(name, p)), 1.0)
                        for name in (self.names[id(weight)] for weight in group["params"])
                    ]
                split = [
                    {**group, "params": [weight], "lr": settings.learning_rate * rate}
                    for group in part.param_groups
                    for weight, rate in zip(group["params"], group["rates"], strict=True)
                ]
                part.param_groups[:] = split
            self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]
            self.settings = settings
        return step(self, number, *args)

    monkeypatch.setattr(RunOptimizer, "step", planned)
    train(tmp_path / "planned", **before)
    last = [RunFolder.open(tmp_path / name).checkpoint_folders()[-1] for name in ("resumed", "planned")]
    for file in ("model.safetensors", "ema.safetensors"):
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes()
    said = capsys.readouterr().err
    for name in change:
        assert said.count(f"train.{name} was ") == 1, said
    assert "from step 5 on" in said and "not bit for bit" not in said
    notes = [
        event["text"] for event in RunFolder.open(tmp_path / "resumed").events() if event["kind"] == "note"
    ]
    assert any("from step 5 on" in note for note in notes)


def test_a_run_with_nothing_left_to_train_says_so_and_why(tmp_path, capsys):
    train(tmp_path / "run", steps=4)
    assert train(tmp_path / "run", steps=4).reason == "done"
    assert "is complete: 4 steps" in capsys.readouterr().err
    before = fingerprint(tmp_path / "run")
    outcome = train(tmp_path / "run", steps=3)
    assert (outcome.step, outcome.reason) == (4, "done")
    assert "has 4 steps already" in capsys.readouterr().err
    assert fingerprint(tmp_path / "run") == before
