"""Sources: a folder, archive or embedded set becomes samples with captions, and a list of what was refused.

Nothing is decoded here; `media` does that later. No name in a metadata file can lead out of the data folder.
"""

import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from sfumato.data.settings import EMBEDDED
from sfumato.data.sources import metadata, splits
from sfumato.data.sources.metadata import SourceOptions
from sfumato.data.sources.sample import HELD_OUT, TRAIN, Collection, Picture, Sample, SetAside
from sfumato.errors import Refused, one_of, printable
from sfumato.readers import media

CAPTIONS = ("files", "folder", "none")
FEW_CAPTIONS = 20  # with fewer different ones, pictures are held out, not captions
OUTSIDE = "refused: outside the data folder"
NOWHERE = "a link that leads nowhere"
SIDECARS = (".txt", ".caption", ".json")


def open_collection(
    path: str | Path,
    captions: str = "files",
    held_out: float = 0.05,
    empty: bool = False,
    companions: Sequence[str] = (),
    image: str = "",
    caption: str = "",
) -> Collection:
    """The samples of a data set, in a fixed order.

    Args:
        path: "openmoji", "openmoji-all", "shapes"; a folder of pictures or clips; a folder of .tar shards or
            one .tar; an .npz of arrays; a Hub data set saved on disk, or its .parquet files.
        captions: "files" (metadata.jsonl, .csv or .parquet, or a .txt or .json beside each picture), "folder"
            (the picture's folder is its class), "none".
        held_out: share of captions kept from training where the data say nothing themselves.
        empty: whether a collection may do of which every file was set aside.
        companions: columns of the user's own that name further pictures; control, reference, mask, depth and
            edit_source are known.
        image, caption: of tables, the columns of pictures and captions, where they have unusual names.
    Raises:
        Refused: nothing there, no pictures, or no captions; the message says what to do.
    """
    one_of("Captions from", captions, CAPTIONS)
    embedded = _embedded().get(str(path))
    if embedded is not None:
        return embedded()
    root = Path(path).expanduser()
    check_is_there(root)
    found = _read(root, SourceOptions(captions, tuple(companions), image, caption))
    found.samples.sort(key=lambda sample: sample.name)
    if captions == "none":
        found.samples = [replace(sample, captions=("",)) for sample in found.samples]
    if not found.samples and (not empty or _lacks_captions(captions, found.set_aside)):
        raise Refused(_nothing_left(root, captions, found.set_aside))
    return replace(found, samples=split_held_out(found.samples, held_out))


def check_source(data: str) -> None:
    """Raises Refused for what cannot be a data set, as far as its name tells."""
    place = Path(data).expanduser()
    if data not in EMBEDDED and not (place.is_dir() or place.suffix.lower() in (".tar", ".npz", ".parquet")):
        raise Refused(
            f"{data} is no folder, .tar, .npz or .parquet. Give --data a folder of pictures, or one of "
            f"{', '.join(EMBEDDED)}."
        )


def check_is_there(root: Path) -> None:
    """Raises Refused where a data set is named that is not there."""
    if not root.exists():
        raise Refused(
            f"{root} does not exist. data.train takes a folder of pictures, a .tar, .npz or .parquet file, "
            f"or one of: {', '.join(_embedded())}."
        )


def concatenate(parts: Sequence[tuple[Collection, float]]) -> Collection:
    """Collections as one, each with its number of repeats."""
    whole = Collection(" + ".join(found.name for found, _ in parts), [])
    for number, (found, repeat) in enumerate(parts):
        prefix = f"{number}-{found.name}"
        whole.samples += [
            replace(one, name=f"{prefix}/{one.name}", repeat=repeat * one.repeat) for one in found.samples
        ]
        whole.set_aside += [SetAside(f"{prefix}/{one.file}", one.reason) for one in found.set_aside]
    return whole


def _embedded() -> dict[str, Callable[[], Collection]]:
    from sfumato.data.sources import openmoji, shapes

    return {
        "openmoji": openmoji.collection,
        "openmoji-all": lambda: openmoji.collection(every=True),
        "shapes": shapes.collection,
    }


def _read(root: Path, options: SourceOptions) -> Collection:
    """Whatever kind of source `root` is."""
    from sfumato.data.sources import archives

    kind = archives.find_reader(root)
    if kind is not None:
        return kind(root, options)
    if not root.is_dir():
        raise Refused(f"{root} is no folder, and no .tar, .npz or .parquet file; data.train cannot read it.")
    return folder(root, options)


def folder(root: Path, options: SourceOptions) -> Collection:
    """The pictures and clips below a folder."""
    files, refused = list_files(root)
    result = Collection(root.name, [], refused)
    refused += [SetAside(printable(name), reason) for name in files if (reason := metadata.why_unread(name))]
    pictures = [name for name in files if name.lower().endswith(media.PICTURES + media.CLIPS)]
    if not pictures and not any(_is_metadata(name) for name in files):
        raise Refused(_why_no_pictures(root, refused))
    if options.captions == "folder":
        _from_folders(root, pictures, result)
    else:
        _from_files(root, files, pictures, options, result)
        _name_classes(result)
    return result


def list_files(root: Path) -> tuple[list[str], list[SetAside]]:
    """Names of all regular files below `root` (with "/", hidden ones left out), and what is refused."""
    base, found, refused = root.resolve(), [], []
    for place, folders, names in os.walk(root, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = PurePosixPath(Path(place).relative_to(root).as_posix())
        for name in [*folders, *sorted(names)]:
            path, shown = Path(place) / name, str(inside / name)
            if name.startswith(".") or (name in folders and not path.is_symlink()):
                continue
            reason = reason_against(path, base)
            if reason is None:
                found.append(shown)
            elif reason and (path.is_symlink() or name.lower().endswith(media.PICTURES + media.CLIPS)):
                refused.append(SetAside(printable(shown), reason))
    return found, refused


def reason_against(path: Path, base: Path) -> str | None:
    """Why a path may not be read: None if it may, "" for a link to a folder that is walked anyway."""
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        return NOWHERE if path.is_symlink() else "there is no such file"
    except (OSError, RuntimeError, ValueError):
        return "a link that leads nowhere, or no possible file name"
    if not metadata.lies_inside(real, base):
        return OUTSIDE
    mode = real.stat().st_mode
    if stat.S_ISDIR(mode):
        return ""
    return None if stat.S_ISREG(mode) else "not a regular file"


def _why_no_pictures(root: Path, refused: Sequence[SetAside]) -> str:
    """The sentence for a folder without a picture that may be read."""
    links = sum(one.reason in (OUTSIDE, NOWHERE) for one in refused)
    if links:
        return (
            f"{root} holds {links} links that lead out of it, and none is followed out of a folder of data. "
            "Copy what they lead to: cp -rL FOLDER COPY, or of the Hub: hf download NAME --repo-type dataset "
            "--local-dir COPY."
        )
    if refused:
        kinds = sorted({one.reason for one in refused})
        return f"{root} holds no picture that is read. Set aside: {'; '.join(kinds[:4])}."
    searched = ", ".join(media.PICTURES + media.CLIPS)
    return f"{root} holds no pictures; it was searched for {searched}."


def _is_metadata(name: str) -> bool:
    return PurePosixPath(name).name in metadata.FILES


def _from_folders(root: Path, pictures: list[str], result: Collection) -> None:
    """Every folder is a class: its name is the caption, its number among the names the label."""
    found = splits.by_path(pictures, classes=True)
    classes = sorted({str(PurePosixPath(rest).parent) for _, rest in found} - {"."})
    if not classes:
        raise Refused(
            f'{root} has no folders inside, and data.captions = "folder" takes class names from them. '
            'Put the pictures of each class into a folder, or set data.captions = "files" or "none".'
        )
    number = {name: index for index, name in enumerate(classes)}
    result.classes = [words(name) for name in classes]
    for name, (split, rest) in zip(pictures, found, strict=True):
        parent = str(PurePosixPath(rest).parent)
        if parent == ".":
            result.set_aside.append(SetAside(printable(name), "it lies in no class folder"))
        else:
            label = number[parent]
            result.samples.append(Sample(name, (words(parent),), file=root / name, label=label, split=split))


def words(name: str) -> str:
    """A folder's name as words: "red_apple/big" → "red apple big"."""
    return " ".join(name.replace("_", " ").replace("/", " ").split())


def _from_files(
    root: Path, files: list[str], pictures: list[str], options: SourceOptions, result: Collection
) -> None:
    """Captions from metadata files where there are any, else from the files beside the pictures."""
    tables = [name for name in files if _is_metadata(name)]
    known = set(files)
    spelled = {unicodedata.normalize("NFC", name): name for name in files}  # macOS writes ü as u and ¨
    folded = {name.casefold(): name for name in files}
    rows: dict[str, list[metadata.Row]] = {}
    for table in tables:
        for row in metadata.read(root, table, result.set_aside, options):
            inside = row.file
            if inside.startswith("/") and Path(inside).is_relative_to(root.absolute()):
                inside = Path(inside).relative_to(root.absolute()).as_posix()
            inside = inside if inside in known else spelled.get(unicodedata.normalize("NFC", inside), "")
            companions = {
                what: one if one in known else spelled.get(unicodedata.normalize("NFC", one), one)
                for what, one in row.companions.items()
            }
            row = row if companions == row.companions else replace(row, companions=companions)
            if inside in known:
                rows.setdefault(inside, []).append(row)
            else:
                reason = _why_unknown(root, row.file, folded)
                result.set_aside.append(SetAside(printable(row.file_cell), reason))
    taken = {inside for some in rows.values() for row in some for inside in row.companions.values()}
    beside = _companions_beside(pictures, options)
    taken |= {other for found in beside.values() for other in found.values()} - set(rows)
    names = sorted((set(pictures) - taken) | set(rows))
    for name, (split, _) in zip(names, splits.by_path(names), strict=True):
        others = {what: root / other for what, other in beside.get(name, {}).items()}
        if name in rows:
            _take(root, name, rows[name], known, options, others, result, split)
        else:
            captions, reason, note = ((), "", "")
            if options.captions != "none":
                captions, reason, note = _beside(root, name, known)
            if note and not reason:
                result.set_aside.append(SetAside(printable(name), note))
            if reason:
                result.set_aside.append(SetAside(printable(name), reason))
            else:
                result.samples.append(
                    Sample(name, captions, file=root / name, split=split, companions=others)
                )


def _companions_beside(pictures: Iterable[str], options: SourceOptions) -> dict[str, dict[str, str]]:
    """Pictures called NAME.control.png, NAME.mask.png and the like, by the picture NAME.… they belong to."""
    by_stem = {str(PurePosixPath(name).with_suffix("")): name for name in pictures}
    found: dict[str, dict[str, str]] = {}
    for stem, name in by_stem.items():
        owner, _, what = stem.rpartition(".")
        what = what if what in options.companions else metadata.COMPANIONS.get(what, "")
        if what and owner in by_stem:
            found.setdefault(by_stem[owner], {})[what] = name
    return found


def _name_classes(result: Collection) -> None:
    """Number the classes that a column names in words; numbers stay as they are."""
    if any(one.label is not None for one in result.samples):
        return
    named = [next((one.extra[c] for c in metadata.LABELS if one.extra.get(c)), "") for one in result.samples]
    result.classes = sorted(set(named) - {""})
    number = {name: index for index, name in enumerate(result.classes)}
    result.samples = [
        replace(one, label=number.get(name)) for one, name in zip(result.samples, named, strict=True)
    ]


def _why_unknown(root: Path, inside: str, folded: Mapping[str, str] | None = None) -> str:
    """Why a file that a metadata row names cannot be taken; `folded` names files by names without case."""
    if inside.startswith("/") or ".." in PurePosixPath(inside).parts:
        return OUTSIDE
    if not inside or "\0" in inside:
        return "the row names no file"
    reason = reason_against(root / inside, root.resolve()) or "not a file that can be read"
    other = (folded or {}).get(inside.casefold())
    return f"{reason}, but {printable(other)}: large and small letters differ" if other else reason


def _take(
    root: Path,
    name: str,
    rows: list[metadata.Row],
    known: set[str],
    options: SourceOptions,
    beside: Mapping[str, Picture],
    result: Collection,
    split: str,
) -> None:
    """One sample from all rows that name its file; equal rows are counted once."""
    captions: list[str] = []
    reasons: list[str] = []
    for row in rows:
        reasons += [row.reason] if row.reason else []
        captions += [caption for caption in row.captions if caption not in captions]
    if not captions and (
        options.captions != "none" or any(not one.startswith("no caption") for one in reasons)
    ):
        result.set_aside.append(SetAside(printable(name), reasons[0] if reasons else "no caption"))
        return
    repeated = sum(row == rows[0] for row in rows[1:])
    if repeated:
        reason = f"listed {repeated + 1} times with one caption; used once"
        result.set_aside.append(SetAside(printable(name), reason))
    first = rows[0]
    for what, inside in first.companions.items():
        if inside not in known:
            reason = f"its {what} {printable(inside)}: {_why_unknown(root, inside)}"
            result.set_aside.append(SetAside(printable(name), reason))
            return
    result.samples.append(
        Sample(
            name,
            tuple(captions),
            file=root / name,
            split=first.split or split,
            label=first.label,
            companions={**beside, **{what: root / inside for what, inside in first.companions.items()}},
            extra=first.extra,
        )
    )


def _beside(root: Path, name: str, known: set[str]) -> tuple[tuple[str, ...], str, str]:
    """Captions from the file beside a picture, the reason why there are none, and a note on them."""
    stem = str(PurePosixPath(name).with_suffix(""))
    for suffix in SIDECARS:
        for candidate in (stem + suffix, name + suffix):
            if candidate in known:
                return metadata.sidecar(root / candidate)
    return (), "no caption: no row in a metadata file, no .txt beside it", ""


def _lacks_captions(captions: str, set_aside: list[SetAside]) -> bool:
    """Whether all that is wrong is that nobody wrote captions."""
    return captions == "files" and all(one.reason.startswith("no caption") for one in set_aside)


def _nothing_left(root: Path, captions: str, set_aside: list[SetAside]) -> str:
    """The sentence for a source of which no sample is left."""
    reasons = sorted({one.reason for one in set_aside})
    if _lacks_captions(captions, set_aside):
        return (
            f"{root} has {len(set_aside)} pictures but no captions: no metadata.jsonl, metadata.csv or "
            'metadata.parquet, no .txt beside a picture. Write some, or set data.captions = "folder" to take '
            'the folders\' names, or "none" to train without.'
        )
    return (
        f"{root}: all {len(set_aside)} pictures were set aside: {'; '.join(reasons[:4])}. "
        "Look at them with: sfumato data DIR"
    )


def split_held_out(samples: Iterable[Sample], share: float) -> list[Sample]:
    """Give every sample without a split one: `share` of the captions are held out, chosen by their hash.

    A caption is never on both sides. Where there are hardly any captions, or they are names of classes,
    pictures are held out instead.
    """
    listed = list(samples)
    groups = _together(listed)
    labels = {one.label for one in listed}
    few = len(set(groups)) < FEW_CAPTIONS or (None not in labels and len(labels) == len(set(groups)))
    given = {group: one.split for group, one in zip(groups, listed, strict=True) if one.split and not few}
    result = []
    for group, one in zip(groups, listed, strict=True):
        if not one.split:
            side = HELD_OUT if _chance(one.name if few else group) < share else TRAIN
            one = replace(one, split=given.get(group, side))
        result.append(one)
    if result and all(one.split == HELD_OUT for one in result):
        result = [replace(one, split=TRAIN) for one in result]
    return result


def _chance(text: str) -> float:
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _together(samples: list[Sample]) -> list[str]:
    """For each sample, the first of all captions it is linked to by shared captions."""
    leader: dict[str, str] = {}

    def find(caption: str) -> str:
        while leader.setdefault(caption, caption) != caption:
            leader[caption] = leader[leader[caption]]
            caption = leader[caption]
        return caption

    for sample in samples:
        tops = sorted({find(caption.strip().lower()) for caption in sample.captions} or {find("")})
        for top in tops[1:]:
            leader[top] = tops[0]
    return [find(sample.captions[0].strip().lower()) if sample.captions else "" for sample in samples]
