"""Theories trained and judged alike: the same codec, network, data, steps and seeds.

    python benchmarks/theory_trained.py flow-matching examples/even.py:even --seeds 3 --steps 1000 > a.jsonl
    python benchmarks/theory_trained.py --gather a.jsonl b.jsonl …

The second form merges what runs have printed into docs/pictures/theory-trained.jsonl, from which
docs/figures.py draws, and writes the table of docs/inventing-a-theory.md.

Losses of two theories are not comparable, for they weigh errors differently. What is: the error of the
canonical velocity v = cos φ·x_T − sin φ·x_0 at given angles φ, on held-out pictures and fixed noise. An
error e in v is an error sin φ·e in x_0, whatever the network answers.
Pictures are judged by the shapes' own reader.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sfumato.data.settings import DataSettings
from sfumato.data.sources import shape_reader
from sfumato.demo.drawing import chosen
from sfumato.demo.text import PLANS
from sfumato.generation import Pipeline
from sfumato.models import Condition
from sfumato.recipe import Recipe
from sfumato.theory import noise
from sfumato.workflow import train
from sfumato.workflow.dataset import collect
from sfumato.workflow.encode_samples import encoded_samples
from sfumato.workflow.train_codec import codec_folder, codec_key, trained_codec

ANGLES = [
    math.pi / 2 * share
    for share in (0.03, 0.08, 0.15, 0.23, 0.32, 0.41, 0.5, 0.59, 0.68, 0.77, 0.86, 0.95, 1.0)
]
CODEC_SEED = 100


def recipe_of(theory: str, times: str, seed: int, steps: int, out: Path, codec: str) -> Recipe:
    """The demo's own recipe on shapes, with this theory and seed."""
    base = PLANS["shapes"].recipe
    return replace(
        base,
        output=str(out / f"{Path(theory.split(':')[0]).stem}-{times}-{seed}"),
        seed=seed,
        model=replace(base.model, theory=theory, codec=codec, codec_steps=400),
        data=DataSettings(train="shapes", resolution=32, cache_dir=str(out / "store")),
        train=replace(
            base.train, steps=steps, timestep_sampling=times, threads=1, save_every=10**6, validate_every=0
        ),
        sample=replace(base.sample, every=0),
    )


@torch.no_grad()
def by_angle(model: Pipeline, recipe: Recipe, most: int = 131) -> list[float]:
    """Mean squared error of v on held-out pictures at each of ANGLES."""
    collection = collect(recipe.data)
    bucket = (recipe.data.resolution, recipe.data.resolution)
    held = encoded_samples(recipe, collection.samples, bucket, model, None).with_split("held_out")
    batch = held.read(list(range(min(most, len(held)))), 0, 0)
    x_0, condition = batch.latents.float(), Condition.stack([dict(row) for row in batch.conditions])
    found = []
    for index, angle in enumerate(ANGLES):
        x_T = noise.normal(tuple(x_0.shape[1:]), 7, batch.ids, step=index, purpose="by angle")
        t = model.theory.time_of(angle).expand(len(x_0))
        x_t = model.theory.mix(x_0, x_T, t)
        r, from_out, from_z = (float(c[0]) for c in model.theory.velocity_coefficients(t))
        v = from_out * model.predict(x_t, t, condition) + from_z * x_t / r
        found.append(float((v - (math.cos(angle) * x_T - math.sin(angle) * x_0)).square().mean()))
    return found


def accuracy(model: Pipeline, recipe: Recipe, count: int) -> dict[str, float]:
    """Shares of pictures of unseen combinations that show what was asked."""
    prompts = chosen([one.captions[0] for one in collect(recipe.data).with_split("held_out")], count)
    drawn = model.generate(prompts, seed=[1_000_003 + i for i in range(len(prompts))])
    verdicts = [shape_reader.judge(picture, prompt) for picture, prompt in zip(drawn, prompts, strict=True)]
    return {name: sum(v[name] for v in verdicts) / len(verdicts) for name in ("shape_and_color", "position")}


def one(theory: str, times: str, seed: int, steps: int, out: Path, codec: str, count: int) -> dict[str, Any]:
    """Train, measure, and return one row."""
    recipe = recipe_of(theory, times, seed, steps, out, codec)
    began = time.perf_counter()
    model = train(recipe).model()
    row = {
        "theory": theory,
        "times": times,
        "seed": seed,
        "steps": steps,
        "by_angle": by_angle(model, recipe),
    }
    return {**row, **accuracy(model, recipe, count), "seconds": time.perf_counter() - began}


# ---------------------------------------------------------------- what runs have printed, on a page

DOCS = Path(__file__).parent.parent / "docs"
MERGED, PAGE = DOCS / "pictures" / "theory-trained.jsonl", DOCS / "inventing-a-theory.md"


def gather(files: list[Path]) -> list[dict[str, Any]]:
    """One row per (name, steps, seed), a later file's before an earlier one's; flow matching first."""
    kept: dict[tuple[str, int, int], dict[str, Any]] = {}
    for line in (line for file in files for line in file.read_text().splitlines() if line.startswith("{")):
        row = json.loads(line)
        name = row.get("name") or named(row["theory"], row["times"])
        kept[name, row["steps"], row["seed"]] = {
            "name": name, "seed": row["seed"], "steps": row["steps"],
            "angles": [round(angle * 2 / math.pi, 4) for angle in ANGLES],
            "by_angle": [round(error, 4) for error in row["by_angle"]],
            "shape_and_color": round(row["shape_and_color"], 4), "position": round(row["position"], 4),
        }  # fmt: skip
    firsts = list(dict.fromkeys(name for name, _, _ in kept))
    firsts.sort(key=lambda name: (name != "flow matching", not name.startswith("flow")))
    return sorted(kept.values(), key=lambda row: (firsts.index(row["name"]), row["seed"]))


def named(theory: str, times: str) -> str:
    """A theory and its density of times as the page calls them."""
    plain = theory.split(":")[-1] if ".py:" in theory else theory.replace("-", " ")
    if times == "uniform" or ".py:" in theory:
        return plain
    return f"{plain.removesuffix(' matching')}, {times} times"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard error over seeds; an error e of v is sin²φ·e of x_0."""
    head = "| theory | seeds | shape and colour right, % | position right, % | error of v | error of x_0 |"
    lines = [head, "|" + "---|" * 6]
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        of_v = [statistics.mean(row["by_angle"]) for row in own]
        of_x = [
            statistics.mean(e * math.sin(a) ** 2 for a, e in zip(ANGLES, row["by_angle"], strict=True))
            for row in own
        ]
        right = [[100 * row[key] for row in own] for key in ("shape_and_color", "position")]
        cells = [name, str(len(own)), *(spread(one, 0) for one in right), spread(of_v, 3), spread(of_x, 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(found: list[float], digits: int) -> str:
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    return f"{statistics.mean(found):.{digits}f} ± {error:.{digits}f}"


def write_page(rows: list[dict[str, Any]]) -> None:
    MERGED.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, rest = PAGE.read_text().split("<!-- table -->\n")
    after = rest.split("<!-- end -->")[1]
    PAGE.write_text(f"{before}<!-- table -->\n{table(rows)}\n<!-- end -->{after}")


def main() -> None:
    """Train what is missing, measure, print one JSON line a run; or gather what was printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("theories", nargs="*", help="a name, or FILE.py:NAME; with /DENSITY for other times")
    parser.add_argument("--gather", nargs="+", type=Path, metavar="FILE", help="merge what runs have printed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--judged", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/theory-trained"))
    asked = parser.parse_args()
    if asked.gather:
        rows = gather(asked.gather)
        write_page(rows)
        print(table(rows))
        return
    if not asked.theories:
        parser.error("name the theories to train, or --gather what was printed")
    torch.set_num_threads(1)
    pilot = recipe_of("flow-matching", "uniform", CODEC_SEED, asked.steps, asked.out.absolute(), "auto")
    codec = codec_of(pilot)
    for seed in range(1, asked.seeds + 1):
        for word in asked.theories:
            theory, _, times = word.partition("/") if ".py:" not in word else (word, "", "")
            theory, times = (theory, times or "uniform")
            row = one(theory, times, seed, asked.steps, asked.out.absolute(), codec, asked.weighted_loss)
            print(json.dumps(row), flush=True)


def codec_of(recipe: Recipe) -> str:
    """The folder of the one codec that all runs share, trained first if it is missing."""
    collection = collect(recipe.data)
    side = (recipe.data.resolution, recipe.data.resolution)
    trained_codec(recipe, collection.samples, side, torch.device("cpu"))
    return str(codec_folder(recipe, codec_key(recipe, collection.samples, side)))


if __name__ == "__main__":
    main()
