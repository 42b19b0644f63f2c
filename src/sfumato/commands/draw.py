"""The command that draws."""

from pathlib import Path
from typing import Any

from ..errors import Refused
from ..record import write_atomic
from ..studio.page import document, embedded, gallery, section
from .console import progress, result


def generate(
    folder: Path,
    prompts: list[str],
    count: int,
    wanted: dict[str, Any],
    out: Path,
    device: str,
    as_json: bool,
) -> None:
    """Draw `count` pictures of each prompt into `out`, with a page that shows them."""
    from ..generation import load
    from ..generation.sheet import contact_sheet
    from ..training.device import resolve

    model = load(folder, device=str(resolve(device)))
    if not prompts and model.conditioner.kind != "none":
        raise Refused('Say what to draw: --prompt "a red apple". Repeat --prompt for several pictures.')
    asked = [prompt for prompt in prompts or [""] for _ in range(count)]
    options: dict[str, Any] = {
        name: value for name, value in wanted.items() if value not in (None, "", 0) or name == "seed"
    }
    with progress() as shown:
        pictures = model.generate(
            prompt=asked, watch=lambda done, total: shown(done, total, "drawing"), **options
        )
    out.mkdir(parents=True, exist_ok=True)
    listed = []
    for index, (prompt, picture) in enumerate(zip(asked, pictures, strict=True)):
        seed = wanted["seed"] + index
        file = out / f"{index:03d}-{slug(prompt)}-{seed}.png"
        picture.save(file)
        listed.append({"file": str(file), "prompt": prompt, "seed": seed})
    sheet, page = out / "sheet.png", out / "index.html"
    contact_sheet(pictures, asked).save(sheet)
    shown_pictures = [(embedded(Path(one["file"])), one["prompt"], f"seed {one['seed']}") for one in listed]
    write_atomic(page, document("Pictures", f"By {folder}.", [section("Drawn", gallery(shown_pictures))]))
    result(
        {"pictures": listed, "sheet": sheet, "page": page},
        "\n".join([*(one["file"] for one in listed), str(sheet), str(page)]),
        as_json,
    )


def slug(text: str, most: int = 40) -> str:
    """A text as a part of a file's name."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in text.lower())
    return "-".join(part for part in kept.split("-") if part)[:most] or "picture"
