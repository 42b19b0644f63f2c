"""The command that measures a run."""

import json
from pathlib import Path
from typing import Any

from sfumato.commands.console import is_rank_zero, progress, result, say
from sfumato.report import curves
from sfumato.report.page import Picture, charts, document, embedded, gallery, section, table
from sfumato.run_folder import RunFolder, check_output, write_atomic

BY_HEART = "Drawn, and beside it its nearest training picture; a small ratio: no other is nearly as near."


def evaluate(
    folder: Path,
    samples: int,
    seeds: int,
    steps: int | None,
    guidance: float | None,
    out: Path,
    device: str,
    as_json: bool,
) -> None:
    """Measure the run, write numbers, pictures and a page into `out`, print the numbers."""
    place = folder.expanduser().absolute()
    if not any((one / "effective.toml").is_file() for one in (place, place.parent.parent)):
        RunFolder.open(folder)
    import numpy
    from PIL import Image

    from sfumato.generation.files import contents, is_clip
    from sfumato.workflow.evaluate import evaluate as measure

    if is_rank_zero():
        check_output(out)
    with progress() as bars:
        found = measure(folder, samples, seeds, steps, guidance, device, bars, say)
    out = unused_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    listed = []
    for index, (prompt, picture) in enumerate(found.drawn):
        kind = "webp" if is_clip(picture) else "png"
        file = out / f"drawn-{index:03d}.{kind}"
        (content,) = contents(picture, kind, {"prompt": prompt, "step": found.step}).values()
        write_atomic(file, content)
        listed.append((file, prompt))
    pairs = []
    for index, (name, drawn, original, ratio) in enumerate(found.closest):
        file = out / f"closest-{index}.png"
        pair = numpy.concatenate([one.permute(1, 2, 0).numpy() for one in (drawn, original)], 1)
        Image.fromarray(pair).save(file)
        pairs.append(Picture(embedded(file), Path(name).name, f"ratio {ratio:.2f}"))
    metrics = {name: one.to_dict() for name, one in found.metrics.items()}
    value = {
        "run": str(folder), "step": found.step, "metrics": metrics, "by_level": found.by_level,
        "notes": found.notes,
    }  # fmt: skip
    write_atomic(out / "metrics.json", json.dumps(value, indent=1, ensure_ascii=False))
    page = out / "report.html"
    write_atomic(page, _page(folder, found, listed, pairs))
    rows = [
        f"{name.replace('_', ' '):<26} {one!s:<20} {one.note}".rstrip() for name, one in found.metrics.items()
    ]
    result({**value, "page": page}, "\n".join([*rows, *found.notes, str(page)]), as_json)


def unused_folder(out: Path) -> Path:
    """The folder, or where an evaluation lies in it one beside it of that name with a number."""
    found, number = out, 1
    while (found / "metrics.json").exists():
        number += 1
        found = out.with_name(f"{out.name}-{number}")
    return found


def _page(folder: Path, found: Any, listed: list[tuple[Path, str]], pairs: list[Picture]) -> str:
    rows = [(name.replace("_", " "), str(one), one.note) for name, one in found.metrics.items()]
    events = [
        {"kind": "validation", "step": found.step, "split": split, "loss": 0.0, "by_level": levels}
        for split, levels in found.by_level.items()
    ]
    pictures = [Picture(embedded(file), prompt) for file, prompt in listed]
    body = [
        section("Measured", table(("", "value", "how"), rows), " ".join(found.notes)),
        section("Loss by noise level", charts([curves.over_levels(events)])),
        section("Drawn", gallery(pictures), "Trained captions, drawn once more from noise."),
        section("Learned by heart?", gallery(pairs), BY_HEART),
    ]
    return document(f"Evaluation of {folder.name}", f"After step {found.step:,} of {folder}.", body)
