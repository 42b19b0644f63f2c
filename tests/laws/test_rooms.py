"""Imports point down: a room knows only the rooms below it."""

import ast
import sys
from pathlib import Path

import pytest

import sfumato

SOURCE = Path(sfumato.__file__).parent

GROUND = {"errors", "settings", "own", "locks", "lazy"}
BELOW = {
    "errors": set(),
    "settings": {"errors"},
    "own": {"errors"},
    "locks": set(),
    "lazy": set(),
    "record": GROUND,
    "theory": GROUND,
    "stages": GROUND | {"record", "theory"},
    "data": GROUND | {"record", "theory"},
    "generation": GROUND | {"record", "theory", "stages"},
    "training": GROUND | {"record", "theory", "stages", "data"},
    "evaluation": GROUND | {"record", "theory", "stages", "data", "generation"},
    "studio": GROUND | {"record"},
    "recipe": GROUND | {"stages", "data", "training", "generation"},
}
BELOW["workflow"] = set(BELOW)
BELOW["demo"] = set(BELOW)
BELOW["cli"] = set(BELOW)
BELOW["__main__"] = set(BELOW)

STANDARD = set(sys.stdlib_module_names)
OUTSIDE = {
    "errors": set(),
    "settings": set(),
    "own": set(),
    "locks": {"filelock", "psutil"},
    "lazy": set(),
    "record": set(),
    "studio": {"jinja2", "markupsafe"},
    "theory": {"torch", "jaxtyping"},
    "recipe": {"tomlkit"},
}
"""The packages a room may use beside Python's own; a room not listed may use any."""

FILES = sorted(file for file in SOURCE.rglob("*.py") if file != SOURCE / "__init__.py")


def room_of(file: Path) -> str:
    """The first word of a file's place in the package, its suffix dropped."""
    first = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "cli" if first.startswith("cli") or first == "commands" else first


def imports(file: Path) -> list[tuple[int, str]]:
    """Every (line, full module name) a file imports, also inside functions."""
    package = ("sfumato", *file.relative_to(SOURCE).parent.parts)
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            bare = module == "sfumato" or not node.module
            found += [(node.lineno, f"{module}.{alias.name}" if bare else module) for alias in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_import_points_down(file):
    """Law: a line stands in the lowest room that holds what it speaks of."""
    room = room_of(file)
    assert room in BELOW, f"{file.name} is in no known room; the rooms are {', '.join(BELOW)}"
    for line, module in imports(file):
        parts = module.split(".")
        place = f"{file.relative_to(SOURCE)}, line {line}"
        if parts[0] == "sfumato":
            target = parts[1] if len(parts) > 1 else "__init__"
            if target == room or target == "__version__":
                continue
            target = "cli" if target.startswith("cli") or target == "commands" else target
            assert target in BELOW[room] or (room == "cli" and target == "cli"), (
                f"{place}: {room} imports {target}, but may only know "
                f"{', '.join(sorted(BELOW[room])) or 'nothing'}: the line stands in the wrong room, "
                f"or what it needs should come as an argument"
            )
            if room == "recipe" and target in ("stages", "data", "training", "generation"):
                assert parts[2:3] == ["settings"], f"{place}: recipe reads settings only, not {module}"
        elif room in OUTSIDE:
            allowed = STANDARD | OUTSIDE[room]
            assert parts[0] in allowed, (
                f"{place}: {room} does without {parts[0]}, so that it stays small and quick"
            )


def test_a_line_in_the_wrong_room_is_named(tmp_path, monkeypatch):
    """Law: the rule's failure names file, line and rooms."""
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "theory").mkdir()
    wrong = tmp_path / "theory" / "bad.py"
    wrong.write_text("import torch\nfrom ..training import loop\n")
    with pytest.raises(AssertionError, match=r"bad\.py, line 2: theory imports training"):
        test_every_import_points_down(wrong)


def test_recipe_and_errors_load_without_torch():
    """Law: what a mistyped key costs is milliseconds."""
    import subprocess

    code = "import sys, sfumato, sfumato.recipe, sfumato.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
