"""A page is one file: style, script, charts and pictures inside it, light or dark as the reader likes.

What pages say is filled into the templates beside this file by jinja2, which escapes every text it is given;
only what a template or a chart has written itself, a `Markup`, stays as it is. A page runs no script but its
own: it carries the hash of that one as its policy.
"""

import base64
import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
"""What is embedded from a folder, by the name that Pillow has for it."""
MOST_PIXELS, MOST_BYTES = 64_000_000, 64_000_000
"""The largest picture that is embedded from a folder."""
KINDS = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Picture:
    """A picture on a page.

    address: see `embedded`; a picture without one is left out. words stand beneath it, note beneath them.
    beside: what it was drawn from, (what it is, address) of each: it stands before the picture.
    """

    address: str
    words: str
    note: str = ""
    drawn_from: Sequence[tuple[str, str]] = ()


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # not quick to import

    found = Environment(
        loader=PackageLoader("sfumato.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"duration": duration, "grouped": lambda number: f"{number:,}"}
    return found


@cache
def _static(name: str) -> Markup:
    """A file that stands on pages as it is."""
    return Markup(files("sfumato.report").joinpath("templates", name).read_text(encoding="utf-8"))


@cache
def _policy() -> str:
    """What a browser may do with a page: its own script and style, pictures inside it, nothing else."""
    digest = hashlib.sha256(_static("page.js").encode()).digest()
    script = f"script-src 'sha256-{base64.b64encode(digest).decode()}'"
    return f"default-src 'none'; {script}; style-src 'unsafe-inline'; img-src data:"


def render(template: str, title: str, lead: str, kicker: str = "sfumato", **values: Any) -> str:
    """The whole page that a template makes of its values.

    Args:
        template: its name without .html.jinja; it extends `page`.
        title, lead: the page's heading, and a line under it.
        kicker: the small words above the heading.
    """
    page = {"style": _static("page.css"), "script": _static("page.js"), "policy": _policy()}
    found = _templates().get_template(f"{template}.html.jinja")
    return found.render(title=title, lead=lead, kicker=kicker, **page, **values) + "\n"


def part(name: str, *values: Any) -> Markup:
    """A part of a page, by the name of its macro in parts.html.jinja."""
    return getattr(_templates().get_template("parts.html.jinja").module, name)(*values)


def document(title: str, lead: str, body: Iterable[Markup], kicker: str = "sfumato") -> str:
    """A whole page of these sections, in order; empty ones are left out."""
    return render("page", title, lead, kicker, body=[one for one in body if one])


def section(title: str, content: Markup, lead: str = "") -> Markup:
    """A titled part of the page; nothing at all if it has no content."""
    return part("titled", title, content, lead) if content else Markup("")


def tiles(facts: Iterable[tuple[str, ...]]) -> Markup:
    """Big numbers in a row, each (name, value, note)."""
    return part("tiles", list(facts))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table of plain texts; nothing without rows."""
    listed = list(rows)
    return part("table", head, listed) if listed else Markup("")


def gallery(pictures: Iterable[Picture]) -> Markup:
    """Pictures with their words beneath."""
    there = [one for one in pictures if one.address]
    return part("gallery", there) if there else Markup("")


def facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Names and values in a row that wraps, as what pictures were drawn with."""
    there = list(pairs)
    return part("facts", there) if there else Markup("")


def grid(
    title: str, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Picture | None]]
) -> Markup:
    """A table of pictures whose rows and columns are named; the names stay while it is scrolled."""
    return part("grid", title, rows, columns, cells)


def charts(figures: Iterable[Markup]) -> Markup:
    """Charts side by side."""
    there = [one for one in figures if one]
    return part("charts", there) if there else Markup("")


def embedded(picture: Path | bytes, kind: str = "image/png") -> str:
    """A picture as an address that holds the picture itself; empty if the file is not there."""
    if isinstance(picture, Path):
        if not picture.is_file():
            return ""
        kind, picture = KINDS.get(picture.suffix.lower(), kind), picture.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def embedded_from(folder: Path, name: object) -> str:
    """A picture that lies inside a folder as an address that holds it; empty for anything else.

    Args:
        name: where it is in the folder, as its record says. Neither `../` nor a link leads out, and what is
            no picture that can be decoded is left out.
    """
    if not isinstance(name, str) or "\0" in name:
        return ""
    home, file = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    try:
        if not file.is_relative_to(home) or not file.is_file():
            return ""
        about = file.stat()
        kind = _kind(file, about.st_mtime_ns, about.st_size)
        return embedded(file.read_bytes(), kind) if kind else ""
    except OSError:
        return ""


@lru_cache(4096)
def _kind(file: Path, changed: int, size: int) -> str:
    """What kind of picture a file is, "" for none; looked at again when it has changed."""
    from PIL import Image

    if size > MOST_BYTES:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=list(FORMATS)) as picture:
                if picture.width * picture.height > MOST_PIXELS:
                    return ""
                picture.load()
                return FORMATS[picture.format or ""]
    except Exception:  # a stranger's file makes Pillow raise anything; it is no picture then
        return ""


def duration(seconds: float) -> str:
    """Seconds as people say them: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def amount(value: float) -> str:
    """A number as short as it may be: 12,345 or 1.75 M or 0.0312."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g} M" if abs(value) < 1e9 else f"{value / 1e9:.3g} G"
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
