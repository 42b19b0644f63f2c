"""Laws of the run folder: whole at every moment, one writer, every event once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sfumato.errors import Refused
from sfumato.run_folder import RunFolder, atomic_folder, checksum, write_atomic


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    file = tmp_path / "a.txt"
    write_atomic(file, "old")
    with pytest.raises(TypeError):
        write_atomic(file, 3)  # pyright: ignore[reportArgumentType]
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "f") as beside:
        (beside / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "f") as beside:
            (beside / "whole").write_text(text)
        assert (tmp_path / "f" / "whole").read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_the_checksum_is_sha256(tmp_path: Path):
    write_atomic(tmp_path / "e", b"")
    assert checksum(tmp_path / "e").startswith("e3b0c44298fc1c14")


def test_creating_a_run_twice_keeps_it_and_a_stranger_is_refused(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run", "seed = 1", "seed = 1\nsteps = 2")
    run.event("note", text="hello")
    again = RunFolder.create(tmp_path / "run", "seed = 2")
    assert again.recipe.read_text() == "seed = 2"
    assert again.effective.read_text() == "seed = 1\nsteps = 2"
    assert [event["text"] for event in again.events()] == ["hello"]
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "tom.png").touch()
    with pytest.raises(Refused, match=r"tom\.png"):
        RunFolder.create(tmp_path / "cats")
    with pytest.raises(Refused, match="no run folder"):
        RunFolder.open(tmp_path / "cats")
    with pytest.raises(Refused, match="does not exist"):
        RunFolder.open(tmp_path / "nowhere")


def test_of_an_event_repeated_after_a_resume_the_last_wins(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run")
    for step in (1, 2, 3):
        run.event("step", step=step, loss=1.0)
    run.event("validation", step=3, split="train", weights="raw", loss=5.0)
    run.event("validation", step=3, split="held_out", weights="raw", loss=6.0)
    run.close()
    with run.events_file.open("ab") as file:
        file.write(b'{"kind": "step", "step": 4, "lo')
    run.event("step", step=3, loss=2.0)
    run.event("note", text="a")
    run.event("note", text="a")
    events = run.events()
    assert [event["loss"] for event in events if event["kind"] == "step"] == [1.0, 1.0, 2.0]
    assert [event["step"] for event in events if event["kind"] == "step"] == [1, 2, 3]
    assert sum(event["kind"] == "validation" for event in events) == 2
    assert sum(event["kind"] == "note" for event in events) == 2


def test_events_of_older_versions_are_read_by_the_names_of_today(tmp_path: Path):
    """Law: kinds, metrics and settings; what was written before and after an update is one event."""
    run = RunFolder.create(tmp_path / "run")
    run.event("start", step=0, settings={"clip": 0.5, "steps": 3})
    run.event("held_out", step=3, split="held_out", weights="ema", loss=5.0)
    run.event("validation", step=3, split="held_out", weights="ema", loss=6.0)
    run.event("gap", step=3, weights="ema", gap=0.5)
    run.event("judge", step=3, accuracy={"trained": 0.75})
    run.event("evaluation", step=3, metrics={"kid": {"value": 0.1}, "copied": {"value": 0.0}})
    start, validation, gap, judged, evaluation = run.events()
    assert start["settings"] == {"max_grad_norm": 0.5, "steps": 3}
    assert (validation["kind"], validation["loss"]) == ("validation", 6.0)
    assert (gap["kind"], judged["kind"]) == ("generalization_gap", "demo_evaluation")
    assert set(evaluation["metrics"]) == {"latent_kernel_distance", "memorized"}


HOLD = """
import sys, time
from sfumato.run_folder import RunFolder
with RunFolder.open(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_living_writer_is_respected_and_a_killed_one_is_not(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run")
    other = subprocess.Popen([sys.executable, "-c", HOLD, run.path], stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "held\n"
    with pytest.raises(Refused, match=str(other.pid)), run.lock():
        pass
    other.kill()
    other.wait()
    other.stdout.close()
    assert (run.path / ".lock").exists()
    with run.lock():
        assert json.loads((run.path / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(Refused, match=str(os.getpid())), run.lock():
            pass
    assert not (run.path / ".lock").exists()


def test_a_pid_used_again_or_a_torn_lock_does_not_block(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run")
    reused = {"pid": os.getppid(), "started": "1", "host": socket.gethostname()}
    for text in (json.dumps(reused), '{"pid": 1', ""):
        (run.path / ".lock").write_text(text)
        with run.lock():
            pass


def test_checkpoints_come_in_order_of_their_steps(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run")
    for name in ("step-1000000", "step-000500", ".step-000700.1.part", "junk"):
        (run.checkpoints / name).mkdir()
    assert [folder.name for folder in run.checkpoint_folders()] == ["step-000500", "step-1000000"]
