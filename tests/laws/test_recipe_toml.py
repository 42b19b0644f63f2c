"""A recipe says what it says: every key explained, every value of its type, none lost on the way."""

from dataclasses import replace
from pathlib import Path

import pytest

from sfumato.errors import Refused
from sfumato.recipe import DEFAULTS, RULES, Recipe

DOCS = Path(__file__).parents[2] / "docs" / "recipe.md"
OTHER = {str: '"x"', int: "7", float: "0.125", bool: "true", tuple: '["a", "b"]'}


def other(name: str) -> str:
    """Another value than the default, as TOML."""
    rules = RULES[name]
    if rules["choices"]:
        return f'"{rules["choices"][-1]}"'
    if rules["numbers"]:
        return "[1, 2.5]"
    if DEFAULTS[name] is True:
        return "false"
    value = OTHER[type(DEFAULTS[name])]
    return (
        str(int(rules["least"]) + 1) if type(DEFAULTS[name]) is int and rules["least"] is not None else value
    )


CHANGEABLE = [name for name in RULES if name != "format"]


@pytest.mark.parametrize("name", RULES)
def test_every_key_explains_itself_here_and_in_the_docs(name):
    assert len(RULES[name]["help"]) > 10
    assert f"| `{name}` |" in DOCS.read_text(encoding="utf-8"), f"docs/recipe.md does not list {name}"


@pytest.mark.parametrize("name", CHANGEABLE)
def test_a_key_means_the_same_in_a_file_and_on_the_command_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section, _, leaf = name.rpartition(".")
    file = tmp_path / "recipe.toml"
    file.write_text((f"[{section}]\n" if section else "") + f"{leaf} = {other(name)}\n")
    (tmp_path / "empty.toml").write_text("")
    said, given = Recipe.read(file), Recipe.read("empty.toml", [f"{name}={other(name)}"])
    assert said == given and said.values()[name] == given.values()[name]
    assert said.origin(name) == "recipe.toml" and given.origin(name) == "command line"


@pytest.mark.parametrize("every", [False, True])
def test_what_is_written_reads_back_equal_from_anywhere(every, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("")
    overrides = [f"{name}={other(name)}" for name in CHANGEABLE if name != "model.train"]
    recipe = Recipe.read("mine.toml", overrides)
    away = tmp_path / "away"
    away.mkdir()
    (away / "copy.toml").write_text(recipe.to_toml(every=every), encoding="utf-8")
    monkeypatch.chdir(away)
    assert Recipe.read("copy.toml") == recipe


def test_paths_in_a_file_belong_to_the_file_and_words_to_nobody(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "r.toml").write_text(
        'output = "out"\n[data]\ntrain = "shapes"\n[model]\ntheory = "t.py:x"\n'
    )
    monkeypatch.chdir(tmp_path / "b")
    recipe = Recipe.read("../a/r.toml", ["data.cache_dir=here"])
    assert Path(recipe.output).resolve() == tmp_path / "a" / "out"
    assert recipe.data.train == "shapes"
    assert Path(recipe.data.cache_dir).resolve() == tmp_path / "b" / "here"
    assert recipe.model.theory.endswith("/a/t.py:x") and Path(recipe.model.theory).is_absolute()


def test_effective_values_name_their_origin(tmp_path):
    (tmp_path / "r.toml").write_text("[train]\nsteps = 5\n")
    lines = Recipe.read(tmp_path / "r.toml", ["train.batch=3"]).to_toml(every=True).splitlines()
    assert "steps = 5 # r.toml" in lines and "batch = 3 # command line" in lines
    assert sum(line.endswith("# default") for line in lines) == len(RULES) - 2


def test_numbers_with_a_point_are_no_counts_and_counts_are_numbers(tmp_path):
    (tmp_path / "r.toml").write_text("[train]\nlearning_rate = 1\n")
    assert Recipe.read(tmp_path / "r.toml").train.learning_rate == 1.0
    for bad in (
        "train.steps=1.5",
        "train.steps=true",
        "train.steps=0",
        "train.ema=2",
        "train.learning_rate=nan",
    ):
        with pytest.raises(Refused, match=bad.split("=")[0]):
            Recipe.read(tmp_path / "r.toml", [bad])


def test_a_recipe_made_in_python_is_checked_like_a_file():
    good = Recipe(seed=4)
    assert good.checked().values() | {"output": ""} == good.values() | {"output": ""}
    with pytest.raises(Refused, match=r"train\.batch"):
        replace(good, train=replace(good.train, batch=0)).checked()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("train.step=1", "train.steps"), ("model.steps=1", "train.steps"), ("batch=1", "train.batch")],
)
def test_a_key_that_does_not_exist_is_answered_with_one_that_does(wrong, right, tmp_path):
    (tmp_path / "r.toml").write_text("")
    with pytest.raises(Refused, match=f'Did you mean "{right}"'):
        Recipe.read(tmp_path / "r.toml", [wrong])
