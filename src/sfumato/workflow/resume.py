"""A run keeps the recipe it began with: what may change does, what may not is refused by name."""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path

from sfumato import trust, user_code
from sfumato.data.settings import ResolutionStage
from sfumato.data.sources.sample import Sample
from sfumato.errors import Refused
from sfumato.recipe import Recipe
from sfumato.run_folder import RunFolder, explain_disk_errors
from sfumato.user_code import code_hash, is_user_code

FREE = (
    "output",
    "format",
    "data.cache_dir",
    "data.cache_limit",
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
)
FREE_PARTS = (
    "sample.",
    "train.keep_",
    "train.save_async",
    "train.patience",
    "train.ema_snapshot_every",
    "train.validate_every",
    "train.threads",
    "train.parallel",
    "train.hsdp_shard_size",
    "train.context_parallel",
    "train.device",
    "train.gradient_checkpointing",
    "train.offload",
    "train.sanity",
    "train.callbacks",
)


def check_resume(run: RunFolder, recipe: Recipe, content: str = "") -> list[str]:
    """Compare recipe and data with those this run began with.

    Args:
        content: fingerprint of the samples' names, captions and split now.
    Returns:
        sentences about what changed and may.
    Raises:
        Refused: naming the first key that may not change.
    """
    if not run.effective.is_file() or not run.effective.read_text(encoding="utf-8").strip():
        return []
    if not (run.path / "model").exists() and not run.checkpoint_folders():
        return []  # refused before anything was made: the recipe may be mended
    before = [event["summary"].get("content") for event in run.events() if event["kind"] == "data"]
    same_data = not before or not content or before[-1] == content
    notes = []
    for name, (was, now) in Recipe.read(run.path).differences(recipe).items():
        moved = name == "data.train" and same_data
        if not (moved or name in FREE or name.startswith(FREE_PARTS)):
            raise Refused(
                f"{run.path} was begun with {name} = {_said(was)}, but the recipe now says {_said(now)}. "
                f"Go on with {name}={_said(was)}, or give this recipe another output."
            )
        if name not in ("output", "format"):
            notes.append(f"{name} was {_said(was)} and is {_said(now)} from here on.")
    notes += [
        f"{name}: {word} was changed since the run began; it goes on, but not as it would have."
        for name, codes in code_of(recipe).items()
        for word, code in codes.items()
        if code != _code_before(run, name).get(word, code)
    ]
    if not same_data:
        notes.append("The data changed since the run began; it goes on, but not as it would have.")
    return notes


def code_of(recipe: Recipe) -> dict[str, dict[str, str]]:
    """Hashes of the files in which the user's own code stands: {key: {file.py:name: hash}}."""
    found: dict[str, dict[str, str]] = {}
    for name, value in recipe.values().items():
        words = [one for one in (value if isinstance(value, tuple) else [value]) if is_user_code(str(one))]
        if words:
            found[name] = {word: code_hash(word) for word in words}
    return found


def keep_code(recipe: Recipe, run: RunFolder) -> None:
    """Keep a copy of the recipe's own code in the run, and let this machine know it again.

    Raises:
        Refused, Failed: the copy cannot be written.
    """
    words = [word for codes in code_of(recipe).values() for word in codes]
    with explain_disk_errors(run.path / user_code.COPIES):
        user_code.keep_code(words, run.path)
    for file in user_code.code_files(words):
        if file.is_file():
            trust.remember(file)


def _code_before(run: RunFolder, name: str) -> dict[str, str]:
    """What `code_of` said when the run last began."""
    return next((one["hashes"].get(name, {}) for one in reversed(run.events()) if one["kind"] == "code"), {})


def data_fingerprint(samples: Iterable[Sample]) -> str:
    """A fingerprint of names, captions and split."""
    digest = sha256()
    for sample in samples:
        digest.update(repr((sample.name, sample.captions, sample.split)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f'"{name}" = {_said(one)}' for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_said, value))}]"
    if isinstance(value, ResolutionStage):
        return _said(vars(value))
    return (
        f'"{value}"'
        if isinstance(value, str | Path)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
