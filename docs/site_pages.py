"""What the site of the docs shows beside the pages of this folder, made while `make docs` builds it.

The README is its first page; CONTRIBUTING, the changelog, and what a page links to outside of this folder
(results of benchmarks, examples) become pages; each room gets a page of reference, made from its `__all__`.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

TOP = Path(__file__).resolve().parents[1]
SOURCE = TOP / "src" / "sfumato"
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)")
ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put a page for each room that has public names under "Reference"."""
    rooms = sorted(room.parent.name for room in SOURCE.glob("*/__init__.py") if public_names(room))
    for part in config.nav or []:
        if "Reference" in part:
            part["Reference"] = [{"sfumato": "reference/sfumato.md"}]
            part["Reference"] += [{f"sfumato.{room}": f"reference/{room}.md"} for room in rooms]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are written elsewhere, or by nobody."""
    texts = {ROOT[name]: placed((TOP / name).read_text("utf-8"), "", ROOT[name]) for name in ROOT}
    for page in sorted((TOP / "docs").glob("*.md")):
        for target in outside(page.read_text("utf-8")):
            texts[address(target)] = shown(target)
    for room in sorted(SOURCE.glob("*/__init__.py")):
        if names := public_names(room):
            texts[f"reference/{room.parent.name}.md"] = reference(f"sfumato.{room.parent.name}", names)
    texts["reference/sfumato.md"] = reference("sfumato", public_names(SOURCE / "__init__.py"))
    for place, text in texts.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let a page's links out of this folder lead to the pages made for them."""
    return placed(markdown, "docs", page.file.src_uri) if page.file.generated_by is None else markdown


def outside(markdown: str) -> list[Path]:
    """The files of this repository, outside of docs/, that a page of docs/ links to."""
    found = [(TOP / "docs" / target).resolve() for _, target in LINK.findall(markdown)]
    return [file for file in found if (TOP / "docs") not in file.parents and file.is_file()]


def address(file: Path) -> str:
    """Where a file outside of docs/ stands on the site."""
    place = file.relative_to(TOP).as_posix()
    return ROOT.get(place, place if place.endswith(".md") else f"{place}.md")


def shown(file: Path) -> str:
    """A page as it is; any other file as a block of code."""
    text = file.read_text("utf-8")
    place = file.relative_to(TOP).as_posix()
    if file.suffix == ".md":
        return placed(text, posixpath.dirname(place), address(file))
    return f"# {place}\n\n```{file.suffix[1:]}\n{text}\n```\n"


def placed(markdown: str, folder: str, page: str) -> str:
    """The text of a page in `folder` of the repository, its links as they are at `page` of the site."""

    def moved(found: re.Match[str]) -> str:
        file = (TOP / folder / found[2]).resolve()
        if not file.exists():
            return found[0]
        inside = (TOP / "docs") in file.parents
        target = file.relative_to(TOP / "docs").as_posix() if inside else address(file)
        return found[1] + posixpath.relpath(target, posixpath.dirname(page) or ".")

    return LINK.sub(moved, markdown)


def public_names(room: Path) -> list[str]:
    """The names of a package's `__all__`, read without importing it."""
    for node in ast.parse(room.read_text("utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    return []


def reference(package: str, names: list[str]) -> str:
    """A page that shows each public name of a package."""
    options = "    options:\n      show_root_heading: true\n      show_root_toc_entry: true\n"
    entries = [f"::: {package}.{name}\n{options}" for name in names if not name.startswith("__")]
    head = f"# {package}\n\n::: {package}\n    options:\n      members: false\n"
    return "\n".join([head, *entries])
