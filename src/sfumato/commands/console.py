"""What a command says: messages and progress on stderr, results on stdout.

Much of it comes from files, so all of it is shown without what would steer a terminal.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sfumato.errors import for_terminal, json_for_terminal
from sfumato.report.page import duration


def say(text: str) -> None:
    """A message, on stderr."""
    print(for_terminal(text), file=sys.stderr, flush=True)


def is_rank_zero() -> bool:
    """Whether this process speaks for all that were started together."""
    return os.environ.get("RANK", "0") == "0"


def result(value: Any, text: str, as_json: bool) -> None:
    """A result, on stdout: `text`, or `value` as one line of JSON; of many processes the first says it."""
    if not is_rank_zero():
        return
    print(json_for_terminal(value) if as_json else for_terminal(text), flush=True)


class Progress:
    """Shows how far a phase is: a bar on a terminal, elsewhere a line every ten seconds.

    Call it with (done, total, phase) and any figures to show beside, for example loss=0.31.
    """

    def __init__(self) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._said: dict[str, float] = {}
        self._began: dict[str, tuple[float, int]] = {}

    def __call__(self, done: int, total: int, phase: str, **figures: float) -> None:
        """Show that `done` of `total` are done in `phase`."""
        notes = "  ".join(
            f"{name.replace('_', ' ')} {value:.4g}" for name, value in figures.items() if value == value
        )
        notes = f"{self._speed(done, total, phase, self._bars is None)}  {notes}".strip()
        if self._bars is None:
            self._line(done, total, phase, notes)
            return
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(for_terminal(phase), total=total, notes=notes)
        self._bars.update(self._tasks[phase], completed=done, total=total, notes=notes)

    def _speed(self, done: int, total: int, phase: str, ends: bool) -> str:
        """So many a second since the phase began and, if `ends`, how long the rest will take."""
        now = time.monotonic()
        begin, first = self._began.setdefault(phase, (now, done))
        if done <= first or now - begin < 1:
            return ""
        rate = (done - first) / (now - begin)
        left = f", {duration((total - done) / rate)} left" if ends and done < total else ""
        return f"{rate:.3g}/s{left}"

    def _line(self, done: int, total: int, phase: str, notes: str) -> None:
        now = time.monotonic()
        first = phase not in self._said
        if (
            first
            or (done < total and now - self._said[phase] > 10)
            or (done >= total and self._said[phase] > 0)
        ):
            say(f"{phase}: {done} of {total}  {notes}".rstrip())
            self._said[phase] = now if done < total else -1.0

    def start(self) -> None:
        """Show bars if stderr is a terminal."""
        if not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[notes]}", style="dim", markup=False),
        )
        self._bars = Bars(*columns, console=Console(stderr=True), speed_estimate_period=60)
        self._bars.start()

    def stop(self) -> None:
        """Leave the bars as they are."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


@contextmanager
def progress() -> Iterator[Progress]:
    """Progress for the length of a block."""
    bars = Progress()
    bars.start()
    try:
        yield bars
    finally:
        bars.stop()
