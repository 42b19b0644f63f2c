"""A run keeps the recipe it began with: what may change does, what may not is refused by name."""

from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import Any

from sfumato import paths, trust, user_code
from sfumato.data.sources.sample import Sample
from sfumato.errors import Refused
from sfumato.models.files import read_json
from sfumato.recipe import BASE, DEFAULT, Recipe
from sfumato.run_folder import RunFolder, explain_disk_errors
from sfumato.settings import toml
from sfumato.user_code import code_hash, is_user_code

FREE = (
    "output",
    "format",
    "data.cache_dir",
    "data.cache_limit",
    "train.steps",
    "train.minutes",
    "train.min_steps",
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
RATES = (
    "train.learning_rate",
    "train.text_learning_rate",
    "train.lr_multipliers",
    "train.lr_schedule",
    "train.warmup_steps",
)
"""What decides a step's learning rate. It may change on the way: each step asks for its own, so a run that
goes on with other rates is one in which they changed at that step."""


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
    before = data_summary(run)
    same_data = not before or not content or before.get("content") == content
    notes = []
    earlier = Recipe.read(run.path)
    for name, (was, now) in earlier.differences(recipe).items():
        if recipe.origin(name) == BASE and earlier.origin(name) == DEFAULT:
            continue  # runs of before 0.2 wrote the default, and took the base's
        moved = name == "data.train" and same_data
        if not (moved or name in FREE or name in RATES or name.startswith(FREE_PARTS)):
            raise Refused(
                f"{run.path} was begun with {name} = {toml(was)}, but the recipe now says {toml(now)}. "
                f"Go on with {paths.quoted(f'{name}={toml(was)}')}, or give this recipe another output."
            )
        said_by_the_loop = name in RATES and bool(run.checkpoint_folders())
        if name not in ("output", "format") and not said_by_the_loop:
            notes.append(f"{name} was {toml(was)} and is {toml(now)} from here on.")
    notes += [
        f"{name}: {word} was changed since the run began; it goes on, but not as it would have."
        for name, codes in code_of(recipe).items()
        for word, code in codes.items()
        if code != _code_before(run, name).get(word, code)
    ]
    if not same_data:
        notes.append("The data changed since the run began; it goes on, but not as it would have.")
    return notes


def check_classes(run: RunFolder, classes: Sequence[str]) -> None:
    """Raises Refused unless the data have the very classes that the run has learned the numbers of.

    Args:
        classes: of a model of classes, their names in the order of their numbers; else none.
    """
    file = run.path / "model" / "conditioner" / "stage.json"
    if not classes or not file.is_file() or not run.checkpoint_folders():
        return
    known: dict[str, int] = dict(read_json(file)["config"].get("names", {}))
    now = {name: number for number, name in enumerate(classes)}
    if not known or now == known:
        return
    added = [name for name in now if name not in known]
    gone = [name for name in known if name not in now]
    what = "; ".join(
        f"{words} {', '.join(toml(one) for one in some[:5])}{' …' * (len(some) > 5)}"
        for words, some in (("new:", added), ("missing:", gone))
        if some
    )
    raise Refused(
        f"The data has {len(now)} classes, but {run.path} began with {len(known)} "
        f"({what or 'in another order'}). A model of classes has one number for each, so they stay as they "
        "were: bring back the classes it began with, or give this recipe another output."
    )


def data_summary(run: RunFolder) -> dict[str, Any]:
    """What was last written down of a run's data; {} if nothing was."""
    found = [one.get("summary") for one in run.events() if one["kind"] == "data"]
    return found[-1] if found and isinstance(found[-1], dict) else {}


def pixels_note(run: RunFolder, pixels: str, content: str) -> str:
    """The sentence about pictures whose pixels changed since the run's data was last written down, or "".

    Args:
        pixels: fingerprint of what the pictures show now; content: of their names, captions and split, whose
            change `check_resume` has said already.
    """
    before = data_summary(run)
    same_samples = before.get("content") == content
    if not same_samples or not before.get("pixels") or not pixels or before["pixels"] == pixels:
        return ""
    return (
        "The data changed since the run began: pictures of the same names show other pixels. They are "
        "encoded anew; it goes on, but not as it would have."
    )


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
    codes = [one.get("hashes") for one in run.events() if one["kind"] == "code"]
    known = codes[-1] if codes and isinstance(codes[-1], dict) else {}
    return found if isinstance(found := known.get(name), dict) else {}


def data_fingerprint(samples: Iterable[Sample]) -> str:
    """A fingerprint of names, captions and split."""
    digest = sha256()
    for sample in samples:
        digest.update(repr((sample.name, sample.captions, sample.split)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
