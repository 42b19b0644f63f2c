"""What is due between two steps: the loss that tells, pictures, averages written down.

All processes take part, and share what there is to measure and to draw; one that is_rank_zero writes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import nn

from sfumato.run_folder import RunFolder
from sfumato.training.loop.early_stopping import EarlyStopping
from sfumato.training.loop.signals import Signals
from sfumato.training.precision import autocast
from sfumato.training.state.train_state import TrainState

Words = ParamSpec("Words")
T = TypeVar("T")
Preview = Callable[[nn.Module, int], None]
"""preview(network with averaged weights, step): draw something; the loop does not know what."""


class ValidationResult(Protocol):
    """The held-out loss and its standard error."""

    @property
    def loss(self) -> float: ...


Measure = Callable[[int, str], ValidationResult | None]
"""measure(step, "ema" or "raw"): record the held-out loss of the weights the network has now."""


@dataclass
class PeriodicTasks:
    """The duties of a run: each done every so many steps, and after the last.

    Args:
        train_state: the network in training and its averages; early_stopping: is told what is measured.
        measure, preview: what is done, None for nothing; every: steps between two of them.
    """

    train_state: TrainState
    run: RunFolder
    early_stopping: EarlyStopping
    measure: Measure | None = None
    measure_every: int = 0
    preview: Preview | None = None
    preview_every: int = 0
    is_rank_zero: bool = True

    def run_due(self, step: int, is_last: bool, signals: Signals) -> bool:
        """Do what is due after `step`; whether its weights are the best measured so far."""
        is_best = False
        if self.measure is not None and (is_last or _falls_on(step, self.measure_every)):
            with signals.at_once():
                is_best = self._measured(self.measure, step)
        if self.preview is not None and (
            is_last or self.early_stopping.is_over or _falls_on(step, self.preview_every)
        ):
            with signals.at_once(), self.with_averaged_weights():
                self.in_eval_mode(self.preview, self.train_state.network, step)
        posthoc_ema, every = self.train_state.posthoc_ema, self.train_state.settings.ema_snapshot_every
        writes = self.is_rank_zero or self.train_state.shards is not None
        if posthoc_ema is not None and writes and (is_last or _falls_on(step, every)):
            posthoc_ema.write(self.run, step, every)
        return is_best

    def _measured(self, measure: Measure, step: int) -> bool:
        """The held-out loss of the raw weights and of the averaged ones, which the verdict is about."""
        found = self.in_eval_mode(measure, step, "raw")
        if self.train_state.average is not None:
            with self.with_averaged_weights():
                found = self.in_eval_mode(measure, step, "ema")
        if found is None:
            return False
        was_over = self.early_stopping.is_over
        is_best = self.early_stopping.update(step, found.loss)
        if self.early_stopping.is_over and not was_over:
            rule = self.early_stopping
            reason = (
                f"the held-out loss is {found.loss:.4g} and has not fallen below the {rule.best_loss:.4g} "
                f"of step {rule.best_step} in {rule.since_best} measurements: the run ends here"
            )
            self.run.event("note", text=f"step {step}: {reason}")
        return is_best

    def with_averaged_weights(self) -> AbstractContextManager[None]:
        """The network with its averaged weights, if there are any."""
        return nullcontext() if self.train_state.average is None else self.train_state.average.applied()

    def in_eval_mode(self, work: Callable[Words, T], *args: Words.args, **words: Words.kwargs) -> T:
        """Do `work` without gradients, the network in evaluation mode; narrow weights compute narrowly."""
        network = self.train_state.network
        narrow = self.train_state.settings.weight_dtype != "fp32"
        context = autocast("bf16", self.train_state.weights[0].device) if narrow else nullcontext()
        shards = self.train_state.shards
        network.eval()
        try:
            with torch.no_grad(), context, nullcontext() if shards is None else shards.unsharded():
                return work(*args, **words)
        finally:
            network.train()


def _falls_on(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
