"""Which measurement was best, and whether more steps still help.

Held-out loss is measured on the same samples with the same noise each time, so two measurements differ
by the weights alone: any fall is an improvement.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

SPIKE = 6.0
"""Standard deviations above the recent losses at which a loss is noted."""


@dataclass
class EarlyStopping:
    """What the measurements of a run say so far.

    Args:
        patience: measurements in a row without a new best after which the run is over; 0 for never.
    """

    patience: int = 0
    best_step: int = 0
    best_loss: float = field(default=float("inf"))
    since_best: int = 0
    last_step: int = 0

    def update(self, step: int, loss: float) -> bool:
        """Take in the held-out loss after `step`; whether it is the best so far."""
        if step > self.last_step:
            self.last_step = step
            self.since_best += 1
            if loss < self.best_loss:
                self.best_step, self.best_loss, self.since_best = step, loss, 0
        return self.best_step == step

    @property
    def is_over(self) -> bool:
        """Whether the stop rule asks to end the run."""
        return 0 < self.patience <= self.since_best

    def state(self) -> dict[str, Any]:
        """As JSON; None stands for no measurement yet."""
        loss = None if self.best_loss == float("inf") else self.best_loss
        return {"best": self.best_step, "loss": loss, "since": self.since_best, "heard": self.last_step}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`, as `state()` gave it."""
        self.best_step, self.since_best, self.last_step = state["best"], state["since"], state["heard"]
        self.best_loss = float("inf") if state["loss"] is None else state["loss"]


class LossSpikes:
    """Notes a loss far above the twenty before it."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=20)

    def update(self, step: int, loss: float) -> str:
        """A sentence about a jump, else nothing."""
        sentence = ""
        if len(self.recent) == self.recent.maxlen:
            usual = mean(self.recent)
            if loss > usual + SPIKE * max(stdev(self.recent), 0.01 * usual):
                sentence = f"step {step}: the loss jumped to {loss:.4g} from {usual:.4g}"
        self.recent.append(loss)
        return sentence
