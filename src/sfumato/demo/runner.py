"""The way every demo goes: a recipe that fills the minutes, training, drawing, judging, a page.

What was chosen is the recipe in the run's folder; the same command goes on with it.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch

from sfumato.data.sources.openmoji import LICENSE
from sfumato.data.sources.sample import Collection
from sfumato.demo.tasks import TASKS
from sfumato.errors import Refused, one_of
from sfumato.generation import Pipeline
from sfumato.recipe import Recipe
from sfumato.report import run_page
from sfumato.run_folder import RunFolder, write_atomic
from sfumato.training import device as devices
from sfumato.workflow import Run, train
from sfumato.workflow.dataset import collect

Progress = Callable[..., None]
Scores = tuple[dict[str, float], dict[str, str]]
"""Shares that are right, and how each was judged."""
MARK = "demo.json"


@dataclass(frozen=True)
class DemoReport:
    """What a judge is given: the trained model, the data, the run's folder and its last step."""

    model: Pipeline
    data: Collection
    folder: RunFolder
    step: int
    progress: Progress | None


@dataclass(frozen=True)
class DemoTask:
    """What one demo shows.

    recipe: (data, out, minutes or None for its own, device) → the recipe that fills the minutes.
    judge: draws, and says which shares are right.
    train: trains a recipe; a task that needs a base of its own trains that first, in `out/base`.
    """

    recipe: Callable[[str, Path, float | None, str], Recipe]
    judge: Callable[[DemoReport], Scores]
    train: Callable[[Recipe, Progress | None], Run] = lambda recipe, progress: train(
        recipe, progress=progress
    )


def task_of(name: str) -> DemoTask:
    """The task of that name, from its file."""
    one_of("task", name, TASKS)
    return import_module(f".{name.replace('-', '_')}", __package__).TASK


def run_task(
    name: str, data: str | None, out: Path, minutes: float | None, device: str, progress: Progress | None
) -> dict[str, Any]:
    """Go the whole way of a task; `demo.run` says what is given and returned."""
    began = time.perf_counter()
    out, task = out.absolute(), task_of(name)
    data = data or TASKS[name][0]
    one_of("data", data, TASKS[name])
    recipe = started_recipe(name, data, out) or task.recipe(data, out, minutes, device)
    RunFolder.create(out)
    write_atomic(out / MARK, json.dumps({"task": name, "data": data}))
    trained = task.train(recipe, progress)
    with RunFolder.open(out).lock() as folder:
        model = trained.model(device=str(devices.resolve(device)))
        drawing = time.perf_counter()
        accuracy, notes = task.judge(DemoReport(model, collect(recipe.data), folder, trained.step, progress))
        seconds = {**phases(out), "generate": time.perf_counter() - drawing}
        seconds["total"] = time.perf_counter() - began
        seconds = {name: round(value, 1) for name, value in seconds.items()}
        peak = peak_memory_gb()
        folder.event("phase", name="generate", seconds=seconds["generate"])
        event_fields = {"accuracy": accuracy, "notes": notes, "seconds": seconds, "peak_memory_gb": peak}
        folder.event("demo_evaluation", step=trained.step, **event_fields)
        if data.startswith("openmoji") and LICENSE not in [one.get("text") for one in folder.events()]:
            folder.event("note", text=LICENSE)
        run_page.write(folder)
    found = {"data": data, "seconds": seconds, "accuracy": accuracy, "peak_memory_gb": peak}
    return {**found, "report": str(folder.report)}


def started_recipe(name: str, data: str, out: Path) -> Recipe | None:
    """The recipe of a demo that was begun in this folder, or None.

    Raises:
        Refused: it was begun with another task or on other data.
    """
    effective = out / "effective.toml"
    if not effective.is_file() or not effective.read_text(encoding="utf-8").strip():
        return None
    recipe = Recipe.read(out)
    mark = json.loads((out / MARK).read_text(encoding="utf-8")) if (out / MARK).is_file() else {}
    was = mark.get("task", "text"), recipe.data.train
    if was != (name, data):
        raise Refused(
            f'{out} holds a demo of the task "{was[0]}" on "{was[1]}". Go on with --task {was[0]} '
            f"--data {was[1]}, or give this one, {name} on {data}, another --out."
        )
    return recipe


def phases(out: Path) -> dict[str, float]:
    """Seconds of each phase, over all the times the demo was started, its base's included."""
    spent: dict[str, float] = dict.fromkeys(("codec", "encode", "train"), 0.0)
    for place in (out / "base", out):
        for event in RunFolder.open(place).events() if (place / "events.jsonl").is_file() else ():
            if event["kind"] == "phase" and event["name"] in spent:
                spent[event["name"]] += event["seconds"]
    return spent


def peak_memory_gb() -> float:
    """The most memory this process ever held, in GB; on a GPU, the GPU's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return round(psutil.Process().memory_info()._asdict()["peak_wset"] / 1e9, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)
