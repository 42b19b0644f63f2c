"""The command that shows the whole way."""

from pathlib import Path

from sfumato.commands.console import progress, result
from sfumato.demo import TASKS
from sfumato.errors import Refused, one_of


def demo(task: str, data: str | None, out: Path, minutes: float | None, device: str, as_json: bool) -> None:
    """Train what a task shows, draw, judge; print the page's path, or one line of JSON."""
    one_of("--task", task, TASKS)
    if data is not None:
        one_of("--data", data, TASKS[task])
    if minutes is not None and not 0 < minutes < float("inf"):
        raise Refused(f"--minutes is {minutes}, but it must be a positive number.")
    from sfumato.demo import run

    with progress() as bars:
        found = run(data, out, minutes, device, bars, task)
    seconds = found["seconds"]
    lines = [f"{name.replace('_', ' '):<18} {share:.1%}" for name, share in found["accuracy"].items()]
    lines += [f"{name + ' seconds':<18} {seconds[name]:.1f}" for name in seconds]
    lines.append(f"{'peak memory':<18} {found['peak_memory_gb']:.2f} GB")
    result(found, "\n".join([*lines, str(found["report"])]), as_json)
