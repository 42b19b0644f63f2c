"""Collecting a store: what runs and recipes still need of it stays, trained codecs too."""

import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato import models
from sfumato.data.encoding.encode_plan import plan_encoding
from sfumato.data.store import leases
from sfumato.data.store.gc import DAY, collect
from sfumato.data.store.store import KINDS, STRAY_SECONDS, Store
from sfumato.errors import Failed, Refused
from sfumato.models.files import read_json
from sfumato.recipe import Recipe
from sfumato.workflow import base_images, condition_encoders, encode_ahead
from sfumato.workflow.checks import choose_sizes
from sfumato.workflow.encode_samples import curriculum_stages, encoding_of, is_conditional
from sfumato.workflow.prepare import model_of, resolve_recipe
from sfumato.workflow.train_codec import codec_home

NAME = re.compile(r"[0-9a-f]{32}")
"""What a trained codec's folder is called: the hash of what it depends on."""
PART = re.compile(r"\.[0-9a-f]{32}\.\d+(\.old)?\.part")


def is_store(folder: Path) -> bool:
    """Whether a folder is a store of encodings."""
    kinds = [folder / kind for kind in KINDS]
    return all(one.is_dir() for one in kinds) and any(
        any(one.glob("*.safetensors")) for one in (*kinds, folder / leases.FOLDER)
    )


def collect_garbage(
    root: Path, keep: Iterable[str | Path] = (), days: float = 30.0, remove: bool = False
) -> dict[str, Any]:
    """What a store holds and what of it nobody needs, which is removed if `remove` says so.

    Args:
        keep: recipes and runs whose encodings are kept beside those of the runs that exist.
        days: what was written since then is kept, whoever needs it.
    Returns:
        plain values: {kind: {entries, bytes, unused_entries, unused_bytes, damaged}}, users, codecs, rings,
        passed_by ([{file, reason}]: what is left alone), leftover_bytes, unused_bytes, freed_bytes.
    Raises:
        Refused: a recipe cannot be used, somebody else is collecting, or the store cannot be written.
    """
    needed: dict[str, set[str]] = {kind: set() for kind in KINDS}
    encoders: set[str] = set()
    for one in keep:
        _add_needs(Recipe.read(one), needed, encoders)
    found = collect(Store(root), needed, days, remove)
    passed_by: list[dict[str, str]] = []
    left = Leftovers(remove=remove)
    codecs = _codecs(root / "codecs", found.encoders | encoders, days, remove, passed_by, left)
    busy = {user["owner"] for user in found.users if user["busy"]}
    rings = _rings(root / encode_ahead.FOLDER, busy, days, remove, passed_by)
    unused = sum(one["bytes"] for one in (*codecs, *rings) if not one["kept"])
    return {
        **{kind: vars(share) for kind, share in found.shares.items()},
        "users": found.users,
        "codecs": codecs,
        "rings": rings,
        "passed_by": passed_by,
        "leftover_bytes": found.leftover_bytes + left.bytes,
        "unused_bytes": found.unused_bytes + unused + left.bytes,
        "freed_bytes": found.freed_bytes + (unused + left.bytes) * remove,
    }


@dataclass
class Leftovers:
    """What killed writers of folders have left: how large it is; it goes if `remove` says so."""

    remove: bool
    bytes: int = 0

    def take(self, folder: Path) -> None:
        """Count one that is old enough for its writer to be gone."""
        if time.time() - folder.lstat().st_mtime > STRAY_SECONDS:
            self.bytes += _size(folder)
            if self.remove:
                shutil.rmtree(folder, ignore_errors=True)


def _add_needs(recipe: Recipe, needed: dict[str, set[str]], encoders: set[str]) -> None:
    """Add the keys of all that a recipe would encode."""
    resolved = resolve_recipe(recipe)
    codec = resolved.base.codec if resolved.base else _codec_of(recipe, resolved)
    if codec is None:
        return  # not trained yet: nothing of it can be in the store
    model = model_of(recipe, resolved, codec)
    beside = condition_encoders.encoders(model, recipe.data)
    for stage in [*(one for _, one in curriculum_stages(recipe)), recipe]:
        how, samples = encoding_of(stage, model), resolved.collection.samples
        shapes = choose_sizes(stage, samples, codec, resolved.base)
        work = plan_encoding(
            samples,
            shapes,
            how,
            beside,
            is_conditional(model),
            lambda *_: None,
            base_images.picture_key(model, recipe.data),
        )
        for kind, keys in work.keys(how).items():
            needed[kind] |= set(keys)
        encoders |= {how.pixels, how.texts}


def _codec_of(recipe: Recipe, resolved: Any) -> models.Codec | None:
    """The codec of a recipe that begins from scratch, None if it is still to be trained."""
    fresh = models.new_codec(recipe.model, recipe.seed, bool(recipe.data.frames))
    if not models.needs_training(recipe.model, fresh):
        return fresh.eval()
    trained_on = resolved.collection.with_split("train") or resolved.collection.samples
    home = codec_home(recipe, trained_on, resolved.bucket_of)
    return models.load_codec(home).eval() if (home / "stage.json").is_file() else None


def _folders(place: Path, passed_by: list[dict[str, str]]) -> Iterator[Path]:
    """The folders in a part of a store, by name; links are passed by."""
    for home in sorted(place.iterdir()) if place.is_dir() else ():
        if home.is_symlink():
            passed_by.append({"file": f"{place.name}/{home.name}", "reason": "it is a link"})
        elif home.is_dir():
            yield home


def _codecs(
    folder: Path,
    encoders: set[str],
    days: float,
    remove: bool,
    passed_by: list[dict[str, str]],
    left: Leftovers,
) -> list[dict[str, Any]]:
    """The trained codecs of a store: which are kept, and how large they are.

    Only what a codec's training wrote is looked at; what else is there is passed by, with the reason.
    """
    found: list[dict[str, Any]] = []
    for home in _folders(folder, passed_by):
        if PART.fullmatch(home.name):
            left.take(home)
            continue
        is_run = home.suffix == ".run"
        young = time.time() - home.stat().st_mtime < days * DAY
        if not (NAME.fullmatch(home.stem) and (home / ("recipe.toml" if is_run else "stage.json")).is_file()):
            passed_by.append({"file": f"{folder.name}/{home.name}", "reason": "it is no codec of sfumato"})
            continue
        try:
            finished = (home.with_suffix("") / "stage.json").is_file() if is_run else True
            kept = young or (not finished if is_run else _is_needed(home, encoders))
        except UNREADABLE as problem:
            passed_by.append({"file": f"{folder.name}/{home.name}", "reason": _reason(problem)})
            continue
        found.append({"name": home.name, "kept": kept, "bytes": _size(home)})
        if remove and not kept:
            shutil.rmtree(home, ignore_errors=True)
    return found


def _rings(
    folder: Path, busy: set[str], days: float, remove: bool, passed_by: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """What runs have encoded ahead (`data.cache_limit`): each ring with its run, and how large it is."""
    found: list[dict[str, Any]] = []
    for home in _folders(folder, passed_by):
        file = home / encode_ahead.OWNER
        try:
            owner = read_json(file)["owner"]
            if not isinstance(owner, str) or "\0" in owner:
                raise Refused(f"{encode_ahead.OWNER} names no run")
            young = time.time() - file.stat().st_mtime < days * DAY
        except UNREADABLE as problem:
            passed_by.append({"file": f"{folder.name}/{home.name}", "reason": _reason(problem)})
            continue
        kept = young or owner in busy or Path(owner).exists()
        found.append({"owner": owner, "kept": kept, "bytes": _size(home)})
        if remove and not kept:
            shutil.rmtree(home, ignore_errors=True)
    return found


UNREADABLE = (Refused, Failed, OSError, ValueError, TypeError, KeyError, RuntimeError)
"""What comes of reading a folder that is damaged, or is another program's."""


def _reason(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return text if isinstance(problem, Refused | Failed) else f"it cannot be read ({text[:200]})"


def _size(folder: Path) -> int:
    return sum(one.lstat().st_size for one in folder.rglob("*") if one.is_file() and not one.is_symlink())


def _is_needed(home: Path, encoders: set[str]) -> bool:
    mine = models.load_codec(home).fingerprint()
    return any(one.startswith(mine) for one in encoders)
