"""Laws of violence: kill it whenever you like, the run ends with the bits of the one left in peace."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_world import fingerprint

from sfumato.run_folder import RunFolder

WORLD = Path(__file__).with_name("training_world.py")
WORDS = [
    "steps=40",
    "save_every=4",
    "log_every=3",
    "validate_every=10",
    "pause=0.03",
    "gradient_accumulation=2",
]


def start(folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(WORLD), str(folder), *WORDS]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)


def steps_done(folder: Path) -> int:
    """The newest step recorded; 0 before the first."""
    file = folder / "events.jsonl"
    return (
        max((event.get("step", 0) for event in RunFolder(folder).events()), default=0) if file.exists() else 0
    )


def finish(folder: Path) -> None:
    process = start(folder)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said


def kill_at_random(folder: Path, kills: int, dice: random.Random, signals: list[int]) -> int:
    """Kill the run `kills` times at random moments; how many kills met it alive."""
    met = 0
    for _ in range(kills):
        process = start(folder)
        before = steps_done(folder)
        deadline = time.monotonic() + 300
        while process.poll() is None and steps_done(folder) <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 0.5))
        number = dice.choice(signals)
        if process.poll() is None:
            process.send_signal(number)
            met += 1
        _, said = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL, 130, 143), said
        if process.returncode == 0:
            break
    return met


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGINT, signal.SIGKILL]])
def test_killed_by_the_dozen_the_run_ends_with_the_same_bits(tmp_path, signals: list[int]):
    finish(tmp_path / "peace")
    dice = random.Random(11)
    met = 0
    for round_number in range(3):
        met += kill_at_random(tmp_path / str(round_number), 6, dice, signals)
        finish(tmp_path / str(round_number))
        assert fingerprint(tmp_path / str(round_number)) == fingerprint(tmp_path / "peace")
        assert not list((tmp_path / str(round_number) / "checkpoints").glob(".*.part"))
    assert met >= 12


def test_sigterm_saves_and_exits_143(tmp_path):
    process = start(tmp_path / "run")
    deadline = time.monotonic() + 300
    while steps_done(tmp_path / "run") < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 143, said
    assert time.monotonic() - began < 30
    assert "Stopped by SIGTERM at step" in said and "goes on from there" in said
    run = RunFolder.open(tmp_path / "run")
    last = run.events()[-1]
    assert last["kind"] == "stop"
    assert run.checkpoint_folders()[-1].name == f"step-{last['step']:06d}"
    assert not (run.path / ".lock").exists()
