"""Laws of the run folder: whole at every moment, one writer, every event once."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sfumato import locks
from sfumato.errors import Failed, Refused
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


# ----------------------------------------------------------------------------- who writes


def test_another_pid_namespace_does_not_share_a_run(tmp_path: Path):
    """Law: the lock is the kernel's, so a process that cannot see the other's number is refused too."""
    run = RunFolder.create(tmp_path / "run")
    other = subprocess.Popen([sys.executable, "-c", HOLD, run.path], stdout=subprocess.PIPE, text=True)
    assert other.stdout and other.stdout.readline() == "held\n"
    there = json.loads((run.path / ".lock").read_text())
    blind = pytest.MonkeyPatch()
    try:
        blind.setattr(locks, "started", lambda pid: "now" if pid == os.getpid() else None)
        with pytest.raises(Refused, match=str(other.pid)), run.lock():
            pass
        blind.setattr(socket, "gethostname", lambda: "elsewhere")
        with pytest.raises(Refused, match=str(other.pid)), run.lock():
            pass
    finally:
        blind.undo()
        other.kill()
        other.wait()
        other.stdout.close()
    assert json.loads((run.path / ".lock").read_text()) == there


@pytest.mark.parametrize("age", [0.0, -3e7])
def test_a_copy_of_a_running_run_is_a_run_of_its_own(tmp_path: Path, age: float):
    run = RunFolder.create(tmp_path / "run")
    with run.lock():
        shutil.copytree(run.path, tmp_path / "copy")
        now = time.time()
        os.utime(tmp_path / "copy" / ".lock", (now - age, now - age))
        with RunFolder.open(tmp_path / "copy").lock():
            pass


def test_a_clock_ahead_does_not_block_for_a_year(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run")
    (run.path / ".lock").write_text(json.dumps({"pid": 1, "started": "1", "host": "elsewhere"}))
    with pytest.raises(Refused, match=r"delete .*\.lock"), run.lock():
        pass
    ahead = time.time() + 3e7
    os.utime(run.path / ".lock", (ahead, ahead))
    with run.lock():
        pass


# ----------------------------------------------------------------------------- what is written through


@pytest.mark.parametrize("name", [".lock", "events.jsonl", "log.txt"])
def test_a_file_that_is_a_link_is_refused_and_its_target_left_alone(tmp_path: Path, name: str):
    run = RunFolder.create(tmp_path / "run")
    (tmp_path / "mine").write_text("my only copy")
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(Refused, match=re.escape(str(run.path / name))), run.lock():
        pass
    with pytest.raises(Refused, match="is a link"):
        RunFolder.create(run.path)
    if name == "events.jsonl":
        with pytest.raises(Refused):
            run.event("note", text="through")
    assert (tmp_path / "mine").read_text() == "my only copy"


@pytest.mark.parametrize("name", ["checkpoints", "samples", "model", "averages"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_folder_that_is_a_link_is_refused_and_nothing_in_it_removed(
    tmp_path: Path, name: str, is_there: bool
):
    run = RunFolder.create(tmp_path / "run")
    if is_there:
        (tmp_path / "mine" / ".thesis.part").mkdir(parents=True)
    if (run.path / name).exists():
        (run.path / name).rmdir()
    (run.path / name).symlink_to(tmp_path / "mine")
    with pytest.raises(Refused, match="is a link"), run.lock():
        pass
    assert (tmp_path / "mine" / ".thesis.part").exists() == is_there


@pytest.mark.parametrize("name", [".lock", "events.jsonl", "checkpoints"])
def test_what_is_of_the_wrong_kind_is_refused_by_name(tmp_path: Path, name: str):
    run = RunFolder.create(tmp_path / "run")
    if name == "checkpoints":
        (run.path / name).rmdir()
        (run.path / name).write_text("")
    else:
        (run.path / name).mkdir()
    with pytest.raises(Refused, match=re.escape(name)), run.lock():
        pass


@pytest.mark.parametrize("kind", ["a device", "a dangling link", "a file below a file", "a long name"])
def test_an_output_that_can_be_no_folder_is_refused(tmp_path: Path, kind: str):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    places = {"a device": "/dev/null", "a dangling link": "link", "a file below a file": "file/run"}
    with pytest.raises(Refused):
        RunFolder.create(tmp_path / places.get(kind, "x" * 300))


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_events_that_never_end_are_refused(tmp_path: Path, kind: str):
    from sfumato.report import run_page

    run = RunFolder.create(tmp_path / "run")
    run.events_file.unlink(missing_ok=True)
    os.mkfifo(run.events_file) if kind == "fifo" else run.events_file.symlink_to("/dev/zero")
    with pytest.raises(Refused, match=r"events\.jsonl"):
        run_page.write(run)


def test_a_run_that_was_removed_while_it_is_written_is_not_made_again(tmp_path: Path):
    run = RunFolder.create(tmp_path / "run")
    with run.lock():
        run.event("note", text="before")
        shutil.rmtree(run.path)
        with pytest.raises(Failed, match="removed or moved"):
            run.event("note", text="after")
    assert not run.path.exists()
    run = RunFolder.create(tmp_path / "run")
    with run.lock():
        run.path.rename(tmp_path / "moved")
        with pytest.raises(Failed, match="removed or moved"):
            run.check_is_there()
    with RunFolder.open(tmp_path / "moved").lock():
        pass


def test_files_of_a_written_folder_have_the_usual_mode(tmp_path: Path):
    """Law: whoever wrote a file, it has the mode that a new file has here."""
    from safetensors.torch import save_file

    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "made") as folder:
            (folder / "below").mkdir()
            save_file({"a": torch.zeros(1)}, folder / "below" / "a.safetensors")
            (folder / "b.json").write_text("{}")
            (folder / "b.json").chmod(0o600)
        (tmp_path / "usual").touch()
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "made").rglob("*") if file.is_file()}
    assert modes == {(tmp_path / "usual").stat().st_mode & 0o777} == {0o640}


WRITE = """
import sys, time
from pathlib import Path
from sfumato.run_folder import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "large").write_bytes(bytes(1000))
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_one_is_left_alone(tmp_path: Path):
    def begin() -> "subprocess.Popen[str]":
        words = [sys.executable, "-c", WRITE, tmp_path / "out"]
        one = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert one.stdout and one.stdout.readline() == "writing\n"
        return one

    killed, living = begin(), begin()
    try:
        killed.kill()
        killed.wait()
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "small").write_text("")
        rests = [file.name for file in tmp_path.glob(".out.*")]
        assert rests == [f".out.{living.pid}.part"]
    finally:
        for one in (killed, living):
            one.kill()
            one.wait()
            one.stdout.close()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "line",
    [
        '{"kind":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"kind":"step","step":"x","loss":"y"}',
        '{"kind":"pictures","step":1,"files":"abc","prompts":5}',
        '{"kind":"pictures","step":[1],"files":["a"]}',
        '{"kind":"pictures","step":1,"files":["a"],"shown":[1]}',
        '{"kind":"phase"}',
        '{"kind":["a"],"step":1}',
        '{"kind":"phase","name":"a","seconds":"NaN"}',
        '{"kind":"step","step":1,"loss":1e999}',
        '{"kind":"step","step":1e999,"loss":1}',
        '{"kind":"step","step":' + "9" * 400 + ',"loss":1}',
        '{"kind":"validation","step":1,"split":"held_out","loss":1,"by_level":[{"level":{}}]}',
        '{"kind":"validation","step":1,"split":{},"loss":1}',
        '{"kind":"data","summary":5}',
        '{"kind":"data","summary":{"samples":"many","set_aside":[3]}}',
        '{"kind":"evaluation","metrics":[1]}',
        '{"kind":"evaluation","metrics":{"a":{"value":"b"}}}',
        '{"kind":"demo_evaluation","accuracy":5,"notes":{"a":[]}}',
        '{"kind":"start","device":{},"parameters":"many","threads":[]}',
        '{"kind":"note","text":{}}',
        '{"kind":"stop","reason":[],"step":"x"}',
        '{"kind":"start","settings":[]}',
        "[1]",
        "5",
        "null",
    ],
    ids=lambda line: line[:50],
)
def test_whatever_a_line_of_events_is_the_page_is_written(tmp_path: Path, line: str):
    """Law: a stranger's line is left out; those beside it are shown."""
    from sfumato.report import run_page

    run = RunFolder.create(tmp_path / "run")
    run.event("step", step=7, loss=0.25)
    with run.events_file.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    page = run_page.write(run).read_text(encoding="utf-8")
    assert "Steps" in page and ">7<" in page.replace(" ", "").replace("\n", "")
