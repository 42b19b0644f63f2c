"""Archives: tar shards and arrays as sources; their pictures are read where they lie."""

import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import psutil
from PIL import Image

from sfumato.data.sources import metadata, splits, tables
from sfumato.data.sources.metadata import SourceOptions
from sfumato.data.sources.sample import Collection, Picture, Sample, SetAside
from sfumato.errors import Refused, printable
from sfumato.readers import media

MOST_CLASSES = 100_000
TEXTS = (".txt", ".caption", ".json")
BOMB_BYTES, BOMB_RATIO = (
    1 << 28,
    100,
)  # what an .npz may unpack to, unless it was no more than so many times packed

Kind = Callable[[Path, SourceOptions], Collection]


def find_reader(root: Path) -> Kind | None:
    """What reads this path, if it is an archive of some kind; None for a plain folder."""
    if root.is_file():
        return {".tar": tars, ".npz": arrays, ".parquet": tables.parquet}.get(root.suffix.lower())
    if (root / "dataset_info.json").exists() and (root / "state.json").exists():
        return tables.saved
    if (root / "dataset_dict.json").exists():
        return tables.saved
    names = {path.suffix.lower() for path in root.iterdir() if not path.name.startswith(".")}
    if any(suffix in media.PICTURES + media.CLIPS for suffix in names):
        return None
    if not names & {".tar", ".npz"}:
        names = _endings_below(root)
    if names & {".tar", ".npz"}:
        return tars if ".tar" in names else _folder_of_arrays
    return tables.parquet if ".parquet" in names else None


def _endings_below(root: Path) -> set[str]:
    """Which archives and tables of pictures lie below a folder; none where a picture or clip does."""
    found: set[str] = set()
    for name in metadata.files_below(root):
        if name.lower().endswith(media.PICTURES + media.CLIPS):
            return set()
        if PurePosixPath(name).name not in metadata.FILES:
            found.add(PurePosixPath(name).suffix.lower())
    return found


def _own_files(root: Path, ending: str) -> list[tuple[str, Path]]:
    """(name in the data set, file) of the files of one kind that `root` is, or that lie below it."""
    if root.is_file():
        return [(root.name, root)]
    return [(name, root / name) for name in metadata.files_below(root) if name.lower().endswith(ending)]


def tars(root: Path, options: SourceOptions) -> Collection:
    """Tar shards in the webdataset layout: members of one stem are one sample. Never unpacked."""
    result = Collection(root.stem, [])
    base = (root if root.is_dir() else root.parent).resolve()
    result.set_aside += metadata.others_beside(root, ".tar")
    for inside, path in _own_files(root, ".tar"):
        if not metadata.lies_inside(path.resolve(), base):
            result.set_aside.append(SetAside(inside, "refused: outside the data folder"))
            continue
        try:
            _one_tar(path, inside, options, result)
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError) as problem:
            result.set_aside.append(SetAside(inside, f"the archive is broken: {problem}"))
    found = splits.by_path([one.name for one in result.samples])
    result.samples = [
        replace(one, split=split) for one, (split, _) in zip(result.samples, found, strict=True)
    ]
    return result


Members = dict[str, tarfile.TarInfo]
"""Members of one sample by their endings."""


def _one_tar(path: Path, inside: str, options: SourceOptions, result: Collection) -> None:
    with tarfile.open(path, "r:") as archive:
        for key, members in _grouped(archive, inside, options, result.set_aside).items():
            endings = [ending for ending in media.PICTURES + media.CLIPS if ending in members]
            if not endings:
                _name_unread(inside, key, members, result.set_aside)
                continue
            picture = members[endings[0]]
            name = f"{inside}/{picture.name}"
            for other in (*endings[1:], *(one for one in members if media.unread_kind(one))):
                reason = media.unread_kind(other) or f"a second picture beside {picture.name}, which is used"
                shown = printable(f"{inside}/{members[other].name}")
                result.set_aside.append(SetAside(shown, printable(reason)))
            found, reason = _tar_captions(archive, members) if options.captions == "files" else (("",), "")
            label = _label(archive, members)
            if options.captions == "folder":
                found, reason, label = _class(archive, members)
            if reason:
                result.set_aside.append(SetAside(printable(name), reason))
                continue
            others = _beside_in_tar(path, members, options)
            read = partial(_slice, path, picture.offset_data, picture.size)
            result.samples.append(Sample(name, found, picture=read, label=label, split="", companions=others))


def _grouped(
    archive: tarfile.TarFile, inside: str, options: SourceOptions, set_aside: list[SetAside]
) -> dict[str, Members]:
    """Members by the sample they belong to: up to the first dot of their names, as webdataset has it.

    What follows that dot may be no ending that is known ("cat v1.5.png"): then the last dot counts. A picture
    without texts of its own takes those of the first dot's sample ("dog.left.png", "dog.txt"), unless that
    has a picture too, which it is a further picture of.
    """
    groups: dict[str, Members] = {}
    dotted: list[tuple[str, str, Members]] = []  # key by the first dot, key by the last one
    place: dict[str, Members] = {}
    for member in archive:
        path = PurePosixPath(member.name)
        if not member.isfile():
            if not member.isdir():
                shown = printable(f"{inside}/{member.name}")
                set_aside.append(SetAside(shown, "a link or a device, no file"))
            continue
        if path.suffix.lower() in TEXTS and path.stem.lower().endswith(media.PICTURES + media.CLIPS):
            path = path.with_name(f"{PurePosixPath(path.stem).stem}{path.suffix}")  # of 1.png.txt the .png
        stem, _, suffix = path.name.partition(".")
        first, last = f"{path.parent}/{stem}", f"{path.parent}/{path.stem}"
        if "." not in suffix or _is_companion(f".{suffix.lower()}", options):
            groups.setdefault(first, {})["." + suffix.lower()] = member
            continue
        if last not in place:
            place[last] = {}
            dotted.append((first, last, place[last]))
        place[last][path.suffix.lower()] = member
    owners = {first: groups.get(first, {}) for first, _, _ in dotted}
    for first, last, members in dotted:
        owner = owners[first]
        own = next((owner[ending] for ending in media.PICTURES + media.CLIPS if ending in owner), None)
        pictures = [ending for ending in members if ending in media.PICTURES + media.CLIPS]
        if own is None or (pictures and members.keys() & set(TEXTS)):
            texts = {ending: one for ending, one in owner.items() if ending in (*TEXTS, ".cls")}
            if pictures and len(texts) == len(owner):
                groups.pop(first, None)  # they are this one's
            groups[last] = {**(texts if pictures else {}), **members}
        for ending in pictures if last not in groups else ():
            reason = (
                f"a further picture of {printable(str(own and own.name))}; name it in "
                "data.condition_columns to use it"
            )
            shown = printable(f"{inside}/{members[ending].name}")
            set_aside.append(SetAside(shown, reason))
    return groups


def _is_companion(suffix: str, options: SourceOptions) -> bool:
    """Whether ".control.png" or the like names a further picture that is known."""
    what, _, kind = suffix[1:].rpartition(".")
    return (what in options.companions or what in metadata.COMPANIONS) and f".{kind}" in (
        media.PICTURES + media.CLIPS
    )


def _name_unread(inside: str, key: str, members: Members, set_aside: list[SetAside]) -> None:
    """Set aside what is no sample, by the name of one of its members."""
    foreign = [(member, kind) for ending, member in members.items() if (kind := media.unread_kind(ending))]
    member, reason = foreign[0] if foreign else (next(iter(members.values())), "")
    reason = reason or f"there is no picture beside it: only {', '.join(sorted(members))}"
    set_aside.append(SetAside(printable(f"{inside}/{member.name}"), reason))


def _beside_in_tar(path: Path, members: Members, options: SourceOptions) -> dict[str, Picture]:
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
        whole = file.seek(0, os.SEEK_END)  # a header may claim more than there is
        file.seek(min(begin, whole))
        return file.read(min(length, whole - file.tell()))


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    """The text of a member.

    Raises:
        ValueError: it is longer than a text may be, or UTF-16; the message is the reason.
    """
    most = metadata.MOST_JSON if member.name.lower().endswith(".json") else metadata.MOST_TEXT
    if member.size > most:
        raise ValueError(f"longer than {most / 1e6:g} MB")
    file = archive.extractfile(member)
    return "" if file is None else metadata.decoded(file.read(most + 1), most)


def _tar_captions(archive: tarfile.TarFile, members: Members) -> tuple[tuple[str, ...], str]:
    for suffix in TEXTS:
        if suffix not in members:
            continue
        try:
            text = _member(archive, members[suffix])
        except ValueError as problem:
            return (), f"its {suffix} is {problem}"
        if suffix == ".json":
            return metadata.captions_of_json(text, "its .json")
        return metadata.captions_of(text.splitlines() or [""])
    return (), "no caption: no .txt or .json of its name in the archive"


def _label(archive: tarfile.TarFile, members: Members) -> int | None:
    try:
        if ".cls" in members:
            return metadata.class_number(_member(archive, members[".cls"]))
        parsed: Any = json.loads(_member(archive, members[".json"])) if ".json" in members else None
    except (ValueError, RecursionError):
        return None  # said where its captions are read
    found = [parsed.get(name) for name in metadata.LABELS] if isinstance(parsed, dict) else []
    return next((number for one in found if (number := metadata.class_number(one)) is not None), None)


def _class(archive: tarfile.TarFile, members: Members) -> tuple[tuple[str, ...], str, int | None]:
    if ".cls" not in members:
        return (), "no class: no .cls of its name in the archive", None
    try:
        text = _member(archive, members[".cls"]).strip()
    except ValueError as problem:
        return (), f"its .cls is {problem}", None
    found, reason = metadata.captions_of(text)
    if not reason and text.isdecimal() and metadata.class_number(text) is None:
        return (), f"its .cls is a number of {len(text)} digits", None
    return found, reason.replace("caption", "class"), metadata.class_number(text)


def arrays(root: Path, options: SourceOptions) -> Collection:
    """An .npz of pictures [N, H, W] or [N, H, W, C] (uint8), with labels [N] and perhaps captions or classes.

    Raises:
        Refused: it has no such array, is no .npz, or would not fit into memory. Arrays of Python objects are
            never loaded.
    """
    try:
        _check_unpacked(root)
        with np.load(root, allow_pickle=False) as file:
            named = {name: file[name] for name in file.files}
        if strange := [name for name, array in named.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f'"{strange[0]}" is no array')
    except Refused:
        raise
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


def _check_unpacked(root: Path) -> None:
    """Look at what an .npz unpacks to before any of it is.

    Raises:
        Refused: hardly anything packed as very much, or more than the memory that is free.
    """
    with zipfile.ZipFile(root) as file:
        members = file.infolist()
    whole, packed = sum(one.file_size for one in members), sum(one.compress_size for one in members)
    if whole > BOMB_BYTES and whole > BOMB_RATIO * packed:
        raise Refused(
            f"{root} is a decompression bomb: {packed / 1e6:.0f} MB become {whole / 1e9:.1f} GB. If they "
            "are pictures, save them uncompressed (np.savez), or in several files."
        )
    free = psutil.virtual_memory().available
    if whole > free:
        raise Refused(
            f"{root} unpacks to {whole / 1e9:.1f} GB, but {free / 1e9:.1f} GB of memory are free. Save its "
            "pictures as files, or as .tar shards, which are read one by one."
        )


def _is_pictures(shape: tuple[int, ...]) -> bool:
    """Whether an array is of pictures: [N, H, W], or [N, H, W, C] with 1, 3 or 4 channels."""
    return shape[:1] > (0,) and (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3, 4)))


def _folder_of_arrays(root: Path, options: SourceOptions) -> Collection:
    """The .npz files of a folder, as one; of train.npz and test.npz the names say the split."""
    whole = Collection(root.name, [])
    whole.set_aside += metadata.others_beside(root, ".npz")
    for inside, path in _own_files(root, ".npz"):
        if not path.resolve().is_relative_to(root.resolve()):
            whole.set_aside.append(SetAside(inside, "refused: outside the data folder"))
            continue
        try:
            part = arrays(path, options)
        except Refused as problem:
            whole.set_aside.append(SetAside(inside, str(problem).removeprefix(f"{path} ")))
            continue
        ((split, _),) = splits.splits_of([inside])
        whole.samples += [
            replace(one, split=split, name=inside + one.name.removeprefix(path.name)) for one in part.samples
        ]
        whole.set_aside += [
            replace(one, file=inside + one.file.removeprefix(path.name)) for one in part.set_aside
        ]
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
