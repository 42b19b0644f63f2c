"""The table of docs/families.md: every family of the tests' tiny checkpoints, from loading to what leaves.

    OMP_NUM_THREADS=1 python benchmarks/families.py [--only flux] [--out FILE.json] [--table FILE.json]

Each family: loaded; a guided picture of four steps beside its pipeline's, with first-order schedulers at the
same times, and by the folder's own scheduler; a LoRA and the whole network trained for a few steps by a
recipe; both exported, loaded back by diffusers and asked. Errors are the largest differences of pixels in
[0, 1], of exports those of the network's answer over its deviation; times are CPU seconds on one thread. Rows
are added to those in --out, so that the families can be measured in pieces; --table prints a file as the page
has it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tests.families import clips, pictures, test_image_conditioned_training, test_parity, test_training
from tests.families.zoo import NEGATIVE, PROMPT, ZOO

import sfumato
from sfumato.errors import Refused
from sfumato.run_folder import RunFolder
from sfumato.workflow.export import export

assert clips
EDITS = ("qwen-image-edit", "qwen-image-edit-plus", "flux-kontext", "flux-2-klein-edit")
CLIPS = ("wan-2.1-i2v", "wan-2.1-flf", "wan-2.2-i2v", "wan-2.2-ti2v")
COLUMNS = {
    "load": "load, s", "parity": "error", "own": "error, own scheduler", "lora_step": "LoRA step, s",
    "full_step": "full step, s", "lora_export": "LoRA, reloaded", "full_export": "whole, reloaded",
}  # fmt: skip


@contextmanager
def marks() -> Iterator[list[float]]:
    """CPU seconds at which steps end."""
    found: list[float] = []
    usual = RunFolder.event

    def event(self: RunFolder, kind: str, **known: Any) -> Any:
        if kind == "step":
            found.append(time.process_time())
        return usual(self, kind, **known)

    RunFolder.event = event  # type: ignore[method-assign]
    try:
        yield found
    finally:
        RunFolder.event = usual  # type: ignore[method-assign]


def error(model: Any, drawn: Any, **how: Any) -> float:
    """The largest difference of our picture from the pipeline's."""
    seen: list[torch.Tensor] = []
    decode, call = type(model).decode, drawn.case.call
    model.decode = lambda x, *pieces: seen.append(decode(model, x, *pieces)) or seen[-1]
    who = {"prompt": [PROMPT]} if drawn.case.prompt else {"labels": [3]} if call else {}
    model.generate(
        **who, negative=NEGATIVE if drawn.case.negative else None, steps=test_parity.STEPS,
        guidance=drawn.guidance, height=call.get("height"), width=call.get("width"),
        frames=call.get("num_frames"), latents=test_parity.start_of(model, drawn), **how,
        **test_parity.options_of(model, drawn, drawing=True),
    )  # fmt: skip
    del model.decode
    mine, theirs = (test_parity.shown(pixels).flatten() for pixels in (seen[0], drawn.pixels))
    return float((mine - theirs).abs().max())


def drawn_by(name: str, folder: Path, own: bool) -> Any:
    """The pipeline's picture; with its own scheduler, or the first-order one nearest to it."""
    case, usual = ZOO[name], test_parity.first_order
    test_parity.first_order = (lambda pipe: None) if own else usual
    try:
        drawn = test_parity.drawing(case, name, folder)
    finally:
        test_parity.first_order = usual
    if not drawn.pixels.numel():  # without an autoencoder the pictures are what there is
        draw = torch.Generator().manual_seed(7)
        with torch.no_grad():
            answer = drawn.pipe(num_inference_steps=test_parity.STEPS, generator=draw, output_type="pt")
        drawn.pixels = torch.as_tensor(answer.images) * 2 - 1
    return drawn


def recipe_of(name: str, home: Path, *model: str) -> tuple[Path, list[str]]:
    """(a recipe on data that this family learns from, further keys): pictures, edits of some, or clips."""
    side = f"data.resolution={64 if name == 'wan-2.2-ti2v' else 32}"
    if name in CLIPS:
        return test_image_conditioned_training.moving(name, home, *model), ["data.frames=5", side]
    if name in EDITS:
        keys = ["data.captions=files", "data.source_image=edit_source"]
        return test_image_conditioned_training.beside(name, home, *model), keys
    return test_training.write_recipe(name, home, *model), []


def trained(name: str, home: Path, base: Path, steps: int, *model: str) -> tuple[float, Path]:
    """(CPU seconds of a step, the run)."""
    home.mkdir()
    (home / "base").symlink_to(base)
    recipe, known = recipe_of(name, home, *model)
    with marks() as ends:
        keys = ["train.ema=0", "train.save_every=100", f"train.steps={steps}", "train.sanity=false"]
        sfumato.train(recipe, [*keys, *known])
    return statistics.median(b - a for a, b in pairwise(ends)), home / "run"


def measured(name: str) -> dict[str, Any]:
    """One row; None where the family does not do it, with the reason."""
    row: dict[str, Any] = {"family": name, "notes": []}

    def tried(column: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Refused as refusal:
            row["notes"].append(f"{column}: {refusal}")
            return None

    with tempfile.TemporaryDirectory() as folder, pictures.small():
        home = Path(folder)
        test_training.make_base(name, home)
        began = time.process_time()
        model = sfumato.load(home / "base")
        row["load"] = time.process_time() - began
        drawn = drawn_by(name, home / "drawn", False)
        row["parity"] = error(model, drawn, times=drawn.times, solver="euler")
        solver = model.sampling.solver
        if solver in ("ancestral", "sde-multistep"):
            row["own"] = None
            row["notes"].append(f"own: {type(model.sampling.scheduler).__name__} draws noise")
        else:
            row["own"] = error(model, drawn_by(name, home / "drawn", True))
        for kind, steps, keys in (("lora", 6, ('train = "lora"', "rank = 4")), ("full", 4, ())):
            done = tried(
                kind,
                lambda kind=kind, n=steps, keys=keys: trained(name, home / kind, home / "base", n, *keys),
            )
            row[f"{kind}_step"] = done and done[0]
            row[f"{kind}_export"] = done and tried(
                f"{kind} export",
                lambda run=done[1], out=home / f"out-{kind}": export(run, "diffusers", out).difference,
            )
    return {key: float(f"{one:.2g}") if isinstance(one, float) else one for key, one in row.items()}


def said(number: float | None) -> str:
    """A number as the table has it."""
    if number is None:
        return "–"
    return f"{number:.1e}" if 0 < number < 1e-3 else f"{number:g}"


def table(rows: list[dict[str, Any]]) -> str:
    """As the page has it."""
    lines = [f"| checkpoint | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in sorted(rows, key=lambda row: list(ZOO).index(row["family"])):
        lines.append(f"| {row['family']} | {' | '.join(said(row[key]) for key in COLUMNS)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the families that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", default="")
    parser.add_argument("--table", default="")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.table:
        print(table(json.loads(Path(asked.table).read_text())))
        return
    file = Path(asked.out) if asked.out else None
    rows = json.loads(file.read_text()) if file is not None and file.is_file() else []
    wanted = asked.only.split(",")
    for name in ZOO:
        if any(one in name for one in wanted):
            row = measured(name)
            print(json.dumps(row), flush=True)
            rows = [one for one in rows if one["family"] != name] + [row]
            if file is not None:
                file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
