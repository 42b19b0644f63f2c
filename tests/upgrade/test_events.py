"""Law: what runs of 0.1 recorded is read under the names that are written now, line by line."""

import json
from typing import Any

import pytest

from sfumato.run_folder import RENAMED_KINDS, RENAMED_METRICS, RunFolder


def read_back(folder: Any, event: dict[str, Any]) -> dict[str, Any]:
    """The event as a run reads it whose file holds that one line."""
    run = RunFolder.create(folder)
    run.events_file.write_text(json.dumps(event) + "\n", encoding="utf-8")
    (found,) = run.events()
    return found


@pytest.mark.parametrize("old, new", RENAMED_KINDS.items())
def test_an_old_kind_of_event_is_read_as_what_it_is_called_now(old, new, tmp_path):
    assert read_back(tmp_path, {"kind": old, "step": 3, "file": "x"}) == {"kind": new, "step": 3, "file": "x"}


@pytest.mark.parametrize("old, new", RENAMED_METRICS.items())
def test_an_old_metric_is_read_as_what_it_is_called_now(old, new, tmp_path):
    event = {"kind": "evaluation", "metrics": {old: 1, "loss_train": 2}}
    assert read_back(tmp_path, event)["metrics"] == {new: 1, "loss_train": 2}


def test_the_hashes_of_own_code_are_read_by_their_name(tmp_path):
    codes = {"train.loss": {"mine.py:loss": "0123"}}
    assert read_back(tmp_path, {"kind": "code", "own": codes}) == {"kind": "code", "hashes": codes}


def test_settings_of_a_start_are_read_by_their_keys_of_today(tmp_path):
    event = {"kind": "start", "settings": {"warmup": 3, "schedule": "cosine", "clip": 0.5, "steps": 9}}
    settings = {"warmup_steps": 3, "lr_schedule": "cosine", "max_grad_norm": 0.5, "steps": 9}
    assert read_back(tmp_path, event)["settings"] == settings
