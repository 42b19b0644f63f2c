"""The same few commands, from a folder of pictures to new pictures and numbers about them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sfumato.commands import console
from sfumato.record import RunFolder

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
    assert {"start", "step", "held_out", "pictures", "checkpoint", "phase", "data", "stop"} <= kinds
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
    answer = sfumato("eval", trained / "run", "--samples", 4, "--seeds", 2, "--json")
    assert answer.code == 0, answer.err
    found = answer.json()
    assert {"loss_train", "loss_held_out", "kid", "nearest_neighbour", "codec_psnr"} <= found[
        "metrics"
    ].keys()
    assert all("error" in one for one in found["metrics"].values())
    assert {"level", "loss", "error"} <= found["by_level"]["held_out"][0].keys()
    assert "pixels averaged 2×2" in found["metrics"]["nearest_neighbour"]["note"]


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
