"""A run of so many minutes: the clock decides the last step while the run goes on.

The learning rate is schedule(done), and `done`, the share of training that is done, is a piecewise linear
function of the step. At each of its knots the clock was asked how many more steps fit; from there `done`
rises straight to 1 at the last of them. So any schedule comes to its end in time, without a jump, on a
machine that grows slower or faster on the way. Knots are written down: with them a step is again a pure
function of its number, and a run that goes on from a checkpoint repeats them instead of asking the clock.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sfumato.training.settings import TrainSettings

EVENT = "time_budget"
"""The kind of the events that record the knots."""
SETTINGS = ("minutes", "min_steps", "steps")
"""What the clock's decisions depend on."""
OFTEN = 10
"""Steps after which the clock is looked at every so many steps; before, after each."""
LEAST_SHARE = 0.01
"""Of the minutes: so long the pace is measured before it decides anything."""
TOLERANCE = 0.1
"""A new last step is decided when it differs by more than this share of the steps that remain."""
LANDING = 0.2
"""Where the minutes are over too early, training is done in this share of the steps made, times the share
that is left: the learning rate falls instead of breaking off."""


@dataclass(frozen=True)
class Knot:
    """From `step` on, of whose training `done` is done, the last step is `last`."""

    step: int
    done: float
    last: int

    def done_at(self, step: int) -> float:
        """The share of training that is done before step `step`."""
        return min(1.0, self.done + (1 - self.done) * (step - self.step) / max(1, self.last - self.step))


class TimeBudget:
    """What decides a run's last step, and the share of training that is done.

    Args:
        settings: their `minutes`, `min_steps` and `steps`; without minutes, `steps` is all there is to it.
        spent: seconds that the run took before its first step.
        clock: seconds, from anywhere on.
        agree: gives all processes the leading one's number.
    """

    def __init__(
        self,
        settings: TrainSettings,
        spent: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
        agree: Callable[[int], int] = int,
    ) -> None:
        self.settings, self.clock, self.agree = settings, clock, agree
        self.seconds = 60 * settings.minutes
        self.knot: Knot | None = None
        self._spent, self._before, self._began = spent, 0.0, clock()
        self._done_before = 0.0
        self._recorded: dict[int, int] = {}
        self._marks: list[tuple[int, float]] = []
        self._pace = self._over = 0.0

    @property
    def is_used(self) -> bool:
        """Whether the clock decides."""
        return self.settings.minutes > 0

    @property
    def elapsed(self) -> float:
        """Seconds the run has taken, over all the times it was started."""
        return self._spent + self._before + self.clock() - self._began

    @property
    def last_step(self) -> int:
        """The last step, as far as it is known."""
        return self.settings.steps if self.knot is None else self.knot.last

    def done(self, step: int) -> float | None:
        """The share of training that is done before step `step`; None where the settings' steps say so."""
        if not self.is_used:
            return None
        return self._done_before if self.knot is None else self.knot.done_at(step)

    def decide(self, step: int) -> Knot | None:
        """After `step` updates: the new knot, if there is one; all processes ask at the same steps."""
        if not self.is_used or (step > OFTEN and step % OFTEN):
            return None
        if not (last := self.agree(self._decided_last_step(step))):
            return None
        self.knot = Knot(step, self.done(step) or 0.0, last)
        self._over = self.elapsed + (last - step) * self._pace - self.seconds
        return self.knot

    def _decided_last_step(self, step: int) -> int:
        """The last step that is decided now; 0 leaves it as it is."""
        elapsed = self.elapsed
        self._marks.append((step, elapsed))
        while len(self._marks) > 2 and self._marks[1][0] <= step * 3 // 4:
            self._marks.pop(0)  # the pace of late counts
        if self._recorded:
            return self._recorded_last_step(step)
        since, at = self._marks[0]
        if since == step or (elapsed - at < LEAST_SHARE * self.seconds and elapsed < self.seconds):
            return 0
        self._pace = (elapsed - at) / (step - since)
        last = min(max(self._fitting(step), self._least(step)), max(self.settings.steps, step + 1))
        if self.knot is None:
            return last
        differs = abs(last - self.knot.last) > max(OFTEN, TOLERANCE * (self.knot.last - step))
        return last if differs and step < self.knot.last else 0

    def _recorded_last_step(self, step: int) -> int:
        last = self._recorded.get(step, 0)
        self._recorded = {one: its for one, its in self._recorded.items() if one > step}
        return last

    def _fitting(self, step: int) -> int:
        """The last step that ends in time at the pace of late."""
        return step + int(max(0.0, self.seconds - self.elapsed) / max(self._pace, 1e-9))

    def _least(self, step: int) -> int:
        """The last step that a good end needs, in time or not."""
        landing = step + math.ceil(LANDING * step * (1 - (self.done(step) or 0.0)))
        return max(landing, self.settings.min_steps, step + 1)

    @property
    def is_late(self) -> bool:
        """Whether, by the newest knot, the run takes longer than its minutes by more than paces err."""
        return self._over > 0.05 * self.seconds

    def explain(self) -> str:
        """What the newest knot decided, and why that is later than asked for where it is."""
        assert self.knot is not None
        step, last = self.knot.step, self.knot.last
        words = (
            f"At step {step:,}, after {self.elapsed:.0f} of {self.seconds:.0f} seconds: {last:,} steps in all"
        )
        if not self.is_late:
            return f"{words}."
        why = (
            f"train.min_steps = {last:,} are made"
            if last == self.settings.min_steps
            else "the learning rate falls to 0 before the end"
        )
        return (
            f"{words}. Only {self._fitting(step):,} would fit at {self._pace:.2g} s a step, but {why}: "
            f"about {(self.seconds + self._over) / 60:.1f} minutes instead of {self.settings.minutes:.1f}."
        )

    def event(self) -> dict[str, Any]:
        """What the run records of the newest knot."""
        assert self.knot is not None
        asked = {name: getattr(self.settings, name) for name in SETTINGS}
        knot = {"step": self.knot.step, "done": round(self.knot.done, 4), "last_step": self.knot.last}
        return {**knot, "seconds": round(self.elapsed, 1), "text": self.explain(), "asked": asked}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        knot = self.knot
        return {
            "seconds": self.elapsed - self._spent,
            "knot": None if knot is None else [knot.step, knot.done, knot.last],
            "done": self._done_before,
            "asked": {name: getattr(self.settings, name) for name in SETTINGS},
        }

    def load(self, step: int, state: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> None:
        """Go on after `step` updates from what `state` gave.

        Knots that were decided after that checkpoint, and recorded, are repeated. Where other minutes or
        steps are asked for now, what was decided is forgotten: as much is done as of these minutes is over.
        """
        if not self.is_used:
            return
        self._before = float(state.get("seconds", 0.0))
        asked = {name: getattr(self.settings, name) for name in SETTINGS}
        if state.get("asked") == asked:
            self._done_before = float(state["done"])
            self.knot = Knot(*state["knot"]) if state["knot"] else None
            self._recorded = {
                int(one["step"]): int(one["last_step"])
                for one in events
                if one["kind"] == EVENT and one.get("asked") == asked and int(one["step"]) > step
            }
            return
        self._done_before = self.agree(round(1e6 * min(1.0, self.elapsed / self.seconds))) / 1e6
        if self._done_before == 1 and step >= self.settings.min_steps:
            self.knot = Knot(step, 1.0, step)
