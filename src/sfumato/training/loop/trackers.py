"""Trackers hear what the run records, and pass it on: events.jsonl stays the truth.

A tracker is a listener of the run folder; a missing package is refused by name before training starts.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from sfumato.errors import Refused, one_of
from sfumato.run_folder import RunFolder

Scalars = Callable[[dict[str, float], int], None]
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


def attach(run: RunFolder, names: tuple[str, ...]) -> Callable[[], None]:
    """Let each named tracker hear the run's events.

    Returns:
        a function that ends them, to be called when the run stops.
    Raises:
        Refused: unknown, not installed, or it does not begin.
    """
    openers = {"tensorboard": _tensorboard, "wandb": _projects("wandb"), "trackio": _projects("trackio")}
    check(names)
    opened = [openers[name](run) for name in names]
    listeners = [_listener(log) for log, _ in opened]
    run.listeners += listeners

    def end() -> None:
        for listener, (_, close) in zip(listeners, opened, strict=True):
            run.listeners.remove(listener)
            close()

    return end


def check(names: tuple[str, ...]) -> None:
    """Raises Refused for a tracker that is unknown or not installed."""
    for name in names:
        _package(one_of("tracker", name, PACKAGES), PACKAGES[name])


def scalars(event: dict[str, Any]) -> dict[str, float]:
    """The numbers of an event worth a curve, by name; {} for other events."""
    if event["kind"] == "step":
        names = ("loss", "learning_rate", "gradient_norm", "samples_per_second")
        return {f"train/{name}": float(event[name]) for name in names if event.get(name) is not None}
    if event["kind"] == "validation":
        place = f"{event['split']}/{event['weights']}"
        levels = {f"{place}/level {level['level']:.2f}": float(level["loss"]) for level in event["by_level"]}
        return {f"{place}/loss": float(event["loss"]), **levels}
    return {}


def _listener(log: Scalars) -> Callable[[dict[str, Any]], None]:
    def listen(event: dict[str, Any]) -> None:
        if found := scalars(event):
            log(found, int(event["step"]))

    return listen


def _package(name: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as problem:
        raise Refused(
            f'train.trackers names "{name}", which is not installed. Run `pip install {name}`, '
            "or leave it out: events.jsonl and the report have everything."
        ) from problem


def _tensorboard(run: RunFolder) -> tuple[Scalars, Callable[[], None]]:
    writer = _package("tensorboard", PACKAGES["tensorboard"]).SummaryWriter(str(run.path / "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _projects(name: str) -> Callable[[RunFolder], tuple[Scalars, Callable[[], None]]]:
    """Weights & Biases, and trackio, which speaks the same words."""

    def opened(run: RunFolder) -> tuple[Scalars, Callable[[], None]]:
        package = _package(name, name)
        try:
            package.init(project="sfumato", name=run.path.name)
        except Exception as problem:  # a service answers in errors of its own: no key, no network, no project
            message = " ".join(str(problem).split())
            raise Refused(
                f'train.trackers names "{name}", which could not begin: {message} Mend that or leave it out: '
                "events.jsonl and the report have everything."
            ) from problem
        return (lambda values, step: package.log(values, step=step)), package.finish

    return opened
