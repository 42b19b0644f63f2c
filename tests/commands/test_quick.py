"""Laws of quickness: what needs no network is answered without torch, whose import alone takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sfumato import __version__, paths
from sfumato.commands.recipes import _fitted

from .world import draw_pictures, write_recipe

WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None  # whoever imports it fails
from typer.testing import CliRunner
from sfumato.cli import app
for line in sys.stdin:
    found = CliRunner().invoke(app, json.loads(line), prog_name="sfumato")
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    print(json.dumps([found.exit_code, found.stdout, found.stderr]))
"""
ANSWERS = {
    ("--version",): (0, f"sfumato {__version__}"),
    ("--help",): (0, "Trains diffusion models"),
    ("train", "--help"): (0, "--profile"),
    ("data", "pictures"): (0, "report.html"),
    ("new", "bad", "--data", "nothing"): (2, "nothing is no folder"),
    ("new", "recipe", "--data", "pictures"): (2, "recipe.toml exists already"),
    ("plan", "recip.toml"): (2, "recip.toml does not exist. Did you mean recipe.toml?"),
    ("plan", "recipe.toml", "train.stepz=3"): (2, 'Did you mean "train.steps"?'),
    ("plan", "recipe.toml", "data.train=cats"): (2, "cats does not exist. data.train takes"),
    ("plan", "recipe.toml", "model.base=pictures"): (2, "is a folder of pictures, not a model"),
    ("encode", "recipe.toml", "train.optimizer=adamv"): (2, 'Did you mean "adamw"?'),
    ("train", "pictures"): (
        2,
        "not a recipe. `sfumato new NAME --data pictures` writes one",
    ),
    ("train", "runs"): (2, "is a folder of runs: give one of them (runs/cats)"),
    ("train", "pipe"): (2, "is a model, not a recipe. `sfumato new NAME --data DIR --base pipe` writes one"),
    ("doctor", "recip.toml"): (2, "Did you mean recipe.toml?"),
    ("generate", "runs/cat", "-p", "a"): (2, "runs/cat does not exist. Did you mean runs/cats?"),
    ("generate", "cats", "-p", "a"): (2, "cats does not exist. Did you mean runs/cats?"),
    ("generate", "cats.toml", "-p", "a"): (
        2,
        "is a recipe, and its run is runs/cats. Give runs/cats.",
    ),
    ("generate", "recipe.toml", "-p", "a"): (
        2,
        "not trained yet. Run `sfumato train recipe.toml`",
    ),
    ("generate", "pipe/unet", "-p", "a"): (2, "pipe/unet is a part of the model pipe. Give pipe."),
    ("generate", "pictures", "-p", "a"): (2, "is a folder of pictures, not a model"),
    ("export", "runs/carts", "--to", "kohya"): (2, "runs/carts does not exist. Did you mean runs/cats?"),
    ("export", "runs/cats", "--to", "nowhere"): (2, "nowhere"),
    ("eval", "runs/cat"): (2, "Did you mean runs/cats?"),
    ("eval", "cats.toml"): (2, "Give runs/cats."),
    ("ema", "pictures"): (2, "is no run folder"),
    ("report", "runs/cats/"): (0, "report.html"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What each command answered in a process where torch cannot be imported."""
    folder = tmp_path_factory.mktemp("quick")
    write_recipe(folder)
    draw_pictures(folder / "runs" / "cats" / "samples", 1)
    (folder / "runs" / "cats" / "recipe.toml").write_text("")
    (folder / "cats.toml").write_text('output = "runs/cats"')
    (folder / "pipe" / "unet").mkdir(parents=True)
    (folder / "pipe" / "model_index.json").write_text("{}")
    (folder / "pipe" / "unet" / "config.json").write_text("{}")
    lines = "".join(json.dumps(words) + "\n" for words in ANSWERS)
    how = {"cwd": folder, "input": lines, "text": True, "capture_output": True, "check": False}
    found = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], **how)
    assert found.returncode == 0, found.stderr
    return dict(zip(ANSWERS, map(json.loads, found.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("words", ANSWERS, ids=" ".join)
def test_what_needs_no_network_is_answered_without_torch(words, answers):
    code, out, err = answers[words]
    assert code == ANSWERS[words][0], err
    assert ANSWERS[words][1] in out + err, out + err


def test_a_command_is_printed_as_a_shell_takes_it():
    assert paths.command("train", "my cats.toml", "a=b") == "sfumato train 'my cats.toml' a=b"
    found = {"memory_gb": 1, "why": [], "faster": [], "keys": {"train.batch": 2}, "slower_by": 0}
    said = _fitted(found, "2GB", Path("my cats.toml"), ["sample.negative=a b"], 1)
    assert said.endswith("sfumato train 'my cats.toml' 'sample.negative=a b' train.batch=2")


def test_an_id_of_the_hub_is_no_misspelled_folder(tmp_path):
    assert paths.wrong_model("somebody/model") == ""
    (tmp_path / "runs").mkdir()
    assert "does not exist" in paths.wrong_model("runs/model")
