"""The demo: the whole way on an embedded data set, as far as a few minutes on this machine go.

Each task is one file of this folder that says what it trains, on which data, and who judges.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfumato.demo.tasks import TASKS


def run(
    data: str | None = None,
    out: Path | str = "runs/demo",
    minutes: float | None = None,
    device: str = "auto",
    progress: Callable[..., None] | None = None,
    task: str = "text",
) -> dict[str, Any]:
    """Train what the task shows, draw, judge, write the page.

    Args:
        data: one of the task's embedded sets; default its first.
        out: the run's folder; the store lies in it, so nothing from before is used.
        minutes: what the demo may take; more is better.
        task: one of TASKS.
    Returns:
        data, seconds of each phase, accuracy as fractions, peak_memory_gb, report (a path).
    """
    from sfumato.demo.runner import run_task

    return run_task(task, data, Path(out), minutes, device, progress)


__all__ = ["TASKS", "run"]
