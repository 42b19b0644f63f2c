"""A page is one file: style, script, charts and pictures inside it, light or dark as the reader likes."""

import base64
import html
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

KINDS = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".svg": "image/svg+xml",
}


def escape(text: object) -> str:
    """Text as it may stand in HTML, also inside attributes."""
    return html.escape(str(text))


@cache
def _part(name: str) -> str:
    return files("sfumato.studio").joinpath(name).read_text(encoding="utf-8")


def document(title: str, lead: str, body: Iterable[str], kicker: str = "sfumato") -> str:
    """The whole page.

    Args:
        title, lead: its heading, and a line of HTML under it.
        body: sections, in order; empty ones are left out.
        kicker: the small words above the heading.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{_part("page.css")}</style>
</head>
<body>
<header>
<p class="kicker">{escape(kicker)}</p>
<h1>{escape(title)}</h1>
<p class="lead">{lead}</p>
</header>
<main>
{"".join(one for one in body if one)}
</main>
<dialog id="lens"><img alt=""><p></p></dialog>
<div id="tip" hidden></div>
<script>
{_part("page.js")}</script>
</body>
</html>
"""


def section(title: str, content: str, lead: str = "") -> str:
    """A titled part of the page; nothing at all if it has no content."""
    words = f'<p class="about">{lead}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{words}{content}</section>\n" if content else ""


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """Big numbers in a row, each (name, value, note)."""
    cells = [
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in facts
        if value
    ]
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], classes: Iterable[str] = ()) -> str:
    """A table of plain texts; a row may carry a class."""
    names, marks = "".join(f"<th>{escape(name)}</th>" for name in head), iter(classes)
    lines = [
        f'<tr class="{next(marks, "")}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    ]
    return f'<div class="wide"><table><tr>{names}</tr>{"".join(lines)}</table></div>' if lines else ""


def embedded(picture: Path | bytes, kind: str = "image/png") -> str:
    """A picture as an address that holds the picture itself; empty if the file is not there."""
    if isinstance(picture, Path):
        if not picture.is_file():
            return ""
        kind, picture = KINDS.get(picture.suffix.lower(), kind), picture.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def gallery(
    pictures: Iterable[tuple[str, str, str]],
    small: bool = False,
    beside: Sequence[Sequence[tuple[str, str]]] = (),
) -> str:
    """Pictures with their words beneath, each (address, words, small note).

    Args:
        beside: what each was drawn from, (what it is, address): it stands before the picture.
    """
    cells = []
    for index, (address, words, note) in enumerate(pictures):
        if not address:
            continue
        before = beside[index] if index < len(beside) else ()
        shown = [*before, (words, address)]
        images = "".join(f'<img src="{one}" alt="{escape(what)}" loading="lazy">' for what, one in shown)
        images = f'<div class="row">{images}</div>' if before else images
        caption = f"{escape(words)}{f'<small>{escape(note)}</small>' if note else ''}"
        cells.append(f'<figure class="picture">{images}<figcaption>{caption}</figcaption></figure>')
    kinds = " small" * small + " pairs" * any(beside)
    return f'<div class="gallery{kinds}">{"".join(cells)}</div>' if cells else ""


def shares(parts: Sequence[tuple[str, float]]) -> str:
    """A bar divided as the parts' seconds are, with a legend."""
    total = sum(seconds for _, seconds in parts)
    if total <= 0:
        return ""
    bar = "".join(
        f'<i class="c{index % 6}" style="flex-grow:{max(seconds, total / 400):.3f}" '
        f'data-tip="{escape(name)}: {duration(seconds)}"></i>'
        for index, (name, seconds) in enumerate(parts)
    )
    legend = "".join(
        f'<li><i class="c{index % 6}"></i>{escape(name)} <b>{duration(seconds)}</b></li>'
        for index, (name, seconds) in enumerate(parts)
    )
    return f'<div class="shares">{bar}</div><ul class="legend">{legend}</ul>'


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
