"""Killed twenty times anywhere, a run ends with the bits of one that nobody touched."""

import hashlib
import random
import signal
import subprocess
import sys
import time

import pytest

from .world import RECIPE, write_recipe

KILLS = 20
LONG = (
    RECIPE.replace("steps = 6", "steps = 400")
    .replace("codec_steps = 3", "codec_steps = 60")
    .replace("save_every = 2", "save_every = 20")
    .replace("validate_every = 3", "validate_every = 50")
    .replace("every = 3\nsteps = 2", "every = 100\nsteps = 2")
)


def hashes(folder):
    """The checksum of every tensor file of the newest checkpoint."""
    newest = max((folder / "run" / "checkpoints").glob("step-*"))
    files = sorted(newest.glob("*.safetensors"))
    assert newest.name == "step-000400" and len(files) == 5
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
def test_twenty_kills_anywhere_change_no_bit(tmp_path):
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    command = [sys.executable, "-m", "sfumato", "train"]
    for folder in (calm, rough):
        folder.mkdir()
    began = time.monotonic()
    subprocess.run([*command, str(write_recipe(calm, LONG))], check=True, capture_output=True)
    whole = time.monotonic() - began
    recipe, chance, kills = write_recipe(rough, LONG), random.Random(0), 0
    while True:
        process = subprocess.Popen(
            [*command, str(recipe)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            _, words = process.communicate(
                timeout=chance.uniform(0.2, 0.8) * whole if kills < KILLS else None
            )
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, words
        if kills >= KILLS:
            break
        newest = sorted((rough / "run" / "checkpoints").glob("step-*"))
        for folder in newest:  # it ended before enough kills: begin again from nothing but the store
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    print(f"{kills} kills, {whole:.1f} s undisturbed")
    assert hashes(calm) == hashes(rough)
