"""Looking never runs code: what a stranger's folder names is named, until the user says that it may run."""

import json
import py_compile
import shutil
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import sfumato as package
from sfumato import trust
from sfumato.errors import Refused

from .world import RECIPE, draw_pictures, sfumato

TRAP = """
from pathlib import Path
Path({sprung!r}).touch()
from sfumato.theory import get
from sfumato.models.codecs.image import PixelCodec
import torch
x = get("flow-matching")
stage = PixelCodec
optimizer = torch.optim.SGD
data = [{{"picture": {picture!r}, "caption": "a", "name": str(n)}} for n in range(8)]
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A run as it came from elsewhere, before anybody put a trap into it."""
    home = tmp_path_factory.mktemp("elsewhere")
    draw_pictures(home / "pictures")
    (home / "recipe.toml").write_text(RECIPE)
    settings = [
        "model.codec=pixels",
        "model.text_encoder=none",
        "train.steps=2",
        "train.ema_snapshot_every=1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        package.train(
            "recipe.toml",
            [
                *settings,
                "train.sanity=false",
                "sample.every=0",
                "train.save_every=1",
                "train.validate_every=0",
            ],
            say=lambda sentence: None,
        )
    return home


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that remembers nothing, and a process in which nothing was named."""
    monkeypatch.setenv(trust.MEMORY_VARIABLE, str(tmp_path / "memory"))
    monkeypatch.setattr(trust, "_NAMED", set())


class Stranger:
    """A run that brings evil.py, in the current folder; `sprung` is what that code would write."""

    def __init__(self, kept: Path, place: Path) -> None:
        self.run, self.sprung = place / "stranger", place / "sprung"
        shutil.copytree(kept / "run", self.run)
        effective = self.run / "effective.toml"
        effective.write_text(effective.read_text().replace(str(kept / "run"), str(self.run)))
        self.code = self.run / "evil.py"
        picture = str(kept / "pictures" / "0.png")
        self.code.write_text(TRAP.format(sprung=str(self.sprung), picture=picture))

    def in_json(self, file: str, *path: str, word: str) -> None:
        described = json.loads((self.run / file).read_text())
        inner = described
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = word
        (self.run / file).write_text(json.dumps(described))

    def in_recipe(self, key: str, word: str) -> None:
        lines = (self.run / "effective.toml").read_text().splitlines()
        changed = [f'{key} = "{word}" # x' if line.startswith(f"{key} = ") else line for line in lines]
        assert changed != lines
        (self.run / "effective.toml").write_text("\n".join(changed) + "\n")


@pytest.fixture
def stranger(kept, tmp_path, machine) -> Stranger:
    return Stranger(kept, tmp_path)


TRAPS: dict[str, Any] = {
    "model.json": lambda it: it.in_json("model/model.json", "info", "theory", word="../evil.py:x"),
    "model.json, from the current folder": lambda it: it.in_json(
        "model/model.json", "info", "theory", word="stranger/evil.py:x"
    ),
    "model.json, absolute": lambda it: it.in_json("model/model.json", "info", "theory", word=f"{it.code}:x"),
    "model.json, continued": lambda it: it.in_json(
        "model/model.json", "info", "continued_as", word="../evil.py:x"
    ),
    "stage.json": lambda it: it.in_json("model/codec/stage.json", "own", word="../../evil.py:stage"),
    "effective.toml, theory": lambda it: it.in_recipe("theory", "evil.py:x"),
    "effective.toml, optimizer": lambda it: it.in_recipe("optimizer", "evil.py:optimizer"),
    "effective.toml, loss": lambda it: it.in_recipe("loss", "evil.py:x"),
    "effective.toml, data": lambda it: it.in_recipe("train", "evil.py:data"),
}
COMMANDS: dict[str, tuple[str, ...]] = {
    "report": (),
    "plan": (),
    "data": (),
    "doctor": (),
    "encode": (),
    "train": ("train.steps=3",),
    "generate": ("--steps", "1", "--width", "16", "--height", "16"),
    "ema": ("--length", "0.1"),
    "export": ("--to", "diffusers"),
    "eval": ("--samples", "2", "--seeds", "1", "--steps", "1"),
}


READ_BY = {"model.json": ("report", "generate", "ema", "export", "eval"), "effective.toml": tuple(COMMANDS)}
"""Which commands read the file that names code; of models, those that draw with them."""
CASES = [
    (trap, command)
    for trap in TRAPS
    for command in READ_BY["effective.toml" if "toml" in trap else "model.json"]
    if "json" not in trap or "," not in trap or command == "generate"
]


@pytest.mark.parametrize(("trap", "command"), CASES)
def test_looking_runs_no_code(trap, command, stranger):
    """Law: no command runs what a run names; it is refused by file, hash and the word that would let it."""
    TRAPS[trap](stranger)
    answer = sfumato(command, stranger.run, *COMMANDS[command])
    assert not stranger.sprung.exists(), answer
    assert answer.code in (0, 2), answer
    if answer.code == 2 and "evil.py" in answer.err and "does not exist" not in answer.err:
        digest = sha256(stranger.code.read_bytes()).hexdigest()
        assert digest in answer.err and "--trust" in answer.err and answer.err.count("\n") == 1, answer.err


LOADING = {name: trap for name, trap in TRAPS.items() if "json" in name and "current" not in name}


@pytest.mark.parametrize("trap", LOADING)
def test_python_looks_as_commands_do(trap, stranger):
    """Law: `sfumato.load` refuses what `generate` refuses, and takes it with `trust`, then and afterwards."""
    LOADING[trap](stranger)
    with pytest.raises(Refused, match=r"evil\.py is code that was neither named by you"):
        package.load(stranger.run)
    assert not stranger.sprung.exists()
    package.load(stranger.run, trust=True)
    assert stranger.sprung.exists()
    stranger.sprung.unlink()
    package.load(stranger.run)  # the machine remembers
    assert stranger.sprung.exists()
    stranger.code.write_text(stranger.code.read_text() + "# another\n")
    stranger.sprung.unlink()
    with pytest.raises(Refused, match="neither named"):
        package.load(stranger.run)
    assert not stranger.sprung.exists()


@pytest.mark.parametrize(
    ("trap", "command"),
    [
        ("model.json", "generate"),
        ("stage.json", "ema"),
        ("effective.toml, optimizer", "plan"),
        ("effective.toml, data", "data"),
        ("effective.toml, theory", "doctor"),
    ],
)
def test_what_is_trusted_runs(trap, command, stranger):
    """Law: --trust lets it run, and once is enough."""
    TRAPS[trap](stranger)
    answer = sfumato(command, stranger.run, *COMMANDS[command], "--trust")
    assert stranger.sprung.exists(), answer
    stranger.sprung.unlink()
    sfumato(command, stranger.run, *COMMANDS[command])
    assert stranger.sprung.exists()


def test_a_compiled_file_beside_it_is_never_run(stranger):
    """Law: the bytes whose hash is known are the bytes that run, whatever __pycache__ holds."""
    TRAPS["model.json"](stranger)
    innocent = 'from sfumato.theory import get\nx = get("flow-matching")\n'
    trapped = stranger.code.read_text()
    compiled = stranger.code.parent / "__pycache__" / f"evil.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(
        str(stranger.code), str(compiled), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    assert trapped and compiled.is_file()
    stranger.code.write_text(innocent)
    package.load(stranger.run, trust=True)
    assert not stranger.sprung.exists()


def test_a_recipe_that_is_named_may_name_code(stranger, kept):
    """Law: a recipe file, a word on the command line and Python name code; a data folder names none."""
    recipe = stranger.run.parent / "mine.toml"
    recipe.write_text((kept / "recipe.toml").read_text().replace('"pictures"', f'"{kept}/pictures"'))
    word = f"{stranger.code}:x"
    sfumato("plan", recipe, f"model.theory={word}")
    assert stranger.sprung.exists()
    stranger.sprung.unlink()
    folder = stranger.run.parent / "folder"
    shutil.copytree(kept / "pictures", folder)
    shutil.copy(stranger.code, folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "evil.py:x", "caption": "evil.py:x"}\n')
    for words in (("data", folder), ("data", f"{folder}/evil.py:x"), ("new", "it", "--data", folder)):
        sfumato(*words)
        assert not stranger.sprung.exists(), words


def own_run(place: Path, kept: Path) -> Any:
    """A run on this machine with code of one's own for theory, codec and data."""
    (place / "mine.py").write_text(
        "import math, torch\nfrom sfumato import Theory\nfrom sfumato.models.codecs.image import PixelCodec\n"
        "mine = Theory(data=lambda t: (torch.cos(t), torch.sin(t)),\n"
        "    model=lambda t: (-torch.sin(t), torch.cos(t)), t_noise=math.pi / 2, name='mine')\n"
        "class Pixels(PixelCodec):\n    pass\n"
    )
    (place / "recipe.toml").write_text(RECIPE.replace('"pictures"', f'"{kept}/pictures"'))
    settings = ["model.codec=mine.py:Pixels", "model.text_encoder=none", "model.theory=mine.py:mine"]
    return package.train(
        "recipe.toml",
        [*settings, "train.steps=2", "train.sanity=false", "sample.every=0", "train.validate_every=0"],
        say=lambda sentence: None,
    )


def drawn(run: Any) -> bytes:
    return run.model().generate(seed=1, steps=2)[0].tobytes()


def test_what_was_trained_here_loads_here(kept, tmp_path, machine, monkeypatch):
    """Law: another process of this machine draws with a run's own code; another machine asks first."""
    run = own_run(tmp_path, kept)
    before = drawn(run)
    monkeypatch.setattr(trust, "_NAMED", set())
    assert drawn(run) == before
    monkeypatch.setenv(trust.MEMORY_VARIABLE, str(tmp_path / "another machine"))
    with pytest.raises(Refused, match=r"mine\.py is code that was neither named by you"):
        run.model()


@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_run_keeps_its_code_as_it_was(how, kept, tmp_path, machine, monkeypatch, caplog):
    """Law: the code a run was trained with is kept in it, by its hash; a change is said, the copy is used."""
    run = own_run(tmp_path, kept)
    before, file = drawn(run), tmp_path / "mine.py"
    digest = sha256(file.read_bytes()).hexdigest()
    copy = f"mine-{digest[:16]}.py"
    for folder in (run.path, run.path / "model", run.path / "model" / "codec"):
        assert (folder / "code" / copy).read_bytes() == file.read_bytes(), folder
    assert set(json.loads((run.path / "model" / "model.json").read_text())["code"].values()) == {digest}
    monkeypatch.setattr(trust, "_NAMED", set())
    if how == "gone":
        file.unlink()
    else:
        file.write_text("raise RuntimeError('the new one')\n")
    assert drawn(run) == before
    said = "is not there any more" if how == "gone" else "was changed since"
    assert said in caplog.text and copy in caplog.text


def test_a_machine_without_a_memory_trains_all_the_same(kept, tmp_path, machine, monkeypatch):
    """Law: where nothing can be remembered, code that was named runs, and other code is asked about."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(trust.MEMORY_VARIABLE, str(tmp_path / "file" / "memory"))
    run = own_run(tmp_path, kept)
    drawn(run)
    monkeypatch.setattr(trust, "_NAMED", set())
    with pytest.raises(Refused, match="neither named"):
        run.model()
    run.model(trust=True)
