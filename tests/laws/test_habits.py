"""What is written twice outside of the code agrees."""

import re
import tomllib
from pathlib import Path

import yaml

TOP = Path(__file__).parents[2]
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))["project"]
JOBS = yaml.safe_load((TOP / ".github" / "workflows" / "ci.yml").read_text("utf-8"))["jobs"]
MATRIX = JOBS["tests"]["strategy"]["matrix"]["include"]


def test_ci_tries_the_lowest_versions_that_are_promised():
    """Law: the pins of the lowest job are the lower bounds of pyproject.toml, of Python too."""
    (lowest,) = (job for job in MATRIX if job["versions"] == "lowest")
    pinned = dict(re.findall(r"(\w+)==([\d.]+)\.\*", lowest["pins"]))
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(PROJECT["dependencies"]), flags=re.MULTILINE))
    assert set(pinned) == {"torch", "diffusers", "transformers", "peft"}
    for name, version in pinned.items():
        assert version.removesuffix(".0") == bounds[name].removesuffix(".0"), name
    assert PROJECT["requires-python"] == f">={lowest['python']}"


def test_ci_installs_extras_that_exist():
    """Law: every extra named in the workflow, the README and the examples is one."""
    files = [*(TOP / ".github").rglob("*.yml"), TOP / "README.md", TOP / "CONTRIBUTING.md", TOP / "Makefile"]
    named = {
        extra
        for file in files
        for extras in re.findall(r"\.\[([\w,]+)\]", file.read_text("utf-8"))
        for extra in extras.split(",")
    }
    assert {"test", "docs"} <= named <= set(PROJECT["optional-dependencies"])


def test_the_site_shows_every_page():
    """Law: each page of docs/ is in the site's navigation, and nothing else of docs/ is."""
    nav = (TOP / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    shown = set(re.findall(r": ([\w-]+\.md)$", nav, flags=re.MULTILINE))
    written = {page.name for page in (TOP / "docs").glob("*.md")}
    assert shown - {"index.md", "CONTRIBUTING.md", "CHANGELOG.md"} == written
