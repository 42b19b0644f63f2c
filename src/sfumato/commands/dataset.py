"""The command about data: what is in a set, and what is wrong with it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Refused
from ..record import write_atomic
from .console import progress, result


@dataclass(frozen=True)
class Asked:
    """What the report plans with: pixels a side, shapes, frames of a clip at a rate, and whose tokenizer."""

    resolution: int
    buckets: int
    frames: int
    rate: float
    model: str


def is_store(folder: str, must: bool) -> bool:
    """Whether `folder` is a store of encodings.

    Raises:
        Refused: it is none, but `must` be one.
    """
    from ..workflow.collecting import is_store as looks_like_one

    found = looks_like_one(Path(folder).expanduser())
    if must and not found:
        raise Refused(
            f"{folder} is no store of encodings, and --collect and --keep are about one. Give the folder "
            "that data.store names, by default ~/.cache/sfumato."
        )
    return found


def data(folder: str, captions: str, asked: Asked, out: Path, as_json: bool) -> None:
    """Write a page about a data set; files that were set aside are named, and are no failure."""
    from ..data import sources
    from ..data.report import report

    collection = sources.open(folder, captions=captions, empty=True)
    count, most = tokenizer(asked.model)
    with progress() as shown:
        found = report(
            collection, asked.resolution, count=asked.buckets, progress=shown, tokens=count,
            most_tokens=most, frames=asked.frames, rate=asked.rate,
        )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    write_atomic(page, found.page())
    aside = found.summary["set_aside"]
    lines = [f"{name:<12} {found.summary[name]:,}" for name in ("samples", "captions", "train", "held_out")]
    lines.append(f"{'sizes':<12} {_sizes(found.summary['sizes'])}")
    lines.append(f"{'set aside':<12} {len(aside):,}")
    lines += [f"  {one['file']}: {one['reason']}" for one in aside]
    result({**found.summary, "page": page}, "\n".join([*lines, str(page)]), as_json)


def tokenizer(model: str) -> tuple[Callable[[list[str]], list[int]] | None, int]:
    """(captions → their numbers of tokens, how many a model reads) by the model's own tokenizer.

    Args:
        model: minilm, none, or the folder of a text encoder, a tokenizer or a diffusers pipeline.
    Raises:
        Refused: the folder holds no tokenizer.
    """
    if model == "none":
        return None, 0
    from transformers import AutoTokenizer

    from ..stages.text import MINILM, minilm_folder

    if model == MINILM:
        try:
            places = [minilm_folder()]
        except Refused:
            return None, 0  # nobody asked for it: captions are counted in words
    else:
        folder = Path(model).expanduser()
        places = [folder, *sorted(folder.glob("tokenizer*")), folder / "model"]
    kept = [one for one in places if any(one.glob("tokenizer*.json")) or any(one.glob("vocab*"))]
    if not kept:
        raise Refused(
            f"{model} holds no tokenizer. Give --model the folder of a text encoder or of a diffusers "
            "pipeline, or minilm, or none."
        )
    words: Any = AutoTokenizer.from_pretrained(kept[0], local_files_only=True)
    most = 64 if model == MINILM else min(int(words.model_max_length), 512)

    def count(captions: list[str]) -> list[int]:
        return [len(ids) for ids in words(captions, verbose=False)["input_ids"]] if captions else []

    return count, most


def _sizes(sizes: dict[str, int], most: int = 5) -> str:
    shown = [f"{size} ({count:,})" for size, count in list(sizes.items())[:most]]
    return ", ".join(shown) + (f" and {len(sizes) - most} more" if len(sizes) > most else "")
