"""Data sets of the Hub: `hf:owner/name[@revision][?config=…&split=…&image=…&caption=…]`.

The files that are asked for come into the Hub's usual cache and are read as those of a folder: pictures and
clips with captions, .tar shards (WebDataset), Parquet, Arrow as `save_to_disk` writes it. Nothing of a
repository is run, loading scripts included.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl

from sfumato import hub
from sfumato.errors import Failed, Refused, nearest, one_of
from sfumato.hub import Repo, RepoId
from sfumato.readers import media

PREFIX = "hf:"
KEYS = ("config", "split", "image", "caption")
READ = (*media.PICTURES, *media.CLIPS, ".tar", ".parquet", ".arrow", ".npz", ".txt", ".caption")
READ += (".json", ".jsonl", ".csv")
"""Endings of the files that are fetched of a data set."""
CARD = "README.md"


@dataclass(frozen=True)
class HubDataset:
    """What of which repository is read, and what its columns are called; "" for the usual."""

    repo: RepoId
    config: str = ""
    split: str = ""
    image: str = ""
    caption: str = ""


def is_hub_dataset(given: str) -> bool:
    """Whether a data set of the Hub is meant."""
    return given.startswith(PREFIX)


def parse(given: str) -> HubDataset:
    """What `hf:owner/name@revision?config=…&split=…` means.

    Raises:
        Refused: no such name, or a word behind ? that is not known.
    """
    name, _, query = given.removeprefix(PREFIX).partition("?")
    repo = hub.parse(name)
    if repo is None or repo.file or repo.of_modelscope:
        raise Refused(
            f'data.train = "{given}" names no data set of the Hub. Write hf:owner/name, or '
            "hf:owner/name@revision?config=NAME&split=train&image=COLUMN&caption=COLUMN."
        )
    said = dict(parse_qsl(query, keep_blank_values=True))
    for word in said:
        one_of(f'data.train = "{given}":', word, KEYS)
    return HubDataset(repo, **said)


def fetch(wanted: HubDataset) -> Path:
    """A folder with the files of a data set, fetched into the Hub's cache where they are not there yet.

    Raises:
        Refused: no such configuration or split, nothing that is read, gated. Failed: the connection broke.
    """
    if hub.is_offline():
        kept = sorted((hub.home(wanted.repo, "dataset") / "files").glob(f"*-{_key(wanted)}"))
        if len(kept) != 1:
            raise Refused(
                f"{PREFIX}{wanted.repo} was not read here before in this selection, and nothing is fetched, "
                "as you were offline (HF_HUB_OFFLINE): unset HF_HUB_OFFLINE, or name a folder."
            )
        return kept[0]
    listed = hub.read_repo(wanted.repo, "dataset")
    files = choose(wanted, listed)
    return _as_folder(hub.fetch(listed, files), files, wanted)


def to_fetch(wanted: HubDataset) -> dict[str, Any]:
    """{commit, files, size, bytes} of what `fetch` would bring; empty where all is here."""
    if hub.is_offline():
        return {}
    listed = hub.read_repo(wanted.repo, "dataset")
    lacking = hub.absent(listed, choose(wanted, listed))
    return hub.summary(listed, lacking) if lacking else {}


def choose(wanted: HubDataset, listed: Repo) -> list[str]:
    """The files of a data set that its configuration and split name.

    The card's `configs` decide where it has them; else the folder of that name, and names of files.
    """
    names = [name for name in listed.sizes if name.lower().endswith(READ) and not name.startswith(".")]
    configs = _configs(listed) if CARD in listed.sizes else {}
    if wanted.config and not configs:
        folders = {PurePosixPath(name).parts[0] for name in names if "/" in name}
        if wanted.config not in folders:
            raise Refused(f'{wanted.repo} has no config "{wanted.config}".{nearest(wanted.config, folders)}')
        names = [name for name in names if name.startswith(f"{wanted.config}/")]
    elif configs:
        usual = "default" if "default" in configs else next(iter(configs))
        if wanted.config and wanted.config not in configs:
            raise Refused(f'{wanted.repo} has no config "{wanted.config}".{nearest(wanted.config, configs)}')
        patterns = configs[wanted.config or usual]
        if wanted.split and "" not in patterns and wanted.split not in patterns:
            raise Refused(f'{wanted.repo} has no split "{wanted.split}".{nearest(wanted.split, patterns)}')
        some = (
            patterns.get(wanted.split)
            if wanted.split
            else [one for many in patterns.values() for one in many]
        )
        if some:
            return _some([name for name in names if any(fnmatch(name, one) for one in some)], wanted)
    if wanted.split:
        word = re.compile(rf"(^|[/_.-]){re.escape(wanted.split)}([/_.-]|$)")
        chosen = [name for name in names if word.search(name)]
        if not chosen:
            raise Refused(f'{wanted.repo} has no files of a split "{wanted.split}". Leave it out.')
        names = chosen
    return _some(names, wanted)


def _some(names: list[str], wanted: HubDataset) -> list[str]:
    if not names:
        raise Refused(
            f"{PREFIX}{wanted.repo} holds no pictures, clips, .tar, .parquet or .arrow files that are read. "
            "A set that only its own script can make is not: name its revision refs/convert/parquet."
        )
    return names


def _configs(listed: Repo) -> dict[str, dict[str, list[str]]]:
    """{config: {split: patterns of files}} as the card says; a split "" is of all."""
    from huggingface_hub import metadata_load

    card = hub.fetch(listed, [CARD]) / CARD
    try:
        said = (metadata_load(card) or {}).get("configs") or []
        return {str(one["config_name"]): _patterns(one) for one in said if "data_files" in one}
    except Exception as problem:  # YAML's own errors, and whatever somebody wrote there
        raise Failed(f"{card} does not say its configs as the Hub reads them ({problem}).") from problem


def _patterns(one: Mapping[str, Any]) -> dict[str, list[str]]:
    inside, files = str(one.get("data_dir", "")).strip("/"), one["data_files"]
    splits = files if isinstance(files, list) and any(isinstance(part, dict) for part in files) else None
    found: dict[str, list[str]] = {}
    for part in splits or [{"split": "", "path": files}]:
        paths = [part["path"]] if isinstance(part["path"], str) else part["path"]
        known = found.setdefault(str(part.get("split", "")), [])
        known += [f"{inside}/{path}".lstrip("/") for path in paths]
    return found


def _key(wanted: HubDataset) -> str:
    said = f"{wanted.repo}?{wanted.config}&{wanted.split}"
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def _as_folder(snapshot: Path, files: Iterable[str], wanted: HubDataset) -> Path:
    """The chosen files of a snapshot in a folder of their own beside it, as second names of the same bytes.

    A snapshot consists of links that lead out of it, and no reader follows such links.
    """
    folder = hub.home(wanted.repo, "dataset") / "files" / f"{snapshot.name}-{_key(wanted)}"
    for name in files:
        place = folder / name
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        source = (snapshot / name).resolve()
        try:
            os.link(source, place)
        except FileExistsError:  # another process was quicker
            pass
        except OSError:  # a file system without second names
            shutil.copyfile(source, place)
    return folder
