"""The command about data: what is in a set, and what is wrong with it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.commands.console import progress, result, say
from sfumato.commands.options import with_present_names
from sfumato.data.sources.sample import Collection
from sfumato.errors import Refused
from sfumato.models.pretrained import token_count
from sfumato.run_folder import check_output, write_atomic

USUAL = {"resolution": 256, "buckets": 5, "frames": 16, "fps": 8.0, "model": "minilm", "captions": "files"}
"""What the report plans with where neither the command nor a recipe says it."""
STRIDE = 16


@dataclass(frozen=True)
class ReportTarget:
    """What is reported on, and what the plan is made for."""

    collection: Collection
    resolution: int
    stride: int
    buckets: int
    frames: int
    fps: float
    reading: token_count.TokenCounter | None


def is_store(folder: str, must: bool) -> bool:
    """Whether `folder` is a store of encodings.

    Raises:
        Refused: it is none, but `must` be one.
    """
    place = Path(folder).expanduser()
    found = False
    if must or (place / "pixels").is_dir():
        from sfumato.workflow.store_gc import is_store as looks_like_one

        found = looks_like_one(place)
    if must and not found:
        raise Refused(
            f"{folder} is no store of encodings, and --collect and --keep are about one. Give the folder "
            "that data.cache_dir names, by default ~/.cache/sfumato."
        )
    return found


def data(what: str, overrides: list[str], options: dict[str, Any], out: Path, as_json: bool) -> None:
    """Write a page about a data set, or a recipe's; files set aside are named, and are no failure."""
    from sfumato.data.dataset_report import report
    from sfumato.report import data_page

    options = with_present_names(options)
    check_output(out)
    place = Path(what).expanduser()
    is_recipe = place.suffix == ".toml" or (place / "effective.toml").is_file()
    subject = _of_recipe(place, overrides, options) if is_recipe else _of_folder(what, overrides, options)
    reading = subject.reading
    with progress() as bars:
        found = report(
            subject.collection,
            subject.resolution,
            subject.stride,
            subject.buckets,
            progress=bars,
            tokens=reading.count if reading else None,
            most_tokens=reading.most if reading else 0,
            frames=subject.frames,
            fps=subject.fps,
        )
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    write_atomic(page, data_page.render(found.summary, found.sheets, found.twins))
    aside = found.summary["set_aside"]
    lines = [f"{name:<12} {found.summary[name]:,}" for name in ("samples", "captions", "train", "held_out")]
    if found.summary["tokens"]:
        cut, most = found.summary["tokens"]["truncated"], found.summary["tokens"]["most"]
        lines.append(f"{'cut off':<12} {cut:,} captions, beyond {most} tokens")
    lines.append(f"{'sizes':<12} {_sizes(found.summary['sizes'])}")
    lines.append(f"{'set aside':<12} {len(aside):,}")
    lines += [f"  {one['file']}: {one['reason']}" for one in aside]
    result({**found.summary, "page": page}, "\n".join([*lines, str(page)]), as_json)


def _of_folder(what: str, overrides: list[str], options: dict[str, Any]) -> ReportTarget:
    """A folder, archive or embedded set, planned for as the options say."""
    from sfumato.data.sources import folder

    if overrides:
        raise Refused(f'"{overrides[0]}" is a recipe\'s value, but {what} is no recipe.')
    values = {**USUAL, **options}
    collection = folder.open_collection(what, captions=values["captions"], empty=True)
    resolution = values["resolution"] // STRIDE * STRIDE
    reading = token_count.of_folder(values["model"])
    return ReportTarget(
        collection, resolution, STRIDE, values["buckets"], values["frames"], values["fps"], reading
    )


def _of_recipe(file: Path, overrides: list[str], options: dict[str, Any]) -> ReportTarget:
    """A recipe's data, planned for as the recipe says: its sizes, its model's tokenizer."""
    from sfumato.recipe import Recipe
    from sfumato.workflow import checks, resolve_recipe

    recipe = Recipe.read(file, overrides)
    for note in recipe.notes:
        say(note)
    kept = {
        name: options[name]
        for name in ("resolution", "buckets", "frames", "fps", "captions")
        if name in options
    }
    if kept:
        name = next(iter(kept))
        raise Refused(
            f"{file} is a recipe and says data.{name} itself: give data.{name}={kept[name]} instead."
        )
    resolved = resolve_recipe(recipe)
    settings = recipe.data
    reading = (
        token_count.of_folder(options["model"])
        if "model" in options
        else token_count.of_conditioner(resolved.conditioner)
    )
    fewest = int(min([settings.frames or USUAL["frames"], *settings.short_clip_frames]))
    return ReportTarget(
        resolved.collection,
        settings.resolution,
        checks.size_multiple(recipe, resolved.base),
        settings.buckets,
        fewest,
        settings.fps,
        reading,
    )


def _sizes(sizes: dict[str, int], most: int = 5) -> str:
    listed = [f"{size} ({count:,})" for size, count in list(sizes.items())[:most]]
    return ", ".join(listed) + (f" and {len(sizes) - most} more" if len(sizes) > most else "")
