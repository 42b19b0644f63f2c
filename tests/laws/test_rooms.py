"""Imports point down: a room knows only the rooms below it."""

import ast
import sys
from pathlib import Path

import pytest

import sfumato

SOURCE = Path(sfumato.__file__).parent

GROUND = {"errors", "settings", "user_code", "trust", "locks", "lazy", "paths", "hub"}
BELOW = {
    "errors": set(),
    "settings": {"errors"},
    "trust": {"errors"},
    "user_code": {"errors", "trust"},
    "locks": set(),
    "lazy": set(),
    "paths": set(),
    "hub": {"errors"},
    "run_folder": GROUND,
    "readers": {"errors"},
    "theory": GROUND,
    "models": GROUND | {"run_folder", "theory", "readers"},
    "data": GROUND | {"run_folder", "theory", "readers"},
    "generation": GROUND | {"run_folder", "theory", "readers", "models"},
    "training": GROUND | {"run_folder", "theory", "models", "data"},
    "evaluation": GROUND | {"run_folder", "theory", "readers", "models", "data", "generation"},
    "report": GROUND | {"run_folder"},
    "recipe": GROUND | {"models", "data", "training", "generation"},
}
BELOW["workflow"] = set(BELOW)
BELOW["demo"] = set(BELOW)
BELOW["cli"] = set(BELOW)
BELOW["__main__"] = set(BELOW)

STANDARD = set(sys.stdlib_module_names)
OUTSIDE = {
    "errors": set(),
    "settings": set(),
    "trust": set(),
    "user_code": set(),
    "locks": {"filelock", "psutil"},
    "lazy": set(),
    "paths": set(),
    "hub": {"huggingface_hub", "modelscope", "tqdm"},
    "run_folder": set(),
    "report": {"jinja2", "markupsafe", "PIL"},
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
            if room == "recipe" and target in ("models", "data", "training", "generation"):
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
    wrong.write_text("import torch\nfrom sfumato.training import loop\n")
    with pytest.raises(AssertionError, match=r"bad\.py, line 2: theory imports training"):
        test_every_import_points_down(wrong)


def test_recipe_and_errors_load_without_torch():
    """Law: what a mistyped key costs is milliseconds."""
    import subprocess

    code = "import sys, sfumato, sfumato.recipe, sfumato.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


WITHIN = {
    "theory": {
        "solvers": set(),
        "schedule_search": {"solvers"},
        "times": {"schedule_search"},
        "verify": {"solvers", "schedule_search"},
    },
    "models": {
        "codecs": set(),
        "text": set(),
        "networks": set(),
        "lora": {"networks"},
        "control": {"codecs", "networks"},
        "pretrained": {"codecs", "text", "networks", "lora", "control"},
        "build": {"codecs", "text", "networks"},
        "io": {"build", "codecs", "text", "networks", "lora", "pretrained", "control"},
    },
    "data": {
        "sources": set(),
        "store": set(),
        "encoding": {"sources", "store"},
        "condition_images": {"sources"},
        "survey": {"sources"},
        "dataset_report": {"sources", "survey"},
    },
    "training": {
        "optim": set(),
        "distributed": {"optim"},
        "state": {"distributed", "optim"},
        "objective": {"distributed"},
        "loop": {"distributed", "optim", "state", "objective"},
        "estimate": {"distributed", "optim", "state", "objective"},
    },
    "workflow": {
        "suggest": {"planning"},
        "planning": set(),
        "sanity_checks": {"planning"},
        "train_run": {"planning", "sanity_checks"},
        "evaluate": set(),
        "export": set(),
        "lora_files": {"export"},
    },
}
"""Room → what lies above its ground → which of those it may know. Files not named are the room's ground."""

SAME_NAME = {
    "settings": "what a recipe says about a room",
    "files": "how a room writes its files",
    "guidance": "the formulas, and the options of drawing",
    "video": "clips of a codec, of drawing, of a demo",
    "load": "a part of a model from files",
    "dit": "diffusion transformers, ours and pretrained",
    "context_parallel": "one sample shared by processes: the groups, and the hooks of pretrained networks",
    "controlnet": "the network, and its demo",
    "ip_adapter": "the network, and its demo",
    "store": "the store, and the command about it",
}
"""Files of one name in several rooms, and the one sense they share."""


def part_of(module: str) -> tuple[str, str]:
    """(room, sub-room or file in it) of a full module name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "", parts[2] if len(parts) > 2 else ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_within_a_room_imports_point_down_too(file):
    """Law: a sub-room knows the ground of its room, and those sub-rooms that lie below it."""
    room, part = part_of(module_of(file))
    above = WITHIN.get(room)
    if above is None or not part:
        return
    for line, module in imports(file):
        there, target = part_of(module)
        if module.startswith("sfumato.") and there == room and target in above and target != part:
            assert target in above.get(part, ()), (
                f"{file.relative_to(SOURCE)}, line {line}: {room}/{part} imports {room}/{target}, but "
                f"there it may only know {', '.join(sorted(above.get(part, ()))) or 'the ground of the room'}"
            )


def module_of(file: Path) -> str:
    """The full name of a file's module."""
    parts = ("sfumato", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph() -> dict[str, list[tuple[str, str]]]:
    """Module → (place of the import, module), imports inside functions counted, those for types alone not."""
    files = {module_of(file): file for file in SOURCE.rglob("*.py")}
    found: dict[str, list[tuple[str, str]]] = {}
    for module, file in files.items():
        tree = ast.parse(file.read_text())
        for_types = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            for statement in node.body
            for inner in ast.walk(statement)
        }
        found[module] = []
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom) or node in for_types:
                continue
            names = [f"{getattr(node, 'module', None) or ''}.{alias.name}".strip(".") for alias in node.names]
            for name in names:
                target = name if name in files else name.rpartition(".")[0]
                if target in files and target != module:
                    found[module].append((f"{file.relative_to(SOURCE)}, line {node.lineno}", target))
    return found


def test_no_import_leads_in_a_circle():
    """Law: modules can be read in an order in which each is understood from those before it."""
    edges = graph()
    finished: set[str] = set()
    path: list[str] = []

    def walk(module: str) -> None:
        path.append(module)
        for place, target in edges[module]:
            if target in path:
                circle = " → ".join([*path[path.index(target) :], target])
                raise AssertionError(f"{place} closes a circle: {circle}. Move what both need below them.")
            if target not in finished:
                walk(target)
        finished.add(path.pop())

    for module in sorted(edges):
        if module not in finished:
            walk(module)


def test_no_two_files_share_a_name_in_different_senses():
    """Law: a file's name says what is in it, in the whole house; exceptions are listed with their sense."""
    places: dict[str, list[str]] = {}
    for file in FILES:
        if file.stem not in ("__init__", "__main__"):
            places.setdefault(file.stem, []).append(str(file.relative_to(SOURCE)))
    for name, files in places.items():
        assert len(files) == 1 or name in SAME_NAME, f"{' and '.join(files)} share a name: rename one of them"
    alone = [name for name in SAME_NAME if len(places.get(name, ())) < 2]
    assert not alone, f"{', '.join(alone)}: no two files share this name any more; strike it from the list"
