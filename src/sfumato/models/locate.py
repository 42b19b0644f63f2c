"""Which weights a run is drawn with: of the checkpoint that is named, else of the newest that is whole."""

import re
from pathlib import Path

from sfumato.errors import Failed, Refused, explain_malformed
from sfumato.models.files import read_json
from sfumato.run_folder import RunFolder, checksum

WEIGHTS = ("ema.safetensors", "model.safetensors")
"""The files of a checkpoint a model is loaded from: the averaged weights if there are any."""


def newest_weights(run: RunFolder) -> Path:
    """The averaged weights (or the plain ones) of the run's newest checkpoint that is whole.

    Raises:
        Refused: the run has none.
        Failed: every one is damaged.
    """
    damaged = []
    for folder in reversed(run.checkpoint_folders()):
        found, bad = weights_in(folder)
        if found is not None:
            return found
        damaged += bad
    if damaged:
        raise Failed(f"{', '.join(damaged)}: damaged, and the run has no other checkpoint. Train it again.")
    raise Refused(f"{run.path} has no checkpoint yet. Run `sfumato train` on its recipe first.")


def weights_in(checkpoint: Path) -> tuple[Path | None, list[str]]:
    """(the weights a checkpoint is drawn with, None if no file of them is whole; the damaged ones)."""
    listed, damaged = _listed(checkpoint / "manifest.json"), []
    for name in WEIGHTS:
        parts = [one for one in listed if one == name or _is_piece(one, name)]
        bad = [
            str(checkpoint / one)
            for one in parts
            if not (checkpoint / one).is_file() or checksum(checkpoint / one) != listed[one]
        ]
        if parts and not bad:
            return checkpoint / name, damaged
        damaged += bad
    return None, damaged


def _listed(manifest: Path) -> dict[str, str]:
    """The files of a checkpoint and their checksums."""
    with explain_malformed(manifest, "Choose another checkpoint."):
        return {name: str(one["sha256"]) for name, one in read_json(manifest).get("files", {}).items()}


def _is_piece(file: str, name: str) -> bool:
    """Whether a file's name is that of a piece of `name`, as "ema-00001-of-00002.safetensors"."""
    stem, _, suffix = name.rpartition(".")
    return re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}", file) is not None


def weights_of(path: Path) -> tuple[Path, Path | None]:
    """(the run a path means, the checkpoint in it that was named, as `RUN/checkpoints/best`)."""
    if path.parent.name == "checkpoints" and (path / "manifest.json").is_file():
        return path.parent.parent, path.resolve()
    return path, None


def chosen_weights(run: Path, checkpoint: Path | None) -> Path:
    """The weights to load: of the checkpoint that was named, else of the newest.

    Raises:
        Refused: the run has no checkpoint. Failed: what was asked for is damaged.
    """
    if checkpoint is None:
        return newest_weights(RunFolder.open(run))
    found, damaged = weights_in(checkpoint)
    if found is None:
        raise Failed(f"{', '.join(damaged) or checkpoint}: damaged. Choose another checkpoint of {run}.")
    return found
