"""The same few commands, from a folder of pictures to new pictures and numbers about them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfumato.commands import console
from sfumato.run_folder import RunFolder
from sfumato.settings import RENAMED
from sfumato.training.state.checkpoint import write_state_and_manifest

from .world import RECIPE, sfumato, write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a recipe, its pictures and its finished run."""
    folder = tmp_path_factory.mktemp("trained")
    answer = sfumato("train", write_recipe(folder), "--json")
    assert answer.code == 0, answer.err
    return folder


def test_train_writes_a_run_that_says_everything(trained):
    run = RunFolder.open(trained / "run")
    events = run.events()
    kinds = {event["kind"] for event in events}
    assert {"start", "step", "validation", "pictures", "checkpoint", "phase", "data", "stop"} <= kinds
    assert [event["step"] for event in events if event["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert run.checkpoint_folders()[-1].name == "step-000006"
    assert "# recipe.toml" in run.effective.read_text() and "# default" in run.effective.read_text()
    page = run.report.read_text()
    assert "data:image/png;base64," in page and "http://" not in page and "https://" not in page


def test_training_on_costs_nothing_twice(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "again")
    recipe = tmp_path / "again" / "recipe.toml"
    before = len(RunFolder.open(tmp_path / "again" / "run").events())
    answer = sfumato("encode", recipe, "--json")
    assert answer.code == 0 and answer.json()["pictures_encoded"] == 0 == answer.json()["captions_encoded"]
    assert "Training the codec" not in answer.err
    answer = sfumato("train", recipe, "train.steps=7", "--json")
    assert answer.code == 0 and answer.json()["step"] == 7, answer.err
    steps = [e["step"] for e in RunFolder.open(tmp_path / "again" / "run").events() if e["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6, 7] and before > 0


def test_generate_draws_each_picture_from_its_own_seed(trained):
    answer = sfumato("generate", trained / "run", "-p", "a red thing", "--count", 2, "--seed", 3, "--json")
    assert answer.code == 0, answer.err
    drawn = answer.json()["pictures"]
    assert [one["seed"] for one in drawn] == [3, 4]
    alone = sfumato("generate", trained / "run", "-p", "a red thing", "--seed", 4, "--out", "alone", "--json")
    assert Path(drawn[1]["file"]).read_bytes() == Path(alone.json()["pictures"][0]["file"]).read_bytes()


def test_eval_measures_with_error_bars(trained):
    answer = sfumato("eval", trained / "run", "--samples", 5, "--seeds", 2, "--json")
    assert answer.code == 0, answer.err
    found = answer.json()
    assert {
        "loss_train",
        "loss_held_out",
        "latent_kernel_distance",
        "nearest_neighbor_accuracy",
        "codec_psnr",
    } <= found["metrics"].keys()
    assert all("error" in one for one in found["metrics"].values())
    assert {"level", "loss", "error"} <= found["by_level"]["held_out"][0].keys()
    right = found["metrics"]["nearest_neighbor_accuracy"]
    assert "pixels averaged 2×2" in right["note"] and right["chance"] == pytest.approx(1 / 4)
    again = sfumato("eval", trained / "run", "--samples", 2, "--seeds", 1, "--json").json()
    assert Path(again["page"]).parent.name == "eval-2" and Path(found["page"]).is_file()


def test_plan_says_where_each_value_came_from_and_writes_nothing(tmp_path):
    recipe = write_recipe(tmp_path)
    answer = sfumato("plan", recipe, "train.batch=2", "--json")
    assert answer.code == 0, answer.err
    found = answer.json()
    assert found["recipe"]["train.batch"] == {"value": 2, "origin": "command line"}
    assert found["recipe"]["train.steps"] == {"value": 6, "origin": "recipe.toml"}
    assert found["recipe"]["train.max_grad_norm"]["origin"] == "default"
    assert found["samples"] + found["held_out"] == 8 and found["parameters"] > 1000
    assert not (tmp_path / "run").exists() and not (tmp_path / "store").exists()


def test_new_writes_a_recipe_that_plans(tmp_path):
    write_recipe(tmp_path)
    answer = sfumato("new", "mine", "--data", "pictures")
    assert answer.code == 0 and answer.out.strip() == "mine.toml"
    assert sfumato("plan", "mine.toml").code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, monkeypatch, number, code):
    recipe = write_recipe(tmp_path)
    plain = console.Progress.__call__

    def interrupting(self, done, total, phase, **figures):
        plain(self, done, total, phase, **figures)
        if phase == "train" and done == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(console.Progress, "__call__", interrupting)
    answer = sfumato("train", recipe)
    assert answer.code == code, answer.err
    assert "same command goes on" in answer.err
    assert RunFolder.open(tmp_path / "run").checkpoint_folders()[-1].name == "step-000003"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    answer = sfumato("train", recipe, "--json")
    assert answer.code == 0 and answer.json()["step"] == 6


OLDER = (
    'text = "labels"\nstride = 4\n[data]\ncaptions = "folder"',
    'accumulate = 2\nclip = 0.5\nrates = ["*.bias=0.5"]\nkeep = 5\n',
)
"""What a recipe of format 1 may say of [model] and [data], and of [train]."""


def of_format_1(text: str) -> str:
    """A recipe's text with the names of format 1."""
    lines, section = [], ""
    for line in text.splitlines():
        section = line.strip("[]") if line.startswith("[") else section
        key, is_one, rest = line.partition(" = ")
        was = {RENAMED[old]: old for old in RENAMED}.get(f"{section}.{key}", key) if is_one else key
        lines.append(f"{was.rpartition('.')[2]}{is_one}{rest}")
    return "format = 1\n" + "\n".join(lines).replace("format = 2", "")


def test_a_run_of_format_1_goes_on_with_the_same_command(tmp_path, monkeypatch):
    """Law: its recipe, its record and its checkpoint say the old names; it ends as the run that knew none."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path)
    for index in range(8):
        folder = tmp_path / "pictures" / f"kind{index % 2}"
        folder.mkdir(exist_ok=True)
        (tmp_path / "pictures" / f"{index}.png").rename(folder / f"{index}.png")
    (tmp_path / "pictures" / "metadata.jsonl").unlink()
    text = of_format_1(RECIPE.replace("[data]", OLDER[0]).replace("[train]\n", f"[train]\n{OLDER[1]}"))
    recipe.write_text(text)
    assert "held_out_every = 3" in text and "store = " in text
    assert sfumato("train", recipe, "output=through").code == 0
    answer = sfumato("train", recipe, "train.steps=4")
    assert answer.code == 0 and answer.err.count("old name") == 1
    assert "train.clip is now train.max_grad_norm" in answer.err
    run = RunFolder.open(tmp_path / "run")
    lines = run.effective.read_text().splitlines()
    assert "max_grad_norm = 0.5 # recipe.toml" in lines and "[train.lr_multipliers] # recipe.toml" in lines
    told = run.effective.read_text().replace('[train.lr_multipliers] # recipe.toml\n"*.bias" = 0.5', "")
    run.effective.write_text(of_format_1(told.replace("[train]\n", '[train]\nrates = ["*.bias=0.5"]\n')))
    folder = run.checkpoint_folders()[-1]
    state, manifest = (json.loads((folder / f"{name}.json").read_text()) for name in ("state", "manifest"))
    old = {new: name.removeprefix("train.") for name, new in RENAMED.items()}
    saved = {old.get(f"train.{name}", name): value for name, value in state["settings"].items()}
    files = {name: proof for name, proof in manifest["files"].items() if name != "state.json"}
    write_state_and_manifest(folder, {**state, "settings": {**saved, "rates": ["*.bias=0.5"]}}, files)
    answer = sfumato("train", recipe)
    assert answer.code == 0 and "bit for bit" not in answer.err, answer.err
    assert [line for line in answer.err.splitlines() if "from here on" in line] == [
        "train.steps was 4 and is 6 from here on."
    ]
    assert run.checkpoint_folders()[-1].name == "step-000006"
    assert [event["resumed"] for event in run.events() if event["kind"] == "start"][-1] is True
    ends = [
        (tmp_path / name / "checkpoints" / "step-000006" / "model.safetensors").read_bytes()
        for name in ("through", "run")
    ]
    assert ends[0] == ends[1]


def test_control_c_of_the_real_command_ends_with_130(tmp_path):
    recipe = write_recipe(tmp_path, RECIPE.replace("steps = 6", "steps = 100000"))
    command = [sys.executable, "-m", "sfumato", "train", str(recipe)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        events = tmp_path / "run" / "events.jsonl"
        while time.monotonic() < deadline and '"step"' not in (events.read_text() if events.exists() else ""):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err and "Stopped" in err


def test_an_average_of_any_length_is_a_model_to_draw_and_measure_with(tmp_path):
    recipe = write_recipe(tmp_path)
    assert sfumato("train", recipe, "train.ema_snapshot_every=2").code == 0
    answer = sfumato("ema", "run", "--length", "0.07", "--json")
    assert answer.code == 0, answer.err
    made = answer.json()
    assert made["step"] == 6 and Path(made["model"]) == Path("run/averages/ema-0.070")
    assert sfumato("generate", made["model"], "--prompt", "red", "--steps", 1, "--out", "drawn").code == 0
    for part in (made["model"], "run/checkpoints/best"):
        answer = sfumato(
            "eval", part, "--samples", 2, "--seeds", 1, "--steps", 1, "--out", "measured", "--json"
        )
        assert answer.code == 0, answer.err
    assert not [event for event in RunFolder.open("run").events() if event["kind"] == "evaluation"]
    refused = sfumato("ema", "run", "--length", "0.3")
    assert refused.code == 2 and "0.25" in refused.err
    refused = sfumato("ema", "run", "--length", "0.2", "--step", "3")
    assert refused.code == 2 and "misses this average by" in refused.err
    assert sfumato("train", "run", "train.steps=7").code == 0  # a run's folder is a recipe too


@pytest.mark.slow
def test_plan_says_what_fits_and_train_says_what_it_costs(tmp_path):
    recipe = write_recipe(tmp_path)
    large = "train.batch=64"  # what a step keeps then outweighs the weights, so computing it in parts helps
    told = sfumato("plan", recipe, large, "--json").json()
    needed, parts = told["memory_gb"], told["phases"]
    assert told["probed"] and told["process_gb"] > needed and told["store_gb"] <= told["disk_gb"]
    assert {"codec", "encode", "measure", "draw", "steps"} == parts.keys()
    assert all(part["seconds"] >= 0 for part in parts.values())
    answer = sfumato("plan", recipe, large, "--fit", f"{needed * 0.8}GB", "--json")
    assert answer.code == 0, answer.err
    found = answer.json()
    assert found["fit"]["memory_gb"] <= needed * 0.8 and found["fit"]["why"] and found["fit"]["faster"]
    for name, value in found["fit"]["keys"].items():
        assert found["recipe"][name]["value"] == value and "fit" in found["recipe"][name]["origin"]
    assert "sfumato train" in sfumato("plan", recipe, large, "--fit", f"{needed * 0.8}GB").out
    assert sfumato("plan", recipe, "--fit", "1kB").code == 2
    answer = sfumato("train", recipe, "train.steps=10", "--profile")
    assert answer.code == 0, answer.err
    assert "Plan: " in answer.err and "GB of memory" in answer.err
    assert (tmp_path / "run" / "profile" / "table.txt").is_file()
    events = RunFolder.open(tmp_path / "run").events()
    assert all(event["process_gb"] > 0 for event in events if event["kind"] == "phase")


@pytest.mark.parametrize(
    "words",
    [
        ["train.weight_dtype=bf16"],
        ["train.weight_dtype=bf16-masters"],
        ["train.lr_multipliers={'blocks.*' = 0.5}"],
        ["train.patience=2", "train.validate_every=2"],
    ],
)
def test_what_is_said_of_the_denoisers_weights_is_not_of_the_codec(words, tmp_path):
    """Law: a codec that is trained first is trained as always, whatever the recipe says of the denoiser."""
    recipe = write_recipe(tmp_path)
    assert sfumato("train", recipe, "train.steps=2", *words).code == 0
    (codec,) = (tmp_path / "store" / "codecs").glob("*/weights.safetensors")
    assert sfumato("train", recipe, "train.steps=1", "output=plain", "data.cache_dir=other").code == 0
    (plain,) = (tmp_path / "other" / "codecs").glob("*/weights.safetensors")
    assert codec.read_bytes() == plain.read_bytes()
