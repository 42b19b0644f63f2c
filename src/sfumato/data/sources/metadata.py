"""Metadata: captions and columns from metadata.jsonl, .csv and .parquet and from files beside a picture.

A row that cannot be used is set aside with its reason; a table that cannot be used is refused.
"""

import csv
import json
import math
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from sfumato.data.sources.sample import SetAside
from sfumato.data.sources.splits import SPLITS
from sfumato.errors import Refused, nearest, printable
from sfumato.readers.media import CLIPS, PICTURES, unread_kind

FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.tsv")
FILE_COLUMNS = ("file_name", "file", "image", "path", "video")
CAPTION_COLUMNS = ("caption", "text", "captions", "prompt")
COMPANIONS = {
    "control": "control",
    "conditioning": "control",
    "reference": "reference",
    "mask": "mask",
    "depth": "depth",
    "edit_source": "edit_source",
    "source": "edit_source",
    "input": "edit_source",
    "original": "edit_source",
}
"""Columns (or parts of file names) that name a further picture of a sample, and what it is called here."""
LABELS = ("label", "labels", "class", "class_label")
ENDINGS = ("_file_name", "_image", "_file", "_path", "")
ARCHIVES = (".tar", ".npz", ".parquet", ".arrow", ".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".xz", ".zst")
LONGEST_CAPTION = 20_000
MOST_DIGITS = 18  # of a class's number
MOST_TEXT = 1_000_000  # bytes of a caption's file
MOST_JSON = 16_000_000  # bytes of a JSON file or line, which may hold more than a caption
csv.field_size_limit(10_000_000)


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read: where captions come from, and which columns of the user's own are companions."""

    captions: str = "files"
    companions: tuple[str, ...] = ()
    image: str = ""
    """Of tables, the column of the pictures; "" for the usual ones."""
    caption: str = ""
    """Of tables, the column of the captions; "" for the usual ones."""


@dataclass(frozen=True)
class Row:
    """One row: `file` relative to the data folder, `file_cell` as the table has it, `reason` if unusable."""

    file: str
    file_cell: str
    captions: tuple[str, ...]
    split: str | None = None
    label: int | None = None
    reason: str = ""
    extra: dict[str, str] = field(default_factory=dict)
    companions: dict[str, str] = field(default_factory=dict)


def files_below(root: Path) -> Iterator[str]:
    """The names of all files below a folder, in order; hidden ones and hidden folders left out."""
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = PurePosixPath(Path(place).relative_to(root).as_posix())
        yield from (str(inside / name) for name in sorted(names) if not name.startswith("."))


def lies_inside(path: Path, base: Path) -> bool:
    """Whether a resolved path lies in a resolved folder of data.

    A snapshot of the Hub's cache is a folder of links to the blobs of its own repository, which belong to it.
    """
    return path.is_relative_to(base) or any(
        place.parent.name == "snapshots"
        and place.parent.parent.name.startswith(("datasets--", "models--", "spaces--"))
        and path.is_relative_to(place.parent.parent / "blobs")
        for place in (base, *base.parents)
    )


def why_unread(name: str) -> str:
    """Why a file of this name is not read though it may hold pictures; "" for any other."""
    if name.lower().endswith(ARCHIVES) and PurePosixPath(name).name not in FILES:
        return "an archive beside files of another kind; name it in data.train by itself, or unpack it"
    return unread_kind(name)


def others_beside(root: Path, own: str) -> list[SetAside]:
    """The pictures, clips and archives beside files of the kind `own`, which alone are read."""
    found = []
    for name in files_below(root) if root.is_dir() else ():
        reason = why_unread(name)
        if not reason and name.lower().endswith(PICTURES + CLIPS):
            reason = f"not read beside {own} files; put it into a folder of its own"
        if reason and not name.lower().endswith(own):
            found.append(SetAside(printable(name), reason))
    return found


def is_text(words: str) -> bool:
    """Whether a string has no bytes in it that were not UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in words)


def read(
    root: Path,
    table: str,
    set_aside: list[SetAside],
    options: SourceOptions = SourceOptions(),
) -> Iterator[Row]:
    """The rows of one table; those that say nothing usable go to `set_aside`.

    Raises:
        Refused: the table cannot be read, or lacks the column of files or of captions.
    """
    path = root / table
    rows = list(_rows(path, table, set_aside))
    columns = list(dict.fromkeys(column for _, row, _ in rows for column in row))
    file_column = next((name for name in FILE_COLUMNS if name in columns), None)
    caption_column = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if not rows:
        raise Refused(f"{path} has no rows that can be read. Each row needs file_name and caption.")
    needed = options.captions != "none"
    for what, found, wanted in (("files", file_column, "file_name"), ("captions", caption_column, "caption")):
        if found is None and (needed or what == "files"):
            raise Refused(
                f"{path} has no column of {what}: it has {', '.join(map(printable, columns))}. "
                f'Name one of them "{wanted}".{nearest(wanted, columns) if columns else ""}'
            )
    assert file_column is not None
    for number, row, reason in rows:
        file_cell = row.get(file_column)
        if not isinstance(file_cell, str) or not file_cell:
            set_aside.append(SetAside(f"{table}:{number}", reason or "the row names no file"))
            continue
        found = _row(table, file_cell, row, caption_column or "", options.companions)
        yield replace(found, captions=(), reason=reason) if reason else found


def _row(table: str, file_cell: str, row: Mapping[str, Any], caption_column: str, own: Sequence[str]) -> Row:
    captions, reason = captions_of(row.get(caption_column))
    extra = {
        column: value
        for column, value in row.items()
        if isinstance(value, str) and column not in (caption_column, *FILE_COLUMNS, "split")
    }
    split = row.get("split")
    known = SPLITS.get(str(split).strip().lower()) if split not in (None, "") else None
    if split not in (None, "") and known is None:
        captions, reason = (), f'its split "{split}" is none of {", ".join(SPLITS)}'
    whole = next((found for name in LABELS if (found := class_number(row.get(name))) is not None), None)
    companions = {
        name: _inside(table, extra.pop(column))
        for column in list(extra)
        if (name := companion(column, extra[column], own))
    }
    return Row(_inside(table, file_cell), file_cell, captions, known, whole, reason, extra, companions)


def class_number(value: Any) -> int | None:
    """A class number from a cell: an integer, or its digits; None for anything else."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value) if len(value.strip()) <= MOST_DIGITS else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def companion(column: str, value: Any, own: Sequence[str] = ()) -> str:
    """The companion a column names ("mask_image" → "mask"), "" if its value is no picture's name.

    Args:
        own: columns of the user's that are companions under their own name.
    """
    if not isinstance(value, str) or not value.lower().endswith(PICTURES + CLIPS):
        return ""
    if column in own:
        return column
    stem = next(column.removesuffix(ending) for ending in ENDINGS if column.endswith(ending))
    if stem in own:
        return stem
    return COMPANIONS.get(stem, stem if column.endswith("_file_name") else "")


def _inside(table: str, file_cell: str) -> str:
    """The named file relative to the data folder, "." resolved; ".." and "/" are kept, for refusal."""
    file_cell = file_cell.replace("\\", "/") if "\\" in file_cell and "/" not in file_cell else file_cell
    if file_cell.startswith("/") or ".." in PurePosixPath(file_cell).parts:
        return file_cell
    return str(PurePosixPath(table).parent / file_cell)


def captions_of(value: Any) -> tuple[tuple[str, ...], str]:
    """Captions from a cell: a text or a list of texts. Returns them, or () and the reason why none."""
    listed = value if isinstance(value, list | tuple) else [value]
    if not listed or all(one is None or (isinstance(one, float) and math.isnan(one)) for one in listed):
        return (), "no caption"
    if not all(isinstance(one, str) for one in listed):
        return (), "its caption is no text"
    if not all(is_text(one) for one in listed):
        return (), "its caption is not UTF-8 text"
    kept = tuple(dict.fromkeys(" ".join(one.split()) for one in listed if one.strip()))
    if not kept:
        return (), "its caption is empty"
    if max(map(len, kept)) > LONGEST_CAPTION:
        return (), f"its caption has more than {LONGEST_CAPTION} letters"
    return kept, ""


def bounded_text(path: Path, most: int = MOST_TEXT) -> str:
    """The text of a file, whose bytes that are no UTF-8 stay marked; no more than `most` bytes are read.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is longer, or UTF-16; the message is the reason.
    """
    with path.open("rb") as file:
        return decoded(file.read(most + 1), most)


def decoded(data: bytes, most: int = MOST_TEXT) -> str:
    """Bytes of a text, at most so many, as UTF-8; bytes that are none stay marked.

    Raises:
        ValueError: longer, or UTF-16; the message is the reason.
    """
    if len(data) > most:
        raise ValueError(f"longer than {most / 1e6:g} MB")
    if is_utf16(data):
        raise ValueError("UTF-16, not UTF-8: save it as UTF-8")
    return data.decode("utf-8-sig", "surrogateescape")


def is_utf16(data: bytes) -> bool:
    """Whether bytes are UTF-16: by its mark, or because every other one of a text's beginning is 0."""
    head = data[:1024]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    sides = [head[0::2], head[1::2]]
    return len(head) > 3 and any(side.count(0) > 0.4 * len(side) for side in sides)


def sidecar(path: Path) -> tuple[tuple[str, ...], str, str]:
    """Captions from a .txt (one a line) or .json file beside a picture, why there are none, and a note."""
    try:
        text = bounded_text(path, MOST_JSON if path.suffix == ".json" else MOST_TEXT)
    except OSError as problem:
        return (), f"its caption file cannot be opened: {problem.strerror}", ""
    except ValueError as problem:
        return (), f"its caption file is {problem}", ""
    if path.suffix == ".json":
        return (*captions_of_json(text, "the .json beside it"), "")
    return (*captions_of(text.splitlines() or [""]), paragraphs(text))


def paragraphs(text: str) -> str:
    """A note on a text with empty lines between others: each line is a caption of its own; "" without."""
    lines = text.strip().splitlines()
    if all(line.strip() for line in lines):
        return ""
    number = sum(bool(line.strip()) for line in lines)
    return (
        f"its {number} lines are {number} captions; used, but if they are one caption, write it on one line"
    )


def captions_of_json(text: str, what: str) -> tuple[tuple[str, ...], str]:
    """Captions from the text of a JSON file, or the reason why there are none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return (), f"{what} is not JSON"
    if isinstance(value, dict):
        value = next((value[name] for name in CAPTION_COLUMNS if name in value), None)
    return captions_of(value)


def _rows(path: Path, table: str, set_aside: list[SetAside]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(line number, columns, why it cannot be used) of every row that can be parsed.

    Raises:
        Refused: the table cannot be opened, or is UTF-16.
    """
    if path.suffix == ".parquet":
        yield from ((number, row, "") for number, row in enumerate(_parquet(path), start=1))
        return
    try:
        with path.open("rb") as file:
            if is_utf16(file.read(1024)):
                raise Refused(f"{path} is UTF-16, not UTF-8. Save it as UTF-8.")
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=_newline(path)) as file:
            if path.suffix in (".csv", ".tsv"):
                yield from _comma_separated(path, table, file, set_aside)
                return
            for number, line in _lines(file, table, set_aside):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    yield number, row, ""
                else:
                    set_aside.append(SetAside(f"{table}:{number}", "the line is not a JSON object"))
    except OSError as problem:
        raise Refused(f"{path} cannot be opened: {problem.strerror}.") from problem


def _newline(path: Path) -> str:
    """What ends a line: any newline in tables of cells, which keep it, "\n" alone in JSON lines."""
    return "" if path.suffix in (".csv", ".tsv") else "\n"


def _lines(file: TextIO, table: str, set_aside: list[SetAside]) -> Iterator[tuple[int, str]]:
    """(number, line) of a text; lines longer than MOST_JSON letters are set aside unread."""
    number = 0
    while line := file.readline(MOST_JSON):
        number += 1
        if len(line) < MOST_JSON or line.endswith("\n"):
            yield number, line
            continue
        while line and not line.endswith("\n"):
            line = file.readline(MOST_JSON)
        set_aside.append(SetAside(f"{table}:{number}", f"the line is longer than {MOST_JSON / 1e6:g} MB"))


class _Swallowed(Exception):
    """A quotation mark is not closed before the next row."""


@dataclass
class _Records:
    """Records of a table of cells; one whose quotation mark takes in the next row ends with its line."""

    lines: Iterator[tuple[int, str]]
    delimiter: str
    again: deque[tuple[int, str]] = field(default_factory=deque)
    taken: list[tuple[int, str]] = field(default_factory=list)
    is_over: bool = False

    def next(self) -> tuple[int, list[str]] | None:
        """(line, cells) of the next record, None at the end.

        Raises:
            _Swallowed, csv.Error: of the line `taken[0]`, after which the next record begins.
        """
        self.taken = []
        try:
            cells = next(csv.reader(self._feed(), delimiter=self.delimiter), None)
            if self.is_over and len(self.taken) > 1:
                lines = [line for _, line in self.taken]
                list(csv.reader(lines, delimiter=self.delimiter, strict=True))
        except (_Swallowed, csv.Error):
            self.again.extendleft(reversed(self.taken[1:]))
            self.is_over = False
            raise
        return None if cells is None else (self.taken[0][0], cells)

    def _feed(self) -> Iterator[str]:
        while True:
            item = self.again.popleft() if self.again else next(self.lines, None)
            if item is None:
                self.is_over = True
                return
            self.taken.append((item[0], item[1].replace("\0", "")))
            if len(self.taken) > 1 and ROW.search(item[1]):
                raise _Swallowed
            yield self.taken[-1][1]


ENDING = "|".join(map(re.escape, PICTURES + CLIPS))
ROW = re.compile(
    r"""(?:^|[,\t]){cell}[,\t]|[,\t]{cell}\r?\n?$""".format(
        cell=rf"""(?:[^",\t\n]+(?:{ENDING})|"[^"\t\n]+(?:{ENDING})")"""
    ),
    re.IGNORECASE,
)
"""A line of a table of cells that names a picture in a cell of its own."""


def _comma_separated(
    path: Path, table: str, file: TextIO, set_aside: list[SetAside]
) -> Iterator[tuple[int, dict[str, Any], str]]:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    records = _Records(_lines(file, table, set_aside), delimiter)
    header: list[str] = []
    while True:
        try:
            record = records.next()
        except (_Swallowed, csv.Error) as problem:
            if not header:
                raise Refused(
                    f"{path}: its first line is no CSV. Write file_name{delimiter}caption."
                ) from problem
            reason = "a quotation mark in it is not closed; close it, or write it twice within quotes"
            if isinstance(problem, csv.Error) and "end of data" not in str(problem):
                reason = f"it is no CSV, or its quotation marks do not match: {problem}"
            set_aside.append(SetAside(f"{table}:{records.taken[0][0]}", reason))
            continue
        if record is None:
            return
        number, cells = record
        if not cells:
            continue
        if not header:
            header = cells
            _check_separator(path, header)
            continue
        yield number, *_columns(header, cells, delimiter)


def _check_separator(path: Path, header: Sequence[str]) -> None:
    """Raises Refused for a table whose cells are separated by something else."""
    named = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars"}
    found = next((one for one in named if len(header) == 1 and one in header[0]), "")
    if found:
        own = "tabs" if path.suffix == ".tsv" else "commas"
        raise Refused(
            f"{path} is separated by {named[found]}, not by {own}: its first line is "
            f'"{printable(header[0])}". '
            f"Save it with {own}{', or call it metadata.tsv' if found == chr(9) else ''}."
        )


def _columns(header: Sequence[str], cells: list[str], delimiter: str) -> tuple[dict[str, Any], str]:
    """A row by its columns' names, or as far as it can be trusted with the reason why it cannot be used.

    A caption that was not put in quotes is cut into cells at its commas; in the last column they are joined.
    """
    place = next((header.index(name) for name in CAPTION_COLUMNS if name in header), None)
    if len(cells) > len(header) and any(cells[len(header) :]) and place is not None:
        if place < len(header) - 1:
            sign = "tabs" if delimiter == "\t" else "commas"
            reason = (
                f"its row has {len(cells)} cells, but the first line names {len(header)}: put captions that "
                f"have {sign} in them into quotation marks"
            )
            return {name: cells[i] if i < place else None for i, name in enumerate(header)}, reason
        cells = [*cells[:place], delimiter.join(cells[place:])]
    return {name: cells[i] if i < len(cells) else None for i, name in enumerate(header)}, ""


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as missing:
        raise Refused(
            f"{path} is read with pyarrow, which is not installed: pip install pyarrow"
        ) from missing
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as problem:  # pyarrow's own errors are both
        raise Refused(f"{path} is no Parquet file that can be read: {problem}") from problem
