"""Commands that answer at once: help, doctor, theory, data."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import typer

import sfumato as package
from sfumato.cli import app
from sfumato.commands import diffusers_errors, theory_reports
from sfumato.commands.options import RENAMED_OPTIONS, with_present_names
from sfumato.errors import Refused
from sfumato.theory import get, methods, names

from .world import draw_pictures, sfumato

COMMANDS = [
    "demo",
    "new",
    "plan",
    "encode",
    "train",
    "generate",
    "export",
    "ema",
    "eval",
    "data",
    "report",
    "doctor",
    "theory",
]


def test_help_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['sfumato', '--help']\n"
        "from sfumato.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'rich', 'PIL', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout
    assert "..." not in done.stdout.partition("Commands:")[2], "a summary is too long for its line"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    answer = sfumato(command, "--help")
    assert answer.code == 0 and "Usage:" in answer.out


@pytest.mark.parametrize("old, new", RENAMED_OPTIONS.items())
def test_a_former_option_is_hidden_and_read_with_a_note(old, new, capsys):
    commands = typer.main.get_command(app).commands.values()
    (command,) = [one for one in commands if any(option.name == old for option in one.params)]
    options = {option.name: option for option in command.params}
    assert options[old].hidden and not options[new].hidden
    assert with_present_names({"seed": 0, old: 2, new: None}) == {"seed": 0, new: 2}
    former, present = (f"--{name.replace('_', '-')}" for name in (old, new))
    assert capsys.readouterr().err.strip() == f"{former} is called {present} now."
    with pytest.raises(Refused, match=f"former name of {present}"):
        with_present_names({old: 2, new: 3})
    assert former not in sfumato(command.name, "--help").out.split()


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "sfumato", "-h"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("Usage: sfumato")


def test_doctor_says_what_is_here():
    found = sfumato("doctor", "--json").json()
    assert found["packages"]["torch"] and found["machine"]["cores"] >= 1 and isinstance(found["advice"], list)


def test_every_theory_and_solver_is_listed():
    found = sfumato("theory", "list", "--json").json()
    assert list(found["theories"]) == names() and list(found["solvers"]) == list(methods())
    assert "flow-matching" in sfumato("theory", "list").out


@pytest.mark.parametrize("name", names())
def test_every_theory_can_be_shown(name):
    answer = sfumato("theory", "show", name, "--out", "here", "--json")
    assert answer.code == 0, answer.err
    page = Path(answer.json()["page"])
    assert page.parent == Path("here") and page.read_text(encoding="utf-8").count("<svg") == 7


OWN = """
import math, torch
from sfumato.theory import Theory
mine = Theory(data=lambda t: (torch.cos(t), torch.sin(t)), model=lambda t: (-torch.sin(t), torch.cos(t)),
              t_noise=math.pi / 2, name="mine")
"""


def test_ones_own_theory_is_checked_against_the_oracle(monkeypatch):
    monkeypatch.setattr(theory_reports, "BUDGETS", (5, 10))
    Path("mine.py").write_text(OWN, encoding="utf-8")
    answer = sfumato("theory", "check", "mine.py:mine", "--json")
    assert answer.code == 0, answer.err
    found = answer.json()
    assert found["ok"] and found["errors"]["auto"][-1] < found["errors"]["euler"][-1] < 0.1


def test_data_reports_into_a_page(tmp_path):
    answer = sfumato("data", draw_pictures(tmp_path / "pictures"))
    assert answer.code == 0 and Path("runs/data/report.html").is_file()
    assert answer.out.splitlines()[-1] == "runs/data/report.html"


def test_the_readme_shows_the_two_commands_and_real_ones_only():
    readme = (Path(package.__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in readme.split("```sh\n")[1:]]
    assert blocks[0].rstrip().endswith("sfumato demo") and blocks[1].rstrip().endswith("pytest")
    for block in blocks:
        for line in block.splitlines():
            if line.startswith("sfumato "):
                assert line.split()[1] in COMMANDS, line


@pytest.mark.parametrize("name", ["flow-matching", "edm", "ddpm-velocity", "gvp"])
def test_the_schedulers_of_diffusers_stand_beside_ours_where_it_has_some(name):
    rows = diffusers_errors.rows(get(name), 6, samples=8)
    assert bool(rows) == (name != "gvp")
    for row in rows:
        assert row["solver"].startswith("diffusers ") and row["evaluations"] <= 6
        assert "refused" in row or 0 < row["error"] < 1


@pytest.mark.parametrize(
    ("kind", "network", "side", "clips", "resolution", "frames"),
    [
        ("StableDiffusionPipeline", "unet", 64, False, "512", False),
        ("StableDiffusionXLPipeline", "unet", 128, False, "1024", False),
        ("FluxPipeline", "transformer", None, False, "1024", False),
        ("WanPipeline", "transformer", None, False, "480", False),
        ("WanPipeline", "transformer", None, True, "480", True),
    ],
)
def test_a_new_recipe_has_the_size_its_base_draws(
    kind, network, side, clips, resolution, frames, tmp_path, monkeypatch
):
    """Law: a pretrained folder's own files say the size; data with clips get frames."""
    monkeypatch.chdir(tmp_path)
    for place, config in ((network, {"sample_size": side}), ("vae", {"block_out_channels": [1, 1, 1, 1]})):
        (tmp_path / "base" / place).mkdir(parents=True)
        (tmp_path / "base" / place / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / ("a.mp4" if clips else "a.png")).write_bytes(b"")
    assert sfumato("new", "mine", "--data", "data", "--base", "base", "--train", "lora").code == 0
    text = (tmp_path / "mine.toml").read_text()
    assert f"resolution = {resolution} " in text and ("frames = 25" in text) == frames


def _commands(group=None, path=()):
    """Every command with its name: (words, command)."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


EVERY_COMMAND = dict(_commands())


@pytest.mark.parametrize("name", EVERY_COMMAND)
def test_every_option_says_something_of_its_own(name):
    """Law: no option is without help, and no two of a command have the same."""
    options = [one for one in EVERY_COMMAND[name].params if one.param_type_name == "option"]
    said = {one.name: (one.help or "").strip() for one in options}
    assert all(said.values()), [option for option, words in said.items() if not words]
    twice = [words for words, times in Counter(said.values()).items() if times > 1]
    assert not twice, {option: words for option, words in said.items() if words in twice}
