"""What the docs show is true: their recipes are read, their commands exist, their Python runs."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import sfumato
from sfumato.cli import app
from sfumato.recipe import Recipe
from sfumato.user_code import load_named_object

from .world import write_recipe

TOP = Path(__file__).parents[2]
PAGES = [TOP / "README.md", TOP / "CONTRIBUTING.md", *sorted((TOP / "docs").glob("*.md"))]
EXAMPLES = sorted((TOP / "examples").glob("*.toml"))
COMMANDS = typer.main.get_command(app)

SHOWN_ONLY = {
    "finetuning.md": "speaks to a pipeline of diffusers",
    "image-guidance.md": "speaks of a ControlNet's and an IP-Adapter's files",
    "video.md": "speaks of clips' own files",
}
"""Pages whose Python needs what a test does not have, and why: it compiles, its imports are there."""
RUN_ELSEWHERE = {"own-code.md": "test_own_code.py writes its files and trains with them"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in one of these languages."""
    found: list[Block] = []
    for page in PAGES:
        inside: tuple[int, str] | None = None
        lines: list[str] = []
        for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
            if not line.strip().startswith("```"):
                lines.append(line)
            elif inside is None:
                inside, lines = (number + 1, line.strip().removeprefix("```")), []
            else:
                found.append(Block(page, *inside, "\n".join(lines)))
                inside = None
        assert inside is None, f"{page.name}: the block of line {inside} has no end"
    return [block for block in found if block.language in languages]


def command_lines(text: str) -> Iterator[list[str]]:
    """Every `sfumato …` of a shell's lines, as words, comments and continuations resolved."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;", line):
            words = shlex.split(part, comments=True)
            if words and words[0] == "sfumato":
                yield words[1:]


def named(words: list[str]) -> tuple[Any, list[str]]:
    """The command of these words and what is left for it; fails where there is none."""
    command: Any = COMMANDS
    while hasattr(command, "commands"):
        assert words, f"{command.name} needs a command: {', '.join(command.commands)}"
        assert words[0] in command.commands, f"sfumato has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def check(words: list[str], where: object) -> None:
    """Fail unless the command line reads these words: command, options, their kinds, keys of the recipe."""
    command, words = named(words)
    try:
        context = command.make_context(command.name, list(words))
    except Exception as problem:  # typer's own, wherever this version of it keeps them
        told = problem.format_message() if hasattr(problem, "format_message") else repr(problem)
        pytest.fail(f"{where}: sfumato {command.name} {shlex.join(words)}: {told}")
    overrides = context.params.get("overrides") or []
    Recipe().overridden(overrides, "command line")


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_a_recipe_in_the_docs_is_read(block, tmp_path):
    """Law: every key that a page shows is a key, with a value it takes."""
    (tmp_path / "recipe.toml").write_text(block.text, "utf-8")
    assert Recipe.read(tmp_path / "recipe.toml").values() != Recipe().values()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_is_a_recipe(file):
    """Law: every example is read as it stands, and the command in its head is one."""
    assert Recipe.read(file).values() != Recipe().values()
    comments = "\n".join(line[1:] for line in file.read_text("utf-8").splitlines() if line.startswith("#"))
    lines = [line for line in comments.splitlines() if line.strip().startswith("sfumato ")]
    assert lines, f"{file.name} does not say how it is run"
    for line in lines:
        check(shlex.split(line.partition("(")[0])[1:], file.name)


@pytest.mark.parametrize("block", blocks("sh", "bash"), ids=str)
def test_a_command_in_the_docs_is_one(block):
    """Law: every command line that a page shows is understood."""
    for words in command_lines(block.text):
        check(words, block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_in_a_sentence_is_one(page):
    """Law: commands and options named in running text exist."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for said in re.findall(r"`(?:python -m )?sfumato ([a-z][^`]*)`", text):
        command, rest = named(said.split())
        known = {option for parameter in command.params for option in parameter.opts}
        for option in re.findall(r"(?<!\S)\[?(--?[a-z][a-z-]*)", " ".join(rest)):
            assert option in known, f"{page.name}: `sfumato {said}`: no option {option}"


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command as it is typed."""
    for name, inner in command.commands.items():
        if hasattr(inner, "commands"):
            yield from leaves(inner, (*path, name))
        else:
            yield " ".join((*path, name)), inner


@pytest.mark.parametrize("name", [name for name, _ in leaves(COMMANDS)])
def test_a_command_is_in_the_docs(name):
    """Law: docs/commands.md lists every command."""
    assert f"`sfumato {name}" in (TOP / "docs" / "commands.md").read_text("utf-8")


def test_an_option_in_the_docs_of_commands_is_one():
    """Law: docs/commands.md names no option that no command takes."""
    known = {option for _, command in leaves(COMMANDS) for each in command.params for option in each.opts}
    known |= {option for each in COMMANDS.params for option in each.opts}
    text = (TOP / "docs" / "commands.md").read_text("utf-8")
    ours = [code for code in re.findall(r"`([^`]+)`", text) if not code.startswith("torchrun")]
    said = {option for code in ours for option in re.findall(r"--[a-z-]+", code)}
    assert len(said) > 20
    assert said <= known, f"docs/commands.md names {', '.join(sorted(said - known))}"


def test_a_mistake_in_the_docs_is_found():
    """Law: an option, a command, a key that does not exist fails its block."""
    for line in ("sfumato trian a.toml", "sfumato theory shwo edm"):
        with pytest.raises(AssertionError, match="has no command"):
            check(next(command_lines(line)), "here")
    with pytest.raises(pytest.fail.Exception, match="No such option"):
        check(["train", "a.toml", "--steps", "3"], "here")
    with pytest.raises(sfumato.Refused, match="is no key"):
        check(["train", "a.toml", "train.stepps=3"], "here")


# ---------------------------------------------------------------- Python


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which what the pages say is there: a recipe of apples, its run, some tensors."""
    folder = tmp_path_factory.mktemp("docs")
    small = (
        "output=runs/apples",
        "model.codec=pixels",
        "train.sanity=false",
        "train.steps=2",
        "sample.every=0",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = Recipe.read(write_recipe(folder), small)
    (folder / "apples.toml").write_text(recipe.to_toml(), "utf-8")
    run = sfumato.train(folder / "apples.toml")
    x_t = torch.zeros(1, *run.model().latent_shape())
    return folder, {
        "sfumato": sfumato,
        "torch": torch,
        "pixels": torch.zeros(1, 3, 16, 16),
        "x_t": x_t,
        "t": 0.5,
    }


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_in_the_docs_runs(block, world, monkeypatch):
    """Law: a page's Python runs; where it cannot, it compiles and its imports are there."""
    folder, known = world
    monkeypatch.chdir(folder)
    tree = ast.parse(block.text, filename=str(block))
    if block.page.name in RUN_ELSEWHERE:
        return
    if block.page.name in SHOWN_ONLY:
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(tree, str(block), "exec"), dict(known))


@pytest.mark.parametrize("file", sorted((TOP / "examples").glob("*.py")), ids=lambda file: file.name)
def test_a_theory_in_the_examples_is_sound(file):
    """Law: an example's theory is one that can be solved at every time."""
    assert load_named_object(f"{file}:{file.stem}").check().ok
