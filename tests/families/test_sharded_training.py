"""Laws: a family is trained alike by one process, by two that divide it and by two that share its samples."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import sfumato
from sfumato.errors import Refused
from sfumato.models import files
from sfumato.run_folder import RunFolder
from sfumato.training.distributed.processes import Processes
from workers import run_processes

from .test_training import SHOWN, write_recipe
from .zoo import ZOO

LORA = ('train = "lora"', "rank = 2")


def work(recipe: Path, overrides: list[str]) -> None:
    sfumato.train(recipe, overrides, say=lambda sentence: None)


def train_on_two(recipe: Path, *overrides: str) -> None:
    run_processes(2, work, recipe, list(overrides))


def distance(recipe: Path, folder: Path, *many: str) -> float:
    """How far apart the weights are that one process and two end with, relative to their size."""
    quiet = [
        "train.sanity=false",
        "train.ema_snapshot_every=0",
        "train.learning_rate=1e-4",
        "sample.prompts=[]",
    ]
    alone = [] if any("context" in word for word in many) else ["train.gradient_accumulation=2"]
    sfumato.train(recipe, [*quiet, f"output={folder / 'one'}", *alone], say=lambda sentence: None)
    train_on_two(recipe, *quiet, f"output={folder / 'two'}", *many)
    one, two = (
        files.read(RunFolder.open(place).checkpoint_folders()[-1], "model")
        for place in (folder / "one", folder / "two")
    )
    return apart(one, two)


def apart(one: Any, two: Any) -> float:
    """How far two checkpoints are apart, over their size."""
    assert one.keys() == two.keys()
    far = sum(float((one[key].double() - two[key].double()).square().sum()) for key in one)
    size = sum(float(weight.double().square().sum()) for weight in one.values())
    return (far / size) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "tokens"])
def test_text_encoders_learn_under_torchrun_as_in_one_process(tmp_path, train: str):
    """Law: `torchrun --nproc-per-node 2 -m sfumato train` teaches encoders and words as one process does."""
    words = 'new_tokens = ["<cat>=red circle"]'
    lora = ('train_text_encoder = "lora"', "rank = 2") if train == "lora" else ()
    recipe = write_recipe("stable-diffusion-xl", tmp_path, f'train = "{train}"', words, *lora)
    keys = [
        "data.trigger_words=<cat>",
        "train.ema_snapshot_every=0",
        "train.learning_rate=1e-4",
        "sample.prompts=[]",
    ]
    sfumato.train(
        recipe, [*keys, f"output={tmp_path}/one", "train.gradient_accumulation=2"], say=lambda sentence: None
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "sfumato", "train", str(recipe), *keys, f"output={tmp_path}/two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (
        files.read(RunFolder.open(tmp_path / place).checkpoint_folders()[-1], "model")
        for place in ("one", "two")
    )
    assert any(key.startswith("text_encoder_2") for key in one)
    assert apart(one, two) < 1e-4
    assert sfumato.load(tmp_path / "two").condition(["a <cat>"])["tokens"].isfinite().all()


LEAST = {(): 1e-5, LORA: 1e-4}  # a LoRA's first gradients are near 0, Adam's steps are not


@pytest.mark.slow
@pytest.mark.parametrize("model", LEAST, ids=["whole", "lora"])
@pytest.mark.parametrize("name", [name for name in ZOO if name not in SHOWN])
def test_two_processes_that_divide_a_family_train_it_as_one_does(tmp_path, name: str, model: tuple[str, ...]):
    recipe = write_recipe(name, tmp_path, *model)
    assert distance(recipe, tmp_path, "train.parallel=fsdp") < LEAST[model]


@pytest.mark.slow
@pytest.mark.parametrize("model", LEAST, ids=["whole", "lora"])
@pytest.mark.parametrize(
    "name", ["wan-2.1", "wan-2.2-a14b", "wan-2.2-5b", "flux-dev", "flux-2-klein", "qwen-image"]
)
def test_two_processes_that_share_samples_train_a_family_as_one_does(
    tmp_path, name: str, model: tuple[str, ...]
):
    recipe = write_recipe(name, tmp_path, *model)
    assert distance(recipe, tmp_path, "train.context_parallel=2") < LEAST[model]


def test_a_family_that_cannot_be_shared_is_refused_with_the_reason(tmp_path, monkeypatch):
    pair = Processes(0, 2)
    monkeypatch.setattr("sfumato.workflow.train_run.join_processes", lambda device: nullcontext(pair))
    for name, why in (("ltx-video", "mask for all heads"), ("stable-diffusion-3.5", "no plan")):
        recipe = write_recipe(name, tmp_path / name)
        with pytest.raises(Refused, match=why):
            sfumato.train(recipe, ["train.context_parallel=2"], say=lambda sentence: None)
