"""The public names are a contract: a change of one is seen, meant, and told in the changelog.

`public_api.txt` beside this file holds every name of an `__all__`, with its signature. To renew it:

    make api
"""

import ast
import inspect
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import sfumato

KEPT = Path(__file__).with_name("public_api.txt")
ROOMS = [
    "sfumato",
    *(f"sfumato.{room.name}" for room in pkgutil.iter_modules(sfumato.__path__) if room.ispkg),
]
RENEW = "If the change is meant, tell it in CHANGELOG.md and renew the file: make api"


def public_api() -> str:
    """Every public name of the package and its rooms, a line for each signature."""
    return "\n\n".join("\n".join([f"# {room}", *names_of(import_module(room))]) for room in ROOMS) + "\n"


def names_of(room: ModuleType) -> list[str]:
    """What each name of a room's `__all__` is."""
    lines: list[str] = []
    for name in sorted(room.__all__):
        lines += described(name, getattr(room, name))
    return lines or ["nothing"]


def described(name: str, value: object) -> list[str]:
    """A function by its signature; a class by its fields and methods; a module by its functions."""
    if isinstance(value, ModuleType):
        inside = [
            (each, got)
            for each, got in vars(value).items()
            if not each.startswith("_") and getattr(got, "__module__", "") == value.__name__
        ]
        return [line for each, got in sorted(inside) for line in described(f"{name}.{each}", got)]
    if inspect.isclass(value):
        return [f"class {name}", *(f"    {line}" for line in members(value))]
    if inspect.isfunction(value):
        return [signature(definition(value), name)]
    return [f"{name}: {type(value).__name__}"]


def members(cls: type) -> list[str]:
    """Fields, properties and methods that a user may touch, also those of the package's own bases."""
    lines: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.split(".")[0] != "sfumato":
            continue
        for node in definition(base).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines[node.target.id] = field(node)
            elif isinstance(node, ast.FunctionDef):
                lines[node.name] = signature(node, node.name)
    return [line for name, line in lines.items() if not name.startswith("_") or name == "__init__"]


def field(node: ast.AnnAssign) -> str:
    """A field with its type and its default; of a recipe's key the default alone."""
    value = node.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "key":
        value = value.args[0]
    return ast.unparse(ast.AnnAssign(node.target, node.annotation, value, node.simple))


def signature(node: ast.AST, name: str) -> str:
    """A function's line as it is written, without its body."""
    assert isinstance(node, ast.FunctionDef)
    given = ast.unparse(node.args)
    answer = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    marks = {ast.unparse(mark) for mark in node.decorator_list} & {"property", "classmethod", "staticmethod"}
    return f"{''.join(f'@{mark} ' for mark in marks)}{name}({given}){answer}"


def definition(value: object) -> ast.FunctionDef | ast.ClassDef:
    """The syntax of a function or class, from the file it is written in."""
    value = inspect.unwrap(value) if inspect.isfunction(value) else value
    body: list[ast.stmt] = ast.parse(Path(inspect.getfile(value)).read_text("utf-8")).body  # type: ignore[arg-type]
    found: ast.stmt | None = None
    for part in value.__qualname__.split("."):  # type: ignore[attr-defined]
        found = next(
            node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
        )
        body = found.body
    assert isinstance(found, ast.FunctionDef | ast.ClassDef)
    return found


def test_the_public_names_are_those_that_are_written_down():
    """Law: no public name appears, changes or goes unseen."""
    now, kept = public_api().splitlines(), KEPT.read_text("utf-8").splitlines()
    gone = [line for line in kept if line not in now]
    new = [line for line in now if line not in kept]
    assert now == kept, "\n".join(
        [
            "The public names have changed.",
            *(f"  - {line.strip()}" for line in gone),
            *(f"  + {line.strip()}" for line in new),
            RENEW,
        ]
    )


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_may_be_used_of_it(room):
    """Law: `__all__` names what is there, in order, each name once; `dir` shows it."""
    module = import_module(room)
    assert list(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in dir(module)


@pytest.mark.parametrize("room", ROOMS)
def test_a_name_that_loads_late_has_its_type(room):
    """Law: what loads on first use stands under TYPE_CHECKING too, from the same module, and in `__all__`."""
    module = import_module(room)
    tree = ast.parse(Path(inspect.getfile(module)).read_text("utf-8"))
    late: dict[str, str] = {}
    typed: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "names_from":
            late = ast.literal_eval(node.args[1])
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for each in node.body:
                assert isinstance(each, ast.ImportFrom)
                typed |= {alias.name: "." * each.level + (each.module or "") for alias in each.names}
    assert late == typed
    assert set(late) <= set(module.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error():
    """Law: a late name that is misspelt fails as any other."""
    with pytest.raises(AttributeError, match="module 'sfumato' has no attribute 'lod'"):
        sfumato.lod  # noqa: B018


def test_the_version_stands_in_one_place():
    """Law: the source says its version, installed or not; the package's metadata reads it there."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert 'dynamic = ["version"]' in project
    assert 'path = "src/sfumato/__init__.py"' in project
    assert f"## [{sfumato.__version__}]" in (Path(__file__).parents[2] / "CHANGELOG.md").read_text("utf-8")


@pytest.mark.slow
def test_a_users_file_has_the_types_it_expects():
    """Law: pyright, strict, agrees with what tests/typed_use.py asserts of the public names."""
    pytest.importorskip("pyright")
    user = Path(__file__).parents[1] / "typed_use.py"
    seen = subprocess.run(
        [sys.executable, "-m", "pyright", str(user)],
        cwd=user.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert seen.returncode == 0, seen.stdout


if __name__ == "__main__":
    KEPT.write_text(public_api(), "utf-8")
    print(f"{KEPT} is written; look at its difference before it is committed.")
