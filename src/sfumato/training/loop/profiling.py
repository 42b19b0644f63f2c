"""Where a step's time goes: a trace for a viewer, and a table for a reader.

A few steps are watched after the first ones have warmed up. `trace.json` opens in Perfetto or
chrome://tracing; `table.txt` begins with the shares of a step's parts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from sfumato.run_folder import write_atomic

WARM, WATCHED = 3, 5
PARTS = ("data", "forward", "backward", "gradients", "optimizer", "averages")
"""What a step consists of; the rest is the loop's own."""

part = record_function
"""Within `part("forward")`, time counts as the forward pass's."""


@contextmanager
def profiled(folder: Path | None, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yield what is to be called after each step; a trace and a table are written into `folder`."""
    if folder is None:
        yield lambda: None
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)

    def on_trace_ready(found: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(folder / "trace.json"))
        write_atomic(folder / "table.txt", table(found))
        say(f"Profile of {WATCHED} steps: {folder / 'table.txt'} and {folder / 'trace.json'}.")

    schedule = torch.profiler.schedule(wait=WARM - 1, warmup=1, active=WATCHED, repeat=1)
    with profile(activities=activities, schedule=schedule, on_trace_ready=on_trace_ready) as running:
        yield running.step


def table(found: Any) -> str:
    """The shares of a step's parts, then the operations that took longest."""
    events = found.key_averages()
    averages = {event.key: event for event in events}
    step = max((one.cpu_time_total for name, one in averages.items() if name == "step"), default=0.0)
    lines = [f"{'part of a step':<20}{'ms a step':>12}{'share':>9}"]
    known = 0.0
    for name in PARTS:
        taken = averages[name].cpu_time_total if name in averages else 0.0
        known += taken
        lines.append(f"{name:<20}{taken / 1e3 / WATCHED:>12.2f}{taken / max(step, 1e-9):>9.1%}")
    rest = max(0.0, step - known)
    lines.append(f"{'the rest':<20}{rest / 1e3 / WATCHED:>12.2f}{rest / max(step, 1e-9):>9.1%}")
    lines.append(f"{'in all':<20}{step / 1e3 / WATCHED:>12.2f}{1:>9.1%}")
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return "\n".join(lines) + "\n\n" + events.table(sort_by=key, row_limit=40)
