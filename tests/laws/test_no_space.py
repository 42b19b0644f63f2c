"""Law: a disk that fills while a checkpoint is written ends the run in a sentence; what was saved stays."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError
from training_processes import run_on
from training_world import fingerprint, train

from sfumato.errors import Failed
from sfumato.run_folder import RunFolder
from sfumato.training.state import checkpoint

DISK_BYTES = 2_000_000
LEFT_BYTES = 24_000
"""Less than a checkpoint of the small world needs."""


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of two megabytes, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    """Leave too little for a checkpoint; the file whose removal makes room again."""
    free = shutil.disk_usage(disk).free - LEFT_BYTES
    (disk / "ballast").write_bytes(bytes(free))
    return disk / "ballast"


WORLD = {"validate_every": 0, "ema_snapshot_every": 0, "log_every": 12, "save_every": 3}


@pytest.mark.parametrize("beside", [False, True], ids=["in the way", "beside the steps"])
def test_a_disk_that_fills_while_saving_keeps_what_was_saved(disk, tmp_path, monkeypatch, beside: bool):
    """The room is not asked for before, as if another program took it meanwhile."""
    train(tmp_path / "through", **WORLD)
    monkeypatch.setattr(checkpoint, "check_disk_space", lambda *_: None)
    train(disk / "run", **{**WORLD, "steps": 3, "save_async": beside})
    ballast = fill(disk)
    with pytest.raises(Failed, match=r"no space is left on this disk.*saved before is intact"):
        train(disk / "run", **{**WORLD, "save_async": beside})
    run = RunFolder.open(disk / "run")
    assert [checkpoint.find_damage(folder) for folder in run.checkpoint_folders()] == [None]
    assert not list(run.checkpoints.glob(".*"))
    ballast.unlink()
    train(disk / "run", **{**WORLD, "save_async": beside})
    assert fingerprint(disk / "run") == fingerprint(tmp_path / "through")


def test_room_is_asked_for_before_anything_is_written(disk):
    with pytest.raises(Failed, match=r"the next checkpoint needs .* GB, and the disk has"):
        train(disk / "run", **WORLD)
    assert not RunFolder.open(disk / "run").checkpoint_folders()


def test_a_file_cut_short_by_the_disk_is_no_checkpoint(tmp_path, monkeypatch):
    """The same where no disk can be mounted: a writer that stops half way."""

    def half(tensors, file, told=None):
        Path(file).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    train(tmp_path / "run", **{**WORLD, "steps": 3})
    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(Failed, match="no space is left on this disk"):
        train(tmp_path / "run", **WORLD)
    run = RunFolder.open(tmp_path / "run")
    assert [folder.name for folder in run.checkpoint_folders()] == ["step-000003"]
    assert checkpoint.find_damage(run.checkpoint_folder(3)) is None and not list(run.checkpoints.glob(".*"))


@pytest.mark.slow
def test_when_one_process_finds_no_room_all_of_them_end_and_the_last_checkpoint_stays(disk, monkeypatch):
    monkeypatch.setattr(checkpoint, "check_disk_space", lambda *_: None)
    changes = {**WORLD, "parallel": "fsdp"}
    run_on(2, disk / "run", **{**changes, "steps": 3})
    before, ballast = fingerprint(disk / "run"), fill(disk)
    with pytest.raises(pytest.fail.Exception):
        run_on(2, disk / "run", **changes)
    assert fingerprint(disk / "run") == before
    ballast.unlink()
    run_on(2, disk / "run", **changes)
    assert RunFolder.open(disk / "run").checkpoint_folders()[-1].name == "step-000012"
