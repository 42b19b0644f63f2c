"""A recipe says what it says: every key explained, every value of its type, none lost on the way."""

import copy
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sfumato.errors import Refused
from sfumato.recipe import DEFAULTS, FORMAT, RULES, Recipe
from sfumato.settings import RENAMED, Table, saved_settings
from sfumato.training.settings import TrainSettings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "recipe.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.toml"))
OTHER = {str: '"x"', int: "7", float: "0.125", bool: "true", tuple: '["a", "b"]'}


def other(name: str) -> str:
    """Another value than the default, as TOML."""
    rules = RULES[name]
    if rules["rows"] or rules["values"]:
        return f'["{rules["example"]}"]'
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
TABLES = [name for name in RULES if RULES[name]["values"] or RULES[name]["rows"]]


def write(file: Path, name: str, value: str) -> Path:
    """A recipe that says one key."""
    section, _, leaf = name.rpartition(".")
    file.write_text((f"[{section}]\n" if section else "") + f"{leaf} = {value}\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("name", RULES)
def test_every_key_explains_itself_here_and_in_the_docs(name):
    assert len(RULES[name]["help"]) > 10
    assert f"| `{name}` |" in DOCS.read_text(encoding="utf-8"), f"docs/recipe.md does not list {name}"


def test_the_docs_name_every_old_name():
    text = DOCS.read_text(encoding="utf-8")
    assert all(f"| `{old}` | `{new}` |" in text for old, new in RENAMED.items())


@pytest.mark.parametrize("name", CHANGEABLE)
def test_a_key_means_the_same_in_a_file_and_on_the_command_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "recipe.toml", name, other(name))
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


def test_old_names_are_of_keys_that_are_there_and_of_no_other():
    """Law: each old name means one key of today, no two the same one, and none is a key itself."""
    assert set(RENAMED.values()) <= set(RULES) and not set(RENAMED) & set(RULES)
    assert len(set(RENAMED.values())) == len(RENAMED)
    assert all(old.split(".")[0] == new.split(".")[0] for old, new in RENAMED.items())


@pytest.mark.parametrize("version", ["", "format = 1\n", f"format = {FORMAT}\n"])
@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_means_its_new_one_wherever_it_stands(old, version, tmp_path, monkeypatch):
    """Law: in a file and on the command line with one note, in a run's own record without; written anew."""
    monkeypatch.chdir(tmp_path)
    new = RENAMED[old]
    value = other(new)
    (tmp_path / "empty.toml").write_text(version)
    wanted = Recipe.read("empty.toml", [f"{new}={value}"])
    assert not wanted.notes
    file = write(tmp_path / "mine.toml", old, value)
    file.write_text(version + file.read_text())
    for found, where in (
        (Recipe.read(file), "mine.toml"),
        (Recipe.read("empty.toml", [f"{old}={value}"]), "The command line"),
    ):
        assert found == wanted and found.format == FORMAT
        assert found.notes == (f"{where} uses an old name, which still can be read: {old} is now {new}.",)
        assert found.checked().notes == found.notes
    (tmp_path / "effective.toml").write_text(file.read_text())
    assert Recipe.read(tmp_path) == wanted and not Recipe.read(tmp_path).notes
    assert Recipe.read(tmp_path, [f"{new}={value}"]) == wanted
    leaf = old.rpartition(".")[2]
    assert not any(line.startswith(f"{leaf} = ") for line in found.to_toml().splitlines())


@pytest.mark.parametrize("old", RENAMED)
def test_a_key_by_both_its_names_is_refused_by_both(old, tmp_path):
    new, value = RENAMED[old], other(RENAMED[old])
    leaf = new.rpartition(".")[2]
    file = write(tmp_path / "mine.toml", old, value)
    file.write_text(f"{file.read_text()}{leaf} = {value}\n")
    with pytest.raises(Refused, match=rf"mine\.toml gives {new} and {old}, which is its old name"):
        Recipe.read(file)
    write(file, old, value)
    with pytest.raises(Refused, match=rf"The command line gives {new} and {old}"):
        Recipe.read(file, [f"{new}={value}", f"{old}={value}"])
    assert Recipe.read(file, [f"{new}={value}"]).origin(new) == "command line"  # it goes before the file


def test_old_names_are_noted_once_for_each_place(tmp_path):
    file = tmp_path / "old.toml"
    file.write_text("[train]\nclip = 0.5\nkeep = 2\n[data]\nrate = 4\n")
    noted = Recipe.read(file, ["train.clip=0.25", "train.weights=bf16"])
    assert noted.train.max_grad_norm == 0.25
    assert noted.notes == (
        "old.toml uses old names, which still can be read: train.clip is now train.max_grad_norm, "
        "train.keep is now train.keep_checkpoints, data.rate is now data.fps.",
        "The command line uses old names, which still can be read: train.clip is now train.max_grad_norm, "
        "train.weights is now train.weight_dtype.",
    )


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.clipp=1", "train.max_grad_norm"),
        ("clip=1", "train.max_grad_norm"),
        ("data.trigg=a", "data.trigger_words"),
    ],
)
def test_an_old_name_that_was_mistyped_is_answered_with_the_new_one(wrong, right, tmp_path):
    (tmp_path / "r.toml").write_text("")
    with pytest.raises(Refused, match=f'Did you mean "{right}"'):
        Recipe.read(tmp_path / "r.toml", [wrong])


SAID = {
    "data.condition_dropout": ('["control=0.1", "mask = 1"]', "control = 0.1\nmask = 1"),
    "data.curriculum": ('["32:1000", "48: 2000"]', None),
    "train.lr_multipliers": ('["blocks.*=0.5", "*.bias=0"]', '"blocks.*" = 0.5\n"*.bias" = 0'),
    "model.new_tokens": (
        '["<cat>=a cat", "<dog>", "<owl>=owl.safetensors"]',
        '"<cat>" = "a cat"\n"<dog>" = ""\n"<owl>" = "owl.safetensors"',
    ),
    "model.merge_loras": (
        '["a.safetensors:0.8", "b.safetensors"]',
        '"a.safetensors" = 0.8\n"b.safetensors" = 1',
    ),
    "model.prompt_options": (
        '["max_sequence_length=256", "text_encoder_out_layers=[1, 2]", "system=be brief"]',
        'max_sequence_length = 256\ntext_encoder_out_layers = [1, 2]\nsystem = "be brief"',
    ),
}
"""Of each key that is a table: as a list of texts, and as a table."""
ROWS = (
    "[[data.curriculum]]\nresolution = 32\nuntil = 1000\n[[data.curriculum]]\nresolution = 48\nuntil = 2000\n"
)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_and_its_texts_are_the_same_recipe(name, tmp_path, monkeypatch):
    """Law: so is what is written of it, wherever that is read, and the name of format 1."""
    monkeypatch.chdir(tmp_path)
    words, table = SAID[name]
    said = Recipe.read(write(tmp_path / "words.toml", name, words))
    file = tmp_path / "table.toml"
    file.write_text(f"[{name}]\n{table}\n" if table else ROWS)
    assert Recipe.read(file) == said and said.values()[name]
    given = Recipe.read(write(tmp_path / "other.toml", "seed", "0"), [f"{name}={words}"])
    assert given.values()[name] == said.values()[name]
    if table:
        inline = "{" + table.replace("\n", ", ") + "}"
        assert Recipe.read("other.toml", [f"{name}={inline}"]).values()[name] == said.values()[name]
    for every in (False, True):
        written = said.to_toml(every=every)
        assert f"[{name}]" in written
        (tmp_path / "away").mkdir(exist_ok=True)
        (tmp_path / "away" / "copy.toml").write_text(written)
        assert Recipe.read(tmp_path / "away" / "copy.toml") == said
    if old := {new: old for old, new in RENAMED.items()}.get(name):
        file.write_text(f"[{old}]\n{table}\n")
        assert Recipe.read(file) == said and len(Recipe.read(file).notes) == 1
    assert hash(said.model) and hash(said.data) and hash(said.train)
    assert pickle.loads(pickle.dumps(said)) == copy.deepcopy(said) == said


def test_paths_in_tables_belong_to_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "r.toml"
    files, words = '"x.safetensors" = 0.5', '"<a>" = "w.safetensors"\n"<b>" = "word"'
    file.write_text(f"[model.merge_loras]\n{files}\n[model.new_tokens]\n{words}\n")
    model = Recipe.read(file).model
    assert model.merge_loras == {str(tmp_path / "a" / "x.safetensors"): 0.5}
    assert model.new_tokens == {"<a>": str(tmp_path / "a" / "w.safetensors"), "<b>": "word"}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("data.condition_dropout=control", "has 'control'; write NAME=VALUE, like \"control=0.1\""),
        ("data.condition_dropout=control=2", '"control" is 2, but it must be at most 1'),
        ("data.condition_dropout=control=nan", "must be at least 0"),
        ("data.condition_dropout={control = true}", "must be a number"),
        ("train.lr_multipliers=blocks.*=-1", "must be at least 0"),
        ('train.lr_multipliers=["a=1", "a=2"]', 'names "a" twice'),
        ("model.new_tokens==a cat", "write NAME=VALUE"),
        ("model.merge_loras=a.safetensors:much", "style.safetensors:0.8"),
        ("data.curriculum=8", "tables of resolution and until"),
        ("data.curriculum=[{resolution = 8}]", "tables of resolution and until"),
        ("train.lr_multipliers=3", "NAME=VALUE"),
    ],
)
def test_an_entry_that_cannot_be_is_named(said, words, tmp_path):
    (tmp_path / "r.toml").write_text("")
    with pytest.raises(Refused) as refused:
        Recipe.read(tmp_path / "r.toml", [said])
    assert words in str(refused.value) and said.partition("=")[0] in str(refused.value)


def test_a_table_cannot_be_changed_and_keeps_its_order():
    table = Table({"b": 1.0, "a": 2.0})
    assert table == {"b": 1.0, "a": 2.0} and table != {"a": 2.0, "b": 1.0}
    for change in (lambda: table.update(c=3.0), lambda: table.pop("a"), lambda: table.__setitem__("a", 1.0)):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()


def test_settings_that_a_checkpoint_holds_are_read_by_the_names_of_today():
    """Law: what format 1 wrote compares equal with the same settings now."""
    now = TrainSettings(max_grad_norm=0.5, lr_multipliers=Table({"blocks.*": 0.5}), keep_checkpoints=7)
    old = {new.split(".")[1]: old.split(".")[1] for old, new in RENAMED.items() if old.startswith("train.")}
    saved = {old.get(name, name): value for name, value in asdict(now).items()}
    saved["rates"] = ["blocks.*=0.5"]
    assert set(old.values()) <= set(saved)
    assert saved_settings("train", saved, TrainSettings) == asdict(now)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_is_a_recipe_of_today(file):
    recipe = Recipe.read(file)
    assert not recipe.notes and recipe.train.steps > 100
