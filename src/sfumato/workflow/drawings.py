"""What was drawn, kept: files that say what they show, a contact sheet, and a page; of pictures or a grid.

Nothing that is there is replaced: where a name is taken, all that one call writes is numbered.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.errors import Failed, one_of, printable
from sfumato.generation import files
from sfumato.generation.contact_sheet import grid_sheet, sheet_of
from sfumato.report.page import Markup, Picture, document, embedded, facts, gallery, grid, section
from sfumato.run_folder import write_atomic

PAGE_SIDE = 512
"""Pixels of a picture's longer side on the page of a grid; its file has all."""


@dataclass(frozen=True)
class Drawing:
    """One picture or clip: what it shows, its seed, all it was drawn with, and its place in a grid."""

    drawn: Any
    prompt: str
    seed: int
    settings: dict[str, Any]
    at: tuple[int, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)


def write_drawings(
    out: Path,
    drawings: Sequence[Drawing],
    lead: str,
    formats: Sequence[str] = (),
    fps: float = files.DEFAULT_FPS,
    axes: Mapping[str, Sequence[Any]] | None = None,
) -> dict[str, Any]:
    """Write the files, a contact sheet and a page; what was written where.

    A clip of one frame is a picture unless `formats` says otherwise.

    Args:
        lead: a line under the page's title; fps: of clips.
        axes: of a grid, {name: values}; without them the drawings stand one after the other.
    Returns:
        {"pictures": [{file, files, prompt, seed}], "sheet", "page"}; of a grid also the cells' values.
    """
    kept = [still(one.drawn, formats) for one in drawings]
    kinds = [one_of("--format", kind, files.kinds_of(kept[0])) for kind in formats]
    kinds = kinds or [files.kinds_of(kept[0])[0]]
    names = [f"{index:03d}-{_name(one)}" for index, one in enumerate(drawings)]
    number = free_number(out, names, [ending_of(kind) for kind in kinds])
    listed: list[dict[str, Any]] = []
    for name, one, drawn in zip(names, drawings, kept, strict=True):
        said = {"prompt": one.prompt, **one.settings, "seed": one.seed}
        row: dict[str, Any] = {
            **_save(drawn, out / f"{name}{number}", kinds, said, fps),
            "prompt": one.prompt,
        }
        row |= {"seed": one.seed} | ({"values": dict(one.values)} if axes else {})
        listed.append(row)
    sheet, page = out / f"sheet{number}.png", out / f"index{number}.html"
    if axes:
        tables = tables_of(axes)
        drawn_at = {one.at: drawn for one, drawn in zip(drawings, kept, strict=True)}
        labelled = [(title, rows, columns) for title, rows, columns, _ in tables]
        content = [[[drawn_at.get(at) for at in row] for row in places] for *_, places in tables]
        picture = grid_sheet(labelled, content)
        written = _grid_page(lead, axes, tables, drawings, kept, listed, fps)
    else:
        picture = sheet_of(kept, [one.prompt for one in drawings])
        written = _page(lead, drawings, kept, fps)
    write_atomic(sheet, files.png(picture, {}))
    write_atomic(page, written)
    return {"pictures": listed, "sheet": sheet, "page": page}


# ---------------------------------------------------------------- files


def still(drawn: Any, formats: Sequence[str] = ()) -> Any:
    """A drawing; of a clip of one frame that frame, unless a kind of clips is asked for."""
    is_asked = any(kind not in files.PICTURE_KINDS for kind in formats)
    if files.is_clip(drawn) and len(drawn) == 1 and not is_asked:
        return Image.fromarray(drawn[0])
    return drawn


def ending_of(kind: str) -> str:
    """What the name of a drawing's file, or of the folder of its frames, ends in."""
    return "" if kind == "frames" else f".{kind}"


def free_number(out: Path, names: Sequence[str], endings: Collection[str]) -> str:
    """What a call adds to the names of its files so that none is taken: nothing, "-2", "-3", …

    The page is made at once, so that another call at the same time takes the next number.
    """
    out.mkdir(parents=True, exist_ok=True)
    taken = {one.name for one in out.iterdir()}
    for number in ("", *(f"-{count}" for count in range(2, len(taken) + 3))):
        wanted = {f"{name}{number}{ending}" for name in names for ending in endings}
        wanted |= {f"sheet{number}.png", f"index{number}.html"}
        if wanted.isdisjoint(taken):
            try:
                (out / f"index{number}.html").touch(exist_ok=False)
            except FileExistsError:
                continue
            return number
    raise Failed(
        f"{out} is being filled by others faster than a free name can be found. Choose another --out."
    )


def slug(text: str, most: int = 40) -> str:
    """A text as a part of a file's name."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in text.lower())
    return "-".join(part for part in kept.split("-") if part)[:most] or "picture"


def _name(one: Drawing) -> str:
    """A drawing's name: its prompt and seed, in a grid its place."""
    if not one.values:
        return f"{slug(one.prompt)}-{one.seed}"
    words = (value if isinstance(value, str) else label(value) for value in one.values.values())
    said = (f"{name}-{word}" for name, word in zip(one.values, words, strict=True))
    return slug(" ".join(word.replace(".", "p") for word in said), 80)


def _save(drawn: Any, place: Path, kinds: Sequence[str], said: dict[str, Any], fps: float) -> dict[str, Any]:
    """Write a picture or clip to `place` and an ending; where it is now, numbered frames as their folder."""
    written = []
    for kind in kinds:
        for ending, content in files.contents(drawn, kind, said, fps).items():
            file = Path(f"{place}{ending}")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, content)
            written.append(str(file))
    return {"file": str(place) if kinds[0] == "frames" else written[0], "files": written}


# ---------------------------------------------------------------- pages


def label(value: Any) -> str:
    """A value as a page names it."""
    if isinstance(value, bool) or not isinstance(value, int | float | tuple | list):
        return printable("none" if value is None else value)
    if isinstance(value, tuple | list):
        return "×".join(map(label, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def shown_facts(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a drawing was made with, as (name, value), in an order that people ask in."""
    known = dict(settings)
    size = [known.pop(name) for name in ("width", "height", "frames") if name in known]
    first = {"model": known.pop("model", None), "steps": known.pop("steps", None)}
    first |= {"guidance": known.pop("guidance", None), "solver": known.pop("solver", None)}
    first |= {"size": "×".join(map(str, size)), "negative": known.pop("negative", None)}
    loras = known.pop("loras", None)
    first |= {"LoRA": ", ".join(loras) if loras else None}
    rest = {name.replace("_", " "): value for name, value in known.items() if value not in (None, "", [])}
    return [(name, label(value)) for name, value in {**first, **rest}.items() if value not in (None, "")]


def shared(drawings: Sequence[Drawing]) -> dict[str, Any]:
    """The settings that all drawings have in common."""
    first = drawings[0].settings
    return {
        name: value
        for name, value in first.items()
        if all(name in one.settings and one.settings[name] == value for one in drawings)
    }


def preview(drawn: Any, fps: float, side: int = 0) -> str:
    """A picture, or a clip as an animation, as an address for a page; with `side` no larger than that."""
    if files.is_clip(drawn):
        return embedded(
            files.webp([_within(Image.fromarray(one), side) for one in drawn], {}, fps), "image/webp"
        )
    if side:
        return embedded(files.webp([_within(drawn, side)], {}, fps), "image/webp")
    return embedded(files.png(drawn, {}), "image/png")


def _within(picture: Image.Image, side: int) -> Image.Image:
    if not side or max(picture.size) <= side:
        return picture
    scale = side / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _page(lead: str, drawings: Sequence[Drawing], kept: Sequence[Any], fps: float) -> str:
    """The page of pictures one after the other."""
    pictures = [
        Picture(preview(drawn, fps), printable(one.prompt), f"seed {one.seed}")
        for one, drawn in zip(drawings, kept, strict=True)
    ]
    title = "Clips" if files.is_clip(kept[0]) else "Pictures"
    made = section("Drawn with", facts(shown_facts(shared(drawings))))
    return document(title, lead, [section("Drawn", gallery(pictures)), made])


Table = tuple[str, list[str], list[str], list[list[tuple[int, ...]]]]
"""A title, the names of rows and columns, and the place of each cell."""


def tables_of(axes: Mapping[str, Sequence[Any]]) -> list[Table]:
    """The tables of a grid: its first axis goes down, its second across, each further one makes tables."""
    names = list(axes)
    labels = {name: [f"{axis_name(name)} {label(value)}".strip() for value in axes[name]] for name in names}
    rows, columns = (names[0], names[1]) if len(names) > 1 else (None, names[0])
    found: list[Table] = []
    for rest in product(*(range(len(axes[name])) for name in names[2:])):
        title = " · ".join(labels[name][i] for name, i in zip(names[2:], rest, strict=True))
        across = range(len(axes[columns]))
        places = [
            [((down,) if rows else ()) + (i,) + rest for i in across]
            for down in range(len(axes[rows]) if rows else 1)
        ]
        found.append((title, labels[rows] if rows else [""], labels[columns], places))
    return found


def axis_name(name: str) -> str:
    """An axis as a page names it; prompts speak for themselves."""
    return {"lora": "LoRA", "prompt": "", "negative": "not", "size": ""}.get(name, name.replace("_", " "))


def _grid_page(
    lead: str,
    axes: Mapping[str, Sequence[Any]],
    tables: Sequence[Table],
    drawings: Sequence[Drawing],
    kept: Sequence[Any],
    listed: Sequence[Mapping[str, Any]],
    fps: float,
) -> str:
    """The page of a grid: a table for each value of a third axis, and what all cells have in common."""
    cells: dict[tuple[int, ...], Picture] = {}
    for one, drawn, row in zip(drawings, kept, listed, strict=True):
        said = " · ".join(f"{axis_name(name)} {label(value)}".strip() for name, value in one.values.items())
        words = said if "seed" in one.values else f"{said} · seed {one.seed}"
        cells[one.at] = Picture(preview(drawn, fps, PAGE_SIDE), words, Path(row["file"]).name)
    content = Markup("").join(
        grid(title, rows, columns, [[cells.get(at) for at in row] for row in places])
        for title, rows, columns, places in tables
    )
    common = {name: value for name, value in shared(drawings).items() if name not in axes}
    beside: dict[str, Any] = {} if "prompt" in axes else {"prompt": drawings[0].prompt}
    beside |= {} if "seed" in axes else {"seed": drawings[0].seed}
    made = section(
        "The same in every cell", facts([*((n, label(v)) for n, v in beside.items()), *shown_facts(common)])
    )
    title = " × ".join(axis_name(name) or name for name in axes)
    return document(title[:1].upper() + title[1:], lead, [section("Drawn", content), made])
