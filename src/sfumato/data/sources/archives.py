"""Archives: tar shards and arrays as sources; their pictures are read where they lie."""

import json
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from sfumato.data.sources import metadata, tables
from sfumato.data.sources.metadata import SourceOptions
from sfumato.data.sources.sample import Collection, Picture, Sample, SetAside
from sfumato.errors import Refused
from sfumato.readers import media

MOST_CLASSES = 100_000

Kind = Callable[[Path, SourceOptions], Collection]


def find_reader(root: Path) -> Kind | None:
    """What reads this path, if it is an archive of some kind; None for a plain folder."""
    if root.is_file():
        return {".tar": tars, ".npz": arrays, ".parquet": tables.parquet}.get(root.suffix.lower())
    if (root / "dataset_info.json").exists() and (root / "state.json").exists():
        return tables.saved
    if (root / "dataset_dict.json").exists():
        return tables.saved
    names = [path.suffix.lower() for path in root.iterdir() if not path.name.startswith(".")]
    if any(suffix in media.PICTURES + media.CLIPS for suffix in names):
        return None
    if ".tar" in names or ".npz" in names:
        return tars if ".tar" in names else _folder_of_arrays
    return tables.parquet if tables.is_folder_of_parquet(root) else None


def tars(root: Path, options: SourceOptions) -> Collection:
    """Tar shards in the webdataset layout: members of one stem are one sample. Never unpacked."""
    result = Collection(root.stem, [])
    base = (root if root.is_dir() else root.parent).resolve()
    for path in [root] if root.is_file() else sorted(root.glob("*.tar")):
        if not path.resolve().is_relative_to(base):
            result.set_aside.append(SetAside(path.name, "refused: outside the data folder"))
            continue
        try:
            _one_tar(path, options, result)
        except (tarfile.TarError, OSError, EOFError) as problem:
            result.set_aside.append(SetAside(path.name, f"the archive is broken: {problem}"))
    return result


def _one_tar(path: Path, options: SourceOptions, result: Collection) -> None:
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isfile():
                stem, _, suffix = PurePosixPath(member.name).name.partition(".")
                parent = str(PurePosixPath(member.name).parent)
                groups.setdefault(f"{parent}/{stem}", {})["." + suffix.lower()] = member
        for members in groups.values():
            picture = next(
                (members[suffix] for suffix in media.PICTURES + media.CLIPS if suffix in members), None
            )
            if picture is None:
                continue
            name = f"{path.name}/{picture.name}"
            found, reason = _tar_captions(archive, members) if options.captions == "files" else (("",), "")
            label = _label(archive, members)
            if options.captions == "folder":
                found, reason, label = _class(archive, members)
            if reason:
                result.set_aside.append(SetAside(metadata.printable(name), reason))
                continue
            others = _beside_in_tar(path, members, options)
            read = partial(_slice, path, picture.offset_data, picture.size)
            result.samples.append(Sample(name, found, picture=read, label=label, split="", companions=others))


def _beside_in_tar(
    path: Path, members: dict[str, tarfile.TarInfo], options: SourceOptions
) -> dict[str, Picture]:
    """Members called STEM.control.png, STEM.mask.png and the like."""
    found: dict[str, Picture] = {}
    for suffix, member in members.items():
        what, _, kind = suffix[1:].rpartition(".")
        what = what if what in options.companions else metadata.COMPANIONS.get(what, "")
        if what and f".{kind}" in media.PICTURES + media.CLIPS:
            found[what] = partial(_slice, path, member.offset_data, member.size)
    return found


def _slice(path: Path, begin: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(length)


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    return "" if file is None else file.read().decode("utf-8-sig", "surrogateescape")


def _tar_captions(
    archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]
) -> tuple[tuple[str, ...], str]:
    for suffix in (".txt", ".caption"):
        if suffix in members:
            return metadata.captions_of(_member(archive, members[suffix]).splitlines() or [""])
    if ".json" not in members:
        return (), "no caption: no .txt or .json of its name in the archive"
    try:
        value: Any = json.loads(_member(archive, members[".json"]))
    except (ValueError, RecursionError):
        return (), "its .json is not JSON"
    if isinstance(value, dict):
        value = next((value[name] for name in metadata.CAPTION_COLUMNS if name in value), None)
    return metadata.captions_of(value)


def _label(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> int | None:
    if ".cls" in members:
        return metadata.class_number(_member(archive, members[".cls"]))
    if ".json" not in members:
        return None
    try:
        parsed: Any = json.loads(_member(archive, members[".json"]))
    except (ValueError, RecursionError):
        return None  # said where its captions are read
    found = [parsed.get(name) for name in metadata.LABELS] if isinstance(parsed, dict) else []
    return next((number for one in found if (number := metadata.class_number(one)) is not None), None)


def _class(
    archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo]
) -> tuple[tuple[str, ...], str, int | None]:
    if ".cls" not in members:
        return (), "no class: no .cls of its name in the archive", None
    text = _member(archive, members[".cls"]).strip()
    return (text,), "", int(text) if text.isdecimal() else None


def arrays(root: Path, options: SourceOptions) -> Collection:
    """An .npz of pictures [N, H, W] or [N, H, W, C] (uint8), with labels [N] and perhaps captions or classes.

    Raises:
        Refused: it has no such array, or is no .npz. Arrays of Python objects are never loaded.
    """
    try:
        with np.load(root, allow_pickle=False) as file:
            named = {name: file[name] for name in file.files}
        if strange := [name for name, array in named.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f'"{strange[0]}" is no array')
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as problem:
        raise Refused(f"{root} is no .npz of plain arrays: {problem}") from problem
    shapes = ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in named.items())
    drawn = {
        name: a
        for name, a in named.items()
        if a.dtype == np.uint8 and a.ndim in (3, 4) and _is_pictures(a.shape)
    }
    beside = {what: drawn[name] for name in drawn if (what := _what(name, options))}
    pictures = next((a for name, a in drawn.items() if not _what(name, options)), None)
    if pictures is None:
        raise Refused(f"{root} has no pictures: uint8 [N, H, W] or [N, H, W, 3] is wanted; it has {shapes}.")
    others = {name: a for name, a in named.items() if a.shape[:1] == pictures.shape[:1] and a.ndim == 1}
    labels = next((a for a in others.values() if a.dtype.kind in "iu"), None)
    texts = next((a for a in others.values() if a.dtype.kind == "U"), None)
    classes = _class_names(root, named, labels)
    if options.captions == "files" and texts is None and labels is None:
        raise Refused(
            f"{root} has neither captions nor labels of its {len(pictures)} pictures; it has {shapes}. "
            'Set data.captions = "none" to train without.'
        )
    result = Collection(root.stem, [], classes=classes)
    for index in range(len(pictures)):
        label = None if labels is None or labels[index] < 0 else int(labels[index])
        caption = str(texts[index]) if texts is not None else "" if label is None else classes[label]
        name = f"{root.name}/{index:08d}"
        if not caption and options.captions != "none":
            result.set_aside.append(SetAside(name, "no caption and no class"))
            continue
        read = partial(_array_picture, pictures, index)
        companions: dict[str, Picture] = {
            what: partial(_array_picture, array, index)
            for what, array in beside.items()
            if len(array) == len(pictures)
        }
        result.samples.append(
            Sample(name, (caption,), picture=read, label=label, split="", companions=companions)
        )
    return result


def _is_pictures(shape: tuple[int, ...]) -> bool:
    """Whether an array is of pictures: [N, H, W], or [N, H, W, C] with 1, 3 or 4 channels."""
    return shape[:1] > (0,) and (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3, 4)))


def _folder_of_arrays(root: Path, options: SourceOptions) -> Collection:
    """The .npz files of a folder, as one; of train.npz and test.npz the names say the split."""
    whole = Collection(root.name, [])
    for path in sorted(root.glob("*.npz")):
        if not path.resolve().is_relative_to(root.resolve()):
            whole.set_aside.append(SetAside(path.name, "refused: outside the data folder"))
            continue
        part = arrays(path, options)
        split = metadata.SPLITS.get(path.stem.lower(), "")
        whole.samples += [replace(one, split=split) for one in part.samples]
        whole.classes = max(whole.classes, part.classes, key=len)
    return whole


def _what(column: str, options: SourceOptions) -> str:
    """The companion that a column of pictures is, "" for none."""
    return metadata.companion(column, "any.png", options.companions)


def _class_names(root: Path, named: dict[str, np.ndarray], labels: np.ndarray | None) -> list[str]:
    """Names of the classes: an array of texts in the file, classes.json beside it, else their numbers."""
    count = 0 if labels is None else int(labels.max()) + 1
    if count > MOST_CLASSES:
        raise Refused(
            f"{root}: its labels go up to {count - 1:,}, and classes are numbered from 0. Number them anew."
        )
    inside = next((a for n, a in named.items() if n in ("classes", "names") and a.dtype.kind == "U"), None)
    if inside is not None and len(inside) >= count:
        return [str(one) for one in inside]
    beside = root.parent / "classes.json"
    if beside.is_file() and beside.resolve().is_relative_to(root.parent.resolve()):
        try:
            listed = json.loads(beside.read_bytes())
        except ValueError as problem:
            raise Refused(f"{beside} is not JSON: {problem}") from problem
        if isinstance(listed, dict):
            lists = [listed[name] for name in ("captions", "classes", "names") if name in listed]
            listed = lists[0] if lists else [listed.get(str(i), str(i)) for i in range(count)]
        if isinstance(listed, list) and len(listed) >= count:
            return [str(one) for one in listed]
    return [str(i) for i in range(count)]


def _array_picture(pictures: np.ndarray, index: int) -> Image.Image:
    one = pictures[index]
    return Image.fromarray(one[..., 0] if one.ndim == 3 and one.shape[-1] == 1 else one)
