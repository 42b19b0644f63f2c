"""`train.context_parallel` from the command line: planned, refused where it cannot be, trained under "
"torchrun."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.run_folder import RunFolder

from .test_data_keys import weights
from .world import one_sentence, sfumato, write_recipe


def test_a_plan_counts_activations_by_the_processes_that_share_a_sample(tmp_path):
    recipe = write_recipe(tmp_path)
    words = ["train.batch=32", "model.codec_stride=4", "model.depth=2", "--json"]
    one = sfumato("plan", recipe, *words, "--devices", 2).json()
    shared = sfumato("plan", recipe, *words, "train.context_parallel=2", "--devices", 2).json()
    assert shared["context"] == "2 processes share each sample"
    # two processes have half a batch of whole samples each, or a whole batch of half samples
    assert shared["memory"]["activations"] == pytest.approx(one["memory"]["activations"], rel=0.3)


def test_what_cannot_be_shared_is_refused_before_anything_is_computed(tmp_path):
    recipe = write_recipe(tmp_path)
    refused = {
        (): ("1 process was started", "torchrun"),
        ("--devices=3",): ("3 processes", "multiple of 2"),
        ("train.exact_elastic=true", "--devices=2"): ("train.exact_elastic", "Leave one out"),
        ("model.denoiser=unet", "--devices=2"): ("unet", "Leave it at 1"),
        ("model.width=36", "model.heads=3", "--devices=2"): ("attention heads", "divisor of 3"),
        ("model.codec_stride=16", "--devices=2"): (
            "1 tokens cannot be shared evenly by 2",
            "train.context_parallel",
        ),
    }
    for words, said in refused.items():
        one_sentence(sfumato("plan", recipe, "train.context_parallel=2", *words), *said)
    one_sentence(sfumato("train", recipe, "train.context_parallel=2"), "1 process was started")


def torchrun(*words: object) -> None:
    """The command on two processes."""
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sfumato"]
    done = subprocess.run(
        [sys.executable, *many, *map(str, words)], capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_torchrun_with_shared_samples_is_the_run_of_one_process_and_draws_its_pictures(tmp_path):
    recipe = write_recipe(tmp_path)
    assert sfumato("train", recipe, "train.ema=0.9").code == 0
    torchrun("train", recipe, "train.context_parallel=2", "train.ema=0.9", f"output={tmp_path / 'shared'}")
    alone, shared = weights(tmp_path / "run"), weights(tmp_path / "shared")
    for name, weight in alone.items():
        torch.testing.assert_close(shared[name], weight, rtol=1e-3, atol=1e-5)
    events = RunFolder.open(tmp_path / "shared").events()
    (start,) = [event for event in events if event["kind"] == "start"]
    assert start["processes"] == 2 and start["settings"]["context_parallel"] == 2
    drawn = [event for event in events if event["kind"] == "pictures"]
    assert drawn and all((tmp_path / "shared" / file).is_file() for event in drawn for file in event["files"])
    alone = ["train", recipe, "train.ema=0.9", "train.steps=8", f"output={tmp_path / 'shared'}"]
    assert sfumato(*alone).code == 0  # it goes on, each sample whole again
    words = ["generate", tmp_path / "run", "--prompt", "a red thing", "--steps", 2, "--count", 2]
    one_sentence(sfumato(*words, "--context-parallel", 2), "2 processes draw each picture", "torchrun")
    torchrun(*words, "--context-parallel", 2, "--out", tmp_path / "two")
    assert sfumato(*words, "--out", tmp_path / "one").code == 0
    for file in sorted((tmp_path / "one").glob("0*.png")):
        one, two = (
            np.asarray(Image.open(place / file.name), int) for place in (file.parent, tmp_path / "two")
        )
        assert abs(one - two).max() <= 1
