"""Models that the Hugging Face Hub's own cache holds, by their id; nothing is fetched."""

import re
from pathlib import Path
from typing import Any

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_id(given: str) -> bool:
    """Whether it may be meant as `owner/name` or `owner/name@revision`."""
    return ID.fullmatch(given) is not None


def cache() -> Path:
    """Where the Hub's files are kept on this machine (HF_HOME, HF_HUB_CACHE)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def place(given: Path | str) -> Path:
    """The folder that is meant: as it is given; where there is none, a hub id's snapshot in the cache."""
    path = Path(given).expanduser()
    if path.exists() or not is_id(str(given)):
        return path
    return snapshot(str(given)) or path


def snapshot(given: str) -> Path | None:
    """The snapshot of a hub id in the cache: of its revision, else the only one; None where there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = given.partition("@")
    how: dict[str, Any] = {"revision": revision or None, "local_files_only": True, "cache_dir": cache()}
    try:
        return Path(snapshot_download(name, **how))
    except (LocalEntryNotFoundError, HFValidationError):
        kept = sorted((cache() / f"models--{name.replace('/', '--')}" / "snapshots").glob("*"))
        return kept[0] if len(kept) == 1 and not revision else None


def missing(given: str) -> str:
    """What to do about a hub id that is not in the cache."""
    name = given.partition("@")[0]
    return (
        f'"{given}" is no folder here and not in the Hub\'s cache ({cache()}), and nothing is fetched, as if '
        f"you were offline: put the folder at {Path(given).absolute()}, or fill the cache where there is a "
        f"network by `hf download {name}` (a gated model after accepting its terms and `hf auth login`)."
    )
