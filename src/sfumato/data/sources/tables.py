"""Tables: data sets that Hub libraries save, as Arrow or Parquet files whose cells hold the pictures."""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from sfumato.data.sources import metadata
from sfumato.data.sources.metadata import SourceOptions
from sfumato.data.sources.sample import Collection, Sample, SetAside
from sfumato.data.sources.splits import splits_of
from sfumato.errors import Refused, printable
from sfumato.readers import media

PICTURE_COLUMNS = ("image", "img", "picture", "pixel_values", "video", "clip")
HEAD = 16
MOST_BYTES = 1 << 30  # of Parquet's pictures that stay in memory
MAGIC = {
    b"\x1aE\xdf\xa3": ".webm",
    b"GIF8": ".gif",
    b"\x89PNG": ".png",
    b"\xff\xd8": ".jpg",
}

Reader = Callable[[], bytes]
Cell = Callable[[str, int], Reader | None]
"""(column, row) → what reads the picture there, None where the cell is empty."""


@dataclass(frozen=True)
class TableFile:
    """One file: where it lies in the data set, its columns' types, those without pictures, its cells."""

    inside: str
    schema: Any
    rows: Any
    cell: Cell
    split: str


def saved(root: Path, options: SourceOptions) -> Collection:
    """A Hub data set that `save_to_disk` wrote (Arrow files), read with pyarrow.

    Raises:
        Refused: pyarrow is missing, or the columns are.
    """
    arrow = _pyarrow(root)
    import pyarrow.ipc as ipc

    result = Collection(root.name, [])
    for path in _tables_of_saved(root, result.set_aside):
        inside = path.relative_to(root).as_posix()
        try:
            with arrow.memory_map(str(path)) as mapped:
                table = ipc.open_stream(mapped).read_all()
                table.validate(full=True)  # a cell that points out of the file would end the process
        except (OSError, ValueError) as problem:  # pyarrow's own errors are both
            result.set_aside.append(SetAside(inside, f"no Arrow file that can be read: {problem}"))
            continue
        ((split, _),) = splits_of([inside])

        def cell(column: str, row: int, table: Any = table) -> Reader | None:
            return partial(_cell, table[column], row) if table[column][row].is_valid else None

        _add(TableFile(inside, table.schema, table, cell, split), options, result)
    return result


def _tables_of_saved(root: Path, set_aside: list[SetAside]) -> list[Path]:
    """The Arrow files of a saved data set: those that the state.json beside them lists, no caches.

    Without such a list (older versions of the library) all that are no caches.
    """
    found: list[Path] = []
    listed: dict[Path, set[str] | None] = {}
    for path in sorted(root.rglob("*.arrow")):
        inside = path.relative_to(root).as_posix()
        if path.parent not in listed:
            listed[path.parent] = _files_of_state(path.parent, root, set_aside)
        files = listed[path.parent]
        if not path.resolve().is_relative_to(root.resolve()):
            set_aside.append(SetAside(inside, "refused: outside the data folder"))
        elif path.name in files if files is not None else not path.name.startswith("cache-"):
            found.append(path)
        else:
            set_aside.append(SetAside(inside, "a cache of the datasets library, no part of the saved set"))
    for folder, files in listed.items():
        for name in sorted((files or set()) - {path.name for path in folder.glob("*.arrow")}):
            inside = (folder / name).relative_to(root).as_posix()
            set_aside.append(SetAside(printable(inside), "state.json lists it, but it is not there"))
    return found


def _files_of_state(folder: Path, root: Path, set_aside: list[SetAside]) -> set[str] | None:
    """The names of the files that a folder's state.json lists; None where it lists none."""
    state = folder / "state.json"
    if not state.is_file() or not state.resolve().is_relative_to(root.resolve()):
        return None
    inside = state.relative_to(root).as_posix()
    try:
        said = json.loads(metadata.bounded_text(state))
        names = [one["filename"] for one in said["_data_files"]] if said.get("_data_files") else None
        indices = said.get("_indices_files") or said.get("_indices_data_files")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as problem:
        raise Refused(
            f"{state} is not what save_to_disk writes ({type(problem).__name__}: {problem}). "
            "Save the set again."
        ) from problem
    if indices:
        set_aside.append(
            SetAside(inside, "its rows were chosen and ordered by an index, which is not read: all rows are")
        )
    return None if names is None else {PurePosixPath(str(name)).name for name in names}


def parquet(root: Path, options: SourceOptions) -> Collection:
    """Parquet files whose cells hold the pictures, as the Hub keeps data sets; a file's name says its split.

    Raises:
        Refused: pyarrow is missing, a file is no Parquet, or the columns are missing.
    """
    _pyarrow(root)
    import pyarrow.parquet as pq

    result = Collection(root.stem, [])
    base = (root if root.is_dir() else root.parent).resolve()
    result.set_aside += metadata.others_beside(root, ".parquet")
    names = [root.name] if root.is_file() else list(metadata.files_below(root))
    for inside in (name for name in names if name.lower().endswith(".parquet")):
        path = root if root.is_file() else root / inside
        if not metadata.lies_inside(path.resolve(), base):
            result.set_aside.append(SetAside(inside, "refused: outside the data folder"))
            continue
        try:
            schema = pq.ParquetFile(path).schema_arrow
            columns = [name for name in schema.names if not _holds_pictures(schema.field(name).type)]
            table = pq.read_table(path, columns=columns)
        except (OSError, ValueError) as problem:  # pyarrow's own errors are both
            result.set_aside.append(SetAside(inside, f"no Parquet file that can be read: {problem}"))
            continue
        ((split, _),) = splits_of([inside])

        def cell(column: str, row: int, path: Path = path) -> Reader | None:
            return partial(_parquet_cell, path, column, row)

        _add(TableFile(inside, schema, table, cell, split), options, result)
    return result


def _add(table: TableFile, options: SourceOptions, result: Collection) -> None:
    """The rows of one table as samples.

    Raises:
        Refused: it has no column of pictures, or none of captions.
    """
    names = table.schema.names
    holds = [name for name in names if _holds_pictures(table.schema.field(name).type)]
    pictures_of = [options.image] if options.image else PICTURE_COLUMNS
    picture = next((name for name in pictures_of if name in holds), None)
    texts_of = [options.caption] if options.caption else metadata.CAPTION_COLUMNS
    text = next((name for name in texts_of if name in names), None)
    label = next((name for name in metadata.LABELS if name in names), None)
    classes = _class_names(table.schema, label)
    companion_columns = {
        column: what for column in holds if column != picture and (what := _what(column, options))
    }
    if picture is None or (options.captions == "files" and text is None and not classes):
        wanted = options.image or "image" if picture is None else options.caption or "caption or text"
        raise Refused(f"{table.inside} has no column {wanted}; it has {', '.join(names)}.")
    result.classes = max(result.classes, classes, key=len)
    texts = table.rows[text].to_pylist() if text else None
    labels = table.rows[label].to_pylist() if label else None
    for row in range(table.rows.num_rows):
        number, read = labels[row] if labels else None, table.cell(picture, row)
        name = f"{table.inside}/{row:08d}{_ending(read, picture in ('video', 'clip'))}"
        found, reason = _captions(options, texts and texts[row], number, classes, text is not None)
        if reason or read is None:
            result.set_aside.append(SetAside(name, reason or "there is no picture"))
            continue
        others = {what: table.cell(column, row) for column, what in companion_columns.items()}
        companions = {what: other for what, other in others.items() if other is not None}
        whole = number if isinstance(number, int) else None
        result.samples.append(
            Sample(name, found, picture=read, split=table.split, label=whole, companions=companions)
        )


def _captions(
    options: SourceOptions, text: Any, number: Any, classes: Sequence[str], has_text: bool
) -> tuple[tuple[str, ...], str]:
    """A row's captions, or why it has none."""
    if options.captions == "none":
        return ("",), ""
    if options.captions == "files" and has_text:
        return metadata.captions_of(text)
    if not isinstance(number, int | str):
        return (), "no class"
    return (classes[number] if isinstance(number, int) and 0 <= number < len(classes) else str(number),), ""


def _what(column: str, options: SourceOptions) -> str:
    """The companion that a column of pictures is, "" for none."""
    return metadata.companion(column, "any.png", options.companions)


def _class_names(schema: Any, label: str | None) -> list[str]:
    """The names of the classes, where the data set's own description of its columns says them."""
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = described["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(one) for one in names] if isinstance(names, list) else []


def _ending(read: Reader | None, video: bool) -> str:
    """What kind of clip a cell of a column of videos holds, as a file name's ending; "" for a picture."""
    if not video or read is None:
        return ""
    try:
        head = read()[:HEAD]
    except media.Unreadable:
        return ".mp4"
    known = next((ending for magic, ending in MAGIC.items() if head.startswith(magic)), "")
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return known or (".webp" if webp else ".avif" if head[4:12] == b"ftypavis" else ".mp4")


def _holds_pictures(kind: Any) -> bool:
    """Whether a column's type is that of pictures: their bytes, or a struct that holds them."""
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _cell(column: Any, row: int) -> bytes:
    return _bytes_of(column[row].as_py())


def _parquet_cell(path: Path, column: str, row: int) -> bytes:
    group, first = _group_of(path, row)
    return _bytes_of(_pictures_of(path, column, group)[row - first].as_py())


@lru_cache(maxsize=1024)
def _starts(path: Path) -> list[int]:
    """The first row of each row group of a Parquet file."""
    import pyarrow.parquet as pq

    footer, starts = pq.ParquetFile(path).metadata, [0]
    for group in range(footer.num_row_groups):
        starts.append(starts[-1] + footer.row_group(group).num_rows)
    return starts


def _group_of(path: Path, row: int) -> tuple[int, int]:
    """(row group, its first row) that holds a row."""
    starts = _starts(path)
    group = next(i for i in range(len(starts) - 1) if row < starts[i + 1])
    return group, starts[group]


class _Groups:
    """Columns of pictures of whole row groups, the last read first, as many as MOST_BYTES hold."""

    def __init__(self) -> None:
        self.held: OrderedDict[tuple[Path, str, int], Any] = OrderedDict()
        self.lock = Lock()

    def __call__(self, path: Path, column: str, group: int) -> Any:
        import pyarrow.parquet as pq

        with self.lock:
            key = (path, column, group)
            if key not in self.held:
                self.held[key] = pq.ParquetFile(path).read_row_group(group, columns=[column])[column]
            self.held.move_to_end(key)
            while len(self.held) > 1 and sum(one.nbytes for one in self.held.values()) > MOST_BYTES:
                self.held.popitem(last=False)
            return self.held[key]


_pictures_of = _Groups()


def _bytes_of(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        named = isinstance(value, dict) and value.get("path")
        raise media.Unreadable(
            "the data set names a file instead of holding the picture" if named else "there is no picture"
        )
    return data


def _pyarrow(root: Path) -> Any:
    try:
        import pyarrow
    except ImportError as missing:
        raise Refused(
            f"{root} is read with pyarrow, which is not installed: pip install pyarrow"
        ) from missing
    return pyarrow
