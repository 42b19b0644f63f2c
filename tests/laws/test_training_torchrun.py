"""The whole command under torchrun: the run of one process, bit for bit, also when its workers are killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from training_world import fingerprint

from sfumato.models import files
from sfumato.run_folder import RunFolder

RECIPE = """
output = "{output}"
[model]
text_encoder = "none"
width = 32
depth = 1
heads = 2
latent_channels = 4
codec_width = 8
codec_steps = 3
codec_batch = 4
[data]
train = "pictures"
captions = "none"
resolution = 16
cache_dir = "store-{output}"
[train]
steps = {steps}
batch = 4
warmup_steps = 2
save_every = 2
validate_every = 0
log_every = 1
exact_elastic = true
[sample]
every = 100000
steps = 2
"""
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 255 - 20 * i, 90)).save(tmp_path / "pictures" / f"{i:02d}.png")
    return tmp_path


def start(
    folder: Path, output: str, processes: int, steps: int = 6, restarts: int = 0, *more: str
) -> subprocess.Popen[str]:
    recipe = folder / f"{output}.toml"
    recipe.write_text(RECIPE.format(output=output, steps=steps))
    many = [*TORCHRUN, str(processes), "--max-restarts", str(restarts)] if processes > 1 else []
    words = [sys.executable, *many, "-m", "sfumato", "train", str(recipe), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said


@pytest.mark.slow
def test_torchrun_on_2_and_4_processes_is_the_run_of_one(folder):
    for processes in (1, 2, 4):
        finish(start(folder, f"on{processes}", processes, steps=50))
    assert len({fingerprint(folder / f"on{processes}") for processes in (1, 2, 4)}) == 1


@pytest.mark.slow
def test_copies_and_divided_networks_are_the_run_of_one_also_when_it_moves_between_them(folder):
    """1 → 2 copies → 2 divided → 1, stopped by SIGTERM or at the end of its steps."""
    fast, steps = "train.exact_elastic=false", 12
    ways = {"one": (1, "auto"), "ddp": (2, "ddp"), "fsdp": (2, "fsdp")}
    for output, (processes, name) in ways.items():
        finish(start(folder, output, processes, steps, 0, fast, f"train.parallel={name}"))
    finish(start(folder, "moved", 1, 3, 0, fast))
    stopped = start(folder, "moved", 2, 10_000, 0, fast, "train.parallel=ddp")
    events = RunFolder(folder / "moved")
    wait_for(lambda: any(e["kind"] == "start" and e["processes"] == 2 for e in events.events()))
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=300)
    reached = int(events.checkpoint_folders()[-1].name.removeprefix("step-"))
    finish(start(folder, "moved", 2, reached + 3, 0, fast, "train.parallel=fsdp"))
    finish(start(folder, "moved", 1, reached + 5, 0, fast))
    finish(start(folder, "through", 1, reached + 5, 0, fast))
    for output, other in (("one", "ddp"), ("one", "fsdp"), ("through", "moved")):
        assert distance(folder / output, folder / other) < 1e-6


def distance(folder: Path, other: Path) -> float:
    """How far apart the weights, averages and moments of two runs are, relative to their size."""
    far = size = 0.0
    for group in ("model", "ema", "optimizer"):
        one, two = (
            files.read(RunFolder.open(place).checkpoint_folders()[-1], group) for place in (folder, other)
        )
        assert one.keys() == two.keys() and one
        far += sum(float((one[name].double() - two[name].double()).square().sum()) for name in one)
        size += sum(float(tensor.double().square().sum()) for tensor in one.values())
    return (far / size) ** 0.5


def wait_for(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_worker_is_started_again_and_the_run_ends_with_the_same_bits(folder):
    finish(start(folder, "peace", 1, steps=90))
    process = start(folder, "killed", 2, steps=90, restarts=3)
    lock = folder / "killed" / ".lock"
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not RunFolder(folder / "killed").checkpoint_folders():
        time.sleep(0.1)
    import json

    os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
    finish(process)
    assert fingerprint(folder / "killed") == fingerprint(folder / "peace")
    starts = [event for event in RunFolder.open(folder / "killed").events() if event["kind"] == "start"]
    assert starts[-1]["resumed"] and starts[-1]["processes"] == 2
