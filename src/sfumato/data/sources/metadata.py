"""Metadata: captions and columns from metadata.jsonl, .csv and .parquet and from files beside a picture.

A row that cannot be used is set aside with its reason; a table that cannot be used is refused.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sfumato.data.sources.media import CLIPS, PICTURES
from sfumato.data.sources.sample import HELD_OUT, TRAIN, SetAside
from sfumato.errors import Refused, nearest, printable

FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.tsv")
FILE_COLUMNS = ("file_name", "file", "image", "path", "video")
CAPTION_COLUMNS = ("caption", "text", "captions", "prompt")
SPLITS = {
    "train": TRAIN,
    "training": TRAIN,
    "test": HELD_OUT,
    "held_out": HELD_OUT,
    "held-out": HELD_OUT,
    "validation": HELD_OUT,
    "valid": HELD_OUT,
    "val": HELD_OUT,
    "dev": HELD_OUT,
}
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
LONGEST_CAPTION = 20_000
csv.field_size_limit(10_000_000)


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read: where captions come from, and which columns of the user's own are companions."""

    captions: str = "files"
    companions: tuple[str, ...] = ()


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
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
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
    for number, row in rows:
        file_cell = row.get(file_column)
        if not isinstance(file_cell, str) or not file_cell:
            set_aside.append(SetAside(f"{table}:{number}", "the row names no file"))
            continue
        yield _row(table, file_cell, row, caption_column or "", options.companions)


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
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 19:
        return int(value)
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


def sidecar(path: Path) -> tuple[tuple[str, ...], str]:
    """Captions from a .txt (one a line) or .json file beside a picture, or the reason why there are none."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as problem:
        return (), f"its caption file cannot be opened: {problem.strerror}"
    if path.suffix != ".json":
        return captions_of(text.splitlines() or [""])
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return (), "the .json beside it is not JSON"
    if isinstance(value, dict):
        value = next((value[name] for name in CAPTION_COLUMNS if name in value), None)
    return captions_of(value)


def _rows(path: Path, table: str, set_aside: list[SetAside]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, columns) of every row that can be parsed."""
    if path.suffix == ".parquet":
        yield from enumerate(_parquet(path), start=1)
        return
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as problem:
        raise Refused(f"{path} cannot be opened: {problem.strerror}.") from problem
    if path.suffix in (".csv", ".tsv"):
        yield from _comma_separated(path, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield number, row
        else:
            set_aside.append(SetAside(f"{table}:{number}", "the line is not a JSON object"))


def _comma_separated(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    text = text.replace("\0", "")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        for row in reader:
            yield reader.line_num, {key: value for key, value in row.items() if isinstance(key, str)}
    except csv.Error as problem:
        raise Refused(f"{path}, line {reader.line_num}, is no CSV: {problem}.") from problem


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
