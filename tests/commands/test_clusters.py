"""The examples for clusters start the run they promise: here two processes on CPUs, on a cluster of one."""

import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sfumato.run_folder import RunFolder

EXAMPLES = Path(__file__).parents[2] / "examples" / "cluster"
RECIPE = """
output = "run"
[model]
text_encoder = "none"
width = 32
depth = 1
heads = 2
codec = "pixels"
[data]
train = "pictures"
captions = "none"
resolution = 16
cache_dir = "store"
[train]
steps = 4
batch = 4
save_every = 2
validate_every = 0
ema_snapshot_every = 0
sanity = false
parallel = "fsdp"
[sample]
every = 100000
steps = 2
"""


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a recipe and its pictures."""
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 255 - 20 * i, 90)).save(tmp_path / "pictures" / f"{i:02d}.png")
    (tmp_path / "apples.toml").write_text(RECIPE)
    return tmp_path


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment(place: Path, **more: str) -> dict[str, str]:
    """With stand-ins for the cluster's own commands, and this Python's first."""
    tools = place / "bin"
    tools.mkdir()
    for name, said in (("srun", 'exec "$@"'), ("scontrol", "echo 127.0.0.1")):
        (tools / name).write_text(f"#!/bin/sh\n{said}\n")
        (tools / name).chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def is_done(run: Path) -> None:
    """The run ended, and two processes divided it."""
    events = RunFolder.open(run).events()
    start = next(event for event in events if event["kind"] == "start")
    assert (start["processes"], start["parallel"]) == (2, "fsdp")
    assert events[-1]["kind"] == "stop" and events[-1]["step"] == 4


def finish(words: list[str], place: Path, more: dict[str, str]) -> None:
    done = subprocess.run(words, cwd=place, env=more, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_script_for_slurm(place):
    more = environment(
        place, SLURM_NNODES="1", SLURM_GPUS_ON_NODE="2", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="node[1]",
        RDZV_PORT=port(),
    )  # fmt: skip
    finish(["bash", str(EXAMPLES / "slurm.sh"), "apples.toml", "train.log_every=1"], place, more)
    is_done(place / "run")


@pytest.mark.slow
def test_the_task_for_skypilot(place):
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    more = environment(
        place, SKYPILOT_NODE_IPS="127.0.0.1", SKYPILOT_NUM_NODES="1", SKYPILOT_NODE_RANK="0",
        SKYPILOT_NUM_GPUS_PER_NODE="2", RUNS=str(place / "runs"), MASTER_PORT=port(), RECIPE="apples.toml",
    )  # fmt: skip
    assert task["envs"]["RECIPE"] == "apples.toml" and task["num_nodes"] == 2
    finish(["bash", "-c", task["run"]], place, more)
    is_done(place / "runs" / "apples")


SMALL_CLUSTER = """
import runpy, sys, ray
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_the_script_for_ray(place):
    words = ["apples.toml", "--workers", "2", f"output={place / 'run'}"]
    more = environment(place, RAY_TRAIN_V2_ENABLED="1", RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="600")
    finish([sys.executable, "-c", SMALL_CLUSTER, str(EXAMPLES / "ray_train.py"), *words], place, more)
    is_done(place / "run")
