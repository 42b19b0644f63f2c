"""What `sfumato plan` says of a run, and what `sfumato train` then measures: memory and seconds a step.

    OMP_NUM_THREADS=1 python benchmarks/plan.py [--only 0-5] [--out FILE.jsonl]

Each recipe is planned by one process and trained by another. memory: the process's at its largest, which the
run records; seconds: of a step, between its records, the first left out. Results are appended, and all that
were are written as a table beside.
"""

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.run_folder import RunFolder

SCRATCH = """
text_encoder = "minilm"
latent_channels = 16
codec_width = 8
codec_steps = 3
codec_batch = 8
"""
RECIPE = """
[model]
{model}
[data]
train = "pictures"
[train]
steps = 8
log_every = 1
save_every = 4
validate_every = 0
threads = 1
sanity = false
[sample]
steps = 2
every = 4
prompts = ["a red circle"]
"""
DIT = "model.width=384 model.depth=6 model.heads=6 data.resolution=32"
NARROW = "model.width=256 model.depth=8 model.heads=4 data.resolution=64"
UNET = "model.denoiser=unet model.width=160 model.depth=2 model.heads=5 data.resolution=32"
CASES = {
    "DiT 384x6, 4x4 tokens": f"{DIT} train.batch=16",
    "the same, no averages": f"{DIT} train.batch=16 train.ema=0 train.ema_snapshot_every=0",
    "the same, in 4 parts": f"{DIT} train.batch=16 train.gradient_accumulation=4",
    "the same, 4 virtual ranks": f"{DIT} train.batch=16 train.exact_elastic=true",
    "the same, every block again": f"{DIT} train.batch=32 train.gradient_checkpointing=1",
    "the same, Lion": f"{DIT} train.batch=16 train.optimizer=lion",
    "the same, Muon": f"{DIT} train.batch=16 train.optimizer=muon",
    "the same, Adafactor": f"{DIT} train.batch=16 train.optimizer=adafactor",
    "the same, bf16 weights": f"{DIT} train.batch=4 train.weight_dtype=bf16",
    "DiT 640x4, 4x4 tokens": f"{DIT} model.width=640 model.depth=4 model.heads=10 train.batch=8",
    "DiT 256x8, 8x8 tokens": f"{NARROW} train.batch=16",
    "the same, batch 48": f"{NARROW} train.batch=48",
    "the same, every second again": f"{NARROW} train.batch=32 train.gradient_checkpointing=2",
    "UNet 160": f"{UNET} train.batch=16",
    "ControlNet beside the DiT 384x6": "BASE model.train=controlnet data.control_image=canny "
    "data.resolution=32 train.batch=16",
    "LoRA of it, rank 32": "BASE model.train=lora model.rank=32 data.resolution=32 train.batch=32",
    "UNet 160, no averages": f"{UNET} train.batch=16 train.ema=0 train.ema_snapshot_every=0",
}


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["sfumato.workflow", "transformers.models.clip.modeling_clip"])


def command(*words: str) -> str:
    """What `sfumato …` prints, in a process of its own that is forked from one with everything imported."""
    with tempfile.NamedTemporaryFile("r") as said:
        process = SERVER.Process(target=run, args=(words, said.name))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{' '.join(words)} ended with {process.exitcode}")
        return said.read()


def run(words: tuple[str, ...], said: str) -> None:
    """The command, its words written to a file."""
    from sfumato.cli import main as sfumato

    sys.argv = ["sfumato", *words]
    with Path(said).open("w") as file, redirect_stdout(file):
        sfumato()


def draw(place: Path, count: int = 64) -> None:
    """Pictures of noise with captions of two to twelve words."""
    (place / "pictures").mkdir()
    rows = []
    for index in range(count):
        draws = random.Random(index)
        Image.frombytes("RGB", (64, 64), draws.randbytes(64 * 64 * 3)).save(place / f"pictures/{index}.png")
        words = draws.choices(["a", "red", "round", "thing", "beside", "green", "water"], k=2 + index % 11)
        rows.append({"file_name": f"{index}.png", "caption": " ".join(words)})
    (place / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def one(name: str, place: Path, folder: str) -> dict[str, Any]:
    """Predicted and measured of a case."""
    recipe, base, said = place / "recipe.toml", place / "base", CASES[name].split()
    common = [str(recipe), f"data.cache_dir={place / 'store'}"]
    recipe.write_text(RECIPE.format(model=SCRATCH))
    if said[0] == "BASE":
        said = said[1:]
        if not base.exists():
            command("train", *common, *DIT.split(), "train.steps=1", f"output={base}")
        recipe.write_text(RECIPE.format(model=f'base = "{base}"'))
    words = [*common, *said, f"output={place / folder}"]
    command("encode", *words)  # so that the plan's process loads what the training's does
    plan = json.loads(command("plan", *words, "--json"))
    command("train", *words)
    events = RunFolder.open(place / folder).events()
    steps = [event["seconds"] for event in events if event["kind"] == "step"]
    taken = [late - soon for soon, late in pairwise(steps)]
    (train,) = [event for event in events if event["kind"] == "phase" and event["name"] == "train"]
    return {
        "name": name, "parameters": plan["trained_parameters"], "step_gb": plan["memory_gb"],
        "predicted_gb": plan["process_gb"], "measured_gb": train["process_gb"],
        "predicted_s": plan["seconds_per_step"], "measured_s": round(statistics.median(taken), 3),
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Of all cases, in their order."""
    lines = [
        "| run | trained | step GB | process GB, said | measured | off | step s, said | measured | off |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(
        {row["name"]: row for row in rows}.values(), key=lambda row: [*CASES].index(row["name"])
    ):
        off = [row[f"predicted_{unit}"] / row[f"measured_{unit}"] - 1 for unit in ("gb", "s")]
        lines.append(
            f"| {row['name']} | {row['parameters'] / 1e6:.1f} M | {row['step_gb']:.3f} "
            f"| {row['predicted_gb']:.3f} | {row['measured_gb']:.3f} | {off[0]:+.1%} "
            f"| {row['predicted_s']:.2f} | {row['measured_s']:.2f} | {off[1]:+.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=f"0-{len(CASES) - 1}")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    first, _, last = asked.only.partition("-")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder))
        for number, name in [*enumerate(CASES)][int(first) : int(last or first) + 1]:
            rows.append(one(name, Path(folder), f"run-{number}"))
            print(rows[-1], flush=True)
            if asked.out:
                with asked.out.open("a") as lines:
                    lines.write(json.dumps(rows[-1]) + "\n")
    if asked.out:
        rows = [json.loads(line) for line in asked.out.read_text().splitlines()]
    print(table(rows))


if __name__ == "__main__":
    main()
