"""Laws of the trackers: they hear every number, change nothing, and are missed by name."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest
from training_world import fingerprint, train

from sfumato.errors import Refused
from sfumato.run_folder import RunFolder


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_hears_every_number_and_changes_nothing(tmp_path, monkeypatch, name: str):
    heard: list[tuple[int, dict[str, float]]] = []
    closed: list[bool] = []
    fake = SimpleNamespace(
        init=lambda **words: None,
        log=lambda values, step: heard.append((step, values)),
        finish=lambda: closed.append(True),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    train(tmp_path / "told", trackers=(name,))
    train(tmp_path / "silent")
    assert fingerprint(tmp_path / "told") == fingerprint(tmp_path / "silent")
    events = RunFolder.open(tmp_path / "told").events()
    wanted = [event["loss"] for event in events if event["kind"] == "step"]
    assert [values["train/loss"] for _, values in heard if "train/loss" in values] == wanted
    assert any("held_out/ema/loss" in values for _, values in heard)
    assert closed == [True]


def test_a_missing_tracker_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(Refused, match="pip install wandb"):
        train(tmp_path / "run", trackers=("wandb",))
    with pytest.raises(Refused, match="tensorboard"):
        train(tmp_path / "run", trackers=("tensorbord",))


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_its_file(tmp_path):
    train(tmp_path / "run", trackers=("tensorboard",))
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents*"))
