"""A grid: the same picture over LoRA strengths, checkpoints, prompts, seeds, solvers, …, by one loaded model.

Every cell is drawn alone, so that it is bit for bit what `generate` draws with its settings; cells that share
a seed start from the same noise. What is costly to change (the checkpoint, the LoRA) changes least often.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any

from sfumato.errors import Refused, nearest
from sfumato.models import locate
from sfumato.run_folder import RunFolder

MOST_CELLS = 10_000


def _number(text: str) -> float:
    if not isfinite(number := float(text)):
        raise ValueError
    return number


def _size(text: str) -> tuple[int, int]:
    width, height = re.split(r"[x×]", text)
    return int(width), int(height)


def _checkpoint(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


AXES: dict[str, tuple[Callable[[str], Any], str]] = {
    "checkpoint": (_checkpoint, "steps of a run's checkpoints: 500,1000,best, or all"),
    "lora": (_number, "how strongly LoRAs act: 0,0.5,1"),
    "prompt": (str, "prompts, with | between them"),
    "negative": (str, "prompts to lean away from, with | between them"),
    "seed": (int, "whole numbers: 1,2,3 or 1..4"),
    "guidance": (_number, "numbers: 1,3,7.5"),
    "solver": (str, "names of `sfumato theory list`"),
    "times": (str, "names of grids of times"),
    "steps": (int, "whole numbers: 5,10,20"),
    "size": (_size, "widths and heights: 512x512,768x512"),
    "strength": (_number, "how much of --init may change: 0.3,0.6"),
    "guidance_rescale": (_number, "shares: 0,0.7"),
    "pag_scale": (_number, "numbers: 0,3"),
    "control_weight": (_number, "numbers: 0.5,1"),
    "reference_scale": (_number, "numbers: 0.5,1"),
    "frames": (int, "whole numbers: 9,17"),
}
"""What a written grid may vary: how a value is read, and what it may be. In Python any argument may vary."""
COSTLY = ("checkpoint", "lora")
NEXT = rf"(?=[\w-]+\s*=|(?:{'|'.join(AXES)})\s*(?:$|[×*]|x\s))"
SEPARATOR = re.compile(rf"\s*[×*]\s*{NEXT}|\s+x\s+{NEXT}")
"""What stands between two axes: what follows is the name of one, with its values or without."""
RANGE = re.compile(r"(-?\d+)\s*\.\.\s*(-?\d+)")


def parse_grid(text: str, given: Mapping[str, Sequence[Any]] | None = None) -> dict[str, list[Any]]:
    """`lora=0,0.5,1 × seed=1..4` → {"lora": [0.0, 0.5, 1.0], "seed": [1, 2, 3, 4]}.

    Between axes stands ×, * or an x with spaces around it; a bare name takes its values from `given`.

    Raises:
        Refused: an axis that is not known or said twice, a value that is none of its kind, too many cells.
    """
    axes: dict[str, list[Any]] = {}
    for part in SEPARATOR.split(text.strip()):
        name, equals, values = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in AXES:
            known = [one.replace("_", "-") for one in AXES]
            raise Refused(f'--grid "{text}": "{name}" is no axis.{nearest(name, known)}')
        if name in axes:
            raise Refused(f'--grid "{text}" says {name} twice. Give all its values at once.')
        axes[name] = _values(text, name, values) if equals else list((given or {}).get(name, ()))
        if not axes[name]:
            raise Refused(f'--grid "{text}" gives {name} no values: {AXES[name][1]}.')
        if twice := [one for i, one in enumerate(axes[name]) if one in axes[name][:i]]:
            raise Refused(f'--grid "{text}" gives {name} {twice[0]} twice.')
    check_count(axes)
    return axes


def _values(text: str, name: str, said: str) -> list[Any]:
    """The values of one axis."""
    read, kind = AXES[name]
    words = said.split("|") if name in ("prompt", "negative") or "|" in said else said.split(",")
    found: list[Any] = []
    for word in (one.strip() for one in words):
        whole = RANGE.fullmatch(word) if read is int else None
        if whole is not None:
            first, last = int(whole[1]), int(whole[2])
            if abs(last - first) >= MOST_CELLS:
                raise Refused(f'--grid "{text}": {word} has more than {MOST_CELLS:,} values.')
            found += range(first, last + 1) if first <= last else range(first, last - 1, -1)
            continue
        try:
            if not word and name != "negative":
                raise ValueError
            found.append(read(word))
        except ValueError:
            raise Refused(f'--grid "{text}": "{word}" is no {name.replace("_", " ")}; {kind}.') from None
    return found


def check_count(axes: Mapping[str, Sequence[Any]]) -> int:
    """How many cells these axes have.

    Raises:
        Refused: none, or more than anybody looks at.
    """
    count = 1
    for name, values in axes.items():
        count *= len(values)
        if not values:
            raise Refused(f"The axis {name} of the grid has no values.")
    if count > MOST_CELLS:
        raise Refused(f"This grid has {count:,} cells; draw at most {MOST_CELLS:,}.")
    return count


def checkpoints_of(source: Path | str | None, values: Sequence[Any]) -> list[Path]:
    """The checkpoints that are meant by steps, names, or "all", of the run at `source`.

    Raises:
        Refused: no run, or no such checkpoint.
    """
    run = None if source is None else locate.weights_of(Path(source).expanduser())[0]
    if run is None or not (run / "checkpoints").is_dir():
        raise Refused(f"{source} is no run with checkpoints, so a grid cannot compare them. Leave that out.")
    there = RunFolder.open(run).checkpoint_folders()
    found: list[Path] = []
    for value in values:
        if value == "all":
            found += [one for one in there if one not in found]
            continue
        name = f"step-{value:06d}" if isinstance(value, int) else str(value)
        place = run / "checkpoints" / name
        if Path(name).name != name or not (place / "manifest.json").is_file():
            steps = ", ".join(str(int(one.name.removeprefix("step-"))) for one in there)
            raise Refused(f"{run} has no checkpoint {value}. It has {steps or 'none'}.")
        found.append(place)
    return list(dict.fromkeys(found))


def checkpoint_name(place: Path) -> int | str:
    """A checkpoint as a grid calls it: its step, or its name."""
    step = place.name.removeprefix("step-")
    return int(step) if step.isdecimal() else place.name


@dataclass(frozen=True)
class GridCell:
    """One cell: where it stands on each axis, its value there, all of its settings, and what was drawn."""

    at: tuple[int, ...]
    values: dict[str, Any]
    settings: dict[str, Any]
    drawn: Any


def draw_cells(
    model: Any,
    axes: Mapping[str, Sequence[Any]],
    watch: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Iterator[GridCell]:
    """Draw each cell of a grid; `Pipeline.grid` says how."""
    if both := [name for name in axes if name in settings]:
        raise Refused(f"{both[0]} is an axis of the grid and given beside it. Leave one out.")
    for name, value in settings.items():
        if (
            name in ("prompt", "negative", "seed", "labels")
            and isinstance(value, list | tuple)
            and len(value) > 1
        ):
            raise Refused(f"A grid draws one picture in each cell: make {name} an axis, or give one value.")
    axes = {name: list(values) for name, values in axes.items()}
    checkpoints = checkpoints_of(model.source, axes["checkpoint"]) if "checkpoint" in axes else []
    if checkpoints:
        axes["checkpoint"] = [checkpoint_name(one) for one in checkpoints]
    check_count(axes)
    return _draw_cells(model, axes, checkpoints, watch, settings)


def _draw_cells(
    model: Any,
    axes: Mapping[str, list[Any]],
    checkpoints: Sequence[Path],
    watch: Callable[[int, int], None] | None,
    settings: Mapping[str, Any],
) -> Iterator[GridCell]:
    """The cells, those of one checkpoint and one strength of LoRAs together."""
    order = [*(one for one in COSTLY if one in axes), *(one for one in axes if one not in COSTLY)]
    places = product(*(range(len(axes[name])) for name in order))
    count, scale, before = check_count(axes), model.lora_scale, dict[str, int]()
    try:
        for done, indices in enumerate(places):
            here = dict(zip(order, indices, strict=True))
            values = {name: axes[name][here[name]] for name in axes}
            if "checkpoint" in axes and before.get("checkpoint") != here["checkpoint"]:
                model.load_checkpoint(checkpoints[here["checkpoint"]])
            if "lora" in axes and before.get("lora") != here["lora"]:
                model.set_lora_scale(values["lora"])
            before = here
            own = {**settings, **{name: value for name, value in values.items() if name not in COSTLY}}
            if "size" in own:
                own["width"], own["height"] = own.pop("size")
            tell = None if watch is None else partial(_tell, watch, done, count)
            (drawn,) = model.generate(**own, watch=tell)
            yield GridCell(tuple(here[name] for name in axes), values, own, drawn)
    finally:
        if checkpoints:
            model.load_checkpoint(model.source)
        if "lora" in axes:
            model.set_lora_scale(scale)


def _tell(watch: Callable[[int, int], None], cells: int, count: int, done: int, total: int) -> None:
    """Tell how far a grid of `count` cells is, `cells` of them drawn and one begun, in hundredths."""
    watch(100 * cells + 100 * done // max(1, total), 100 * count)
