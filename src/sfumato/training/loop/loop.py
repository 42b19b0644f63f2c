"""The loop: the same function of (recipe, seed, step) whether it ran through, was stopped or was killed.

A step depends on nothing but the weights, the optimizer's state and its own number: samples, times,
noise and dropped captions are drawn from the number, and torch's own generator is seeded by it. So a
run that goes on from a checkpoint ends with the bits of one that was never interrupted.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import SIGTERM

import torch
from torch import Tensor, nn

from sfumato.errors import Failed, for_terminal
from sfumato.run_folder import RunFolder
from sfumato.training import device, precision
from sfumato.training.distributed import context_parallel, sharding, strategy
from sfumato.training.distributed.gradient_buckets import gradients_of
from sfumato.training.distributed.processes import (
    BatchSplit,
    Gradients,
    current_processes,
    run_folder_of_rank,
)
from sfumato.training.distributed.sharding import ShardedGradients
from sfumato.training.loop import blackbox, profiling, trackers
from sfumato.training.loop.callbacks import Callback, Callbacks, listening
from sfumato.training.loop.early_stopping import EarlyStopping, LossSpikes
from sfumato.training.loop.periodic_tasks import Measure, PeriodicTasks, Preview
from sfumato.training.loop.profiling import part
from sfumato.training.loop.signals import Signals, Stopped
from sfumato.training.loop.time_budget import EVENT, TimeBudget
from sfumato.training.objective.diffusion import Objective
from sfumato.training.objective.timestep_importance import TimestepImportance
from sfumato.training.optim.ema import EMA, ScheduleFreeEMA
from sfumato.training.settings import TrainSettings
from sfumato.training.state import checkpoint
from sfumato.training.state.async_checkpoint import CheckpointWriter
from sfumato.training.state.checkpoint import CheckpointRetention
from sfumato.training.state.run_precision import precision_of
from sfumato.training.state.train_state import RATES, TrainState

Progress = Callable[..., None]
"""progress(done, total, phase, **figures)."""


def print_to_stderr(sentence: str) -> None:
    """Say a sentence to whoever watches the run."""
    print(for_terminal(sentence), file=sys.stderr, flush=True)


def _nothing(sentence: str) -> None:
    """Say nothing: another process speaks."""


@dataclass(frozen=True)
class Outcome:
    """What `fit` ends with; the network has the raw weights, `average` the averaged ones."""

    step: int
    resumed: int
    loss: float
    seconds: float
    average: EMA | ScheduleFreeEMA | None
    reason: str = "done"


def fit(
    objective: Objective,
    network: nn.Module,
    settings: TrainSettings,
    run: RunFolder,
    seed: int = 0,
    *,
    preview: Preview | None = None,
    preview_every: int = 0,
    held_out: Measure | None = None,
    progress: Progress | None = None,
    phase: str = "train",
    say: Callable[[str], None] = print_to_stderr,
    counts: Mapping[str, int] | None = None,
    profile: Path | None = None,
    callbacks: Sequence[Callback] = (),
    spent: float = 0.0,
) -> Outcome:
    """Train `network` on `objective`, from the run's newest good checkpoint on if it has one.

    Args:
        objective: the loss of each sample of a step.
        network: on its device; its parameters that require a gradient are trained.
        run: where checkpoints and events go; the caller holds its lock.
        seed: of torch's own generator, for networks that draw from it (dropout).
        preview: called every `preview_every` steps and at the end.
        held_out: called every `settings.validate_every` steps and at the end.
        counts: written into the start event.
        profile: a folder for a trace and a table of a few steps.
        callbacks: are told of steps, measurements, pictures and checkpoints.
        spent: seconds of `settings.minutes` that are over already.
    Raises:
        Failed: a loss or gradient is not finite (the weights are those before it), no checkpoint is
            whole, the disk is full, a callback fails.
        Refused: the checkpoint is of another network.
        Stopped: by SIGINT or SIGTERM, after saving; it ends the process with 130 or 143.
    """
    if settings.threads or settings.exact_elastic:
        torch.set_num_threads(settings.threads or 1)
    loop = _Loop(objective, network, settings, run, seed, say, spent)
    loop.periodic_tasks.measure, loop.periodic_tasks.measure_every = held_out, settings.validate_every
    loop.periodic_tasks.preview, loop.periodic_tasks.preview_every = preview, preview_every
    if loop.processes.is_rank_zero:
        loop.progress, loop.phase = progress, phase
    loop.callbacks = Callbacks(callbacks, loop.run, network)
    loop.resume()
    loop.announce(counts or {})
    loop.say_if_complete()
    end = trackers.attach(loop.run, settings.trackers if loop.processes.is_rank_zero else ())
    try:
        with (
            listening(loop.callbacks),
            device.keep_freed_memory(loop.device),
            device.deterministic(loop.device, settings.deterministic),
            context_parallel.enabled_for_training(network, settings, loop.processes),
            profiling.profiled(
                profile if loop.processes.is_rank_zero else None, loop.say
            ) as loop.profile_step,
            Signals(waits_for_others=loop.processes.count > 1) as loop.signals,
        ):
            loop.run_steps()
    finally:
        loop.checkpoint_writer.close()
        end()
    why = "done" if loop.step >= loop.last_step else "held-out loss no longer falls"
    return Outcome(loop.step, loop.resumed, loop.last_loss, loop.seconds, loop.average, why)


class _Loop:
    """The state of a run between two steps; `step` counts the updates that were made."""

    def __init__(
        self,
        objective: Objective,
        network: nn.Module,
        settings: TrainSettings,
        run: RunFolder,
        seed: int,
        say: Callable[[str], None],
        spent: float = 0.0,
    ) -> None:
        self.objective, self.network, self.settings = objective, network, settings
        self.processes = replace(current_processes(), group_size=settings.context_parallel)
        self.run = run_folder_of_rank(run)
        self.time_budget = TimeBudget(settings, spent, agree=self.processes.broadcast_number)
        self.seed, self.say = seed, say if self.processes.is_rank_zero else _nothing
        self.device = next(network.parameters()).device
        self.precision = precision_of(settings, self.device, self.run)
        self.strategy = strategy.choose(settings, network, self.processes)
        if self.strategy.is_divided:
            sharding.shard(network, self.processes, self.precision, self.strategy.shard_size)
        self.train_state = TrainState(network, settings)
        self.optimizer, self.average, self.weights = (
            self.train_state.optimizer,
            self.train_state.average,
            self.train_state.weights,
        )
        self.scale = precision.LossScale(self.precision)
        self.checks_every_step = (
            self.device.type == "cpu" or not self.optimizer.skips_on_device or self.scale.is_needed
        )
        self.not_finite = torch.zeros((), device=self.device)
        self.loss_sum = torch.zeros((), device=self.device)
        self.norm = torch.zeros((), device=self.device)
        self.batch_split = BatchSplit.of(settings, self.processes)
        self.gradients: Gradients | ShardedGradients = (
            gradients_of(self.weights, self.processes, self.batch_split.exact)
            if self.train_state.shards is None
            else ShardedGradients(self.train_state.shards)
        )
        self.timestep_importance: TimestepImportance | None = getattr(objective, "timestep_importance", None)
        self.stop_was_asked = self.said_late = False
        self.loss_records: list[blackbox.LossRecord] = []
        self.early_stopping = EarlyStopping(settings.patience)
        self.periodic_tasks = PeriodicTasks(
            self.train_state, self.run, self.early_stopping, is_rank_zero=self.processes.is_rank_zero
        )
        self.checkpoint_writer = CheckpointWriter(self.run, settings.save_async, self.train_state.shards)
        self.callbacks = Callbacks((), self.run, network)
        self.progress: Progress | None = None
        self.phase = "train"
        self.signals = Signals()
        self.profile_step: Callable[[], None] = lambda: None
        self.step = self.resumed = self.loss_count = 0
        self.seconds = self.window_seconds = 0.0
        self.last_loss = self.speed = float("nan")
        self.loss_spikes = LossSpikes()
        self.figures = [0.0, 0.0, 0.0]
        self.tasks_are_due = False
        self.saved: tuple[int, bool] | None = None

    # ------------------------------------------------------------------------- one step

    def run_steps(self) -> None:
        """Steps until the last, each followed by what is due; stops where it is asked to."""
        self.network.train()
        try:
            if self.tasks_are_due:
                self.run_callbacks()
            while self.step < self.last_step and not (self.must_stop or self.early_stopping.is_over):
                began = time.perf_counter()
                with part("step"):
                    rate = self.advance()
                self.profile_step()
                self.tasks_are_due = True
                if self.is_logged(self.step):
                    self.read_figures()  # where the host waits for what it has given the device
                self.window_seconds += time.perf_counter() - began
                if self.is_logged(self.step):
                    self.log(rate)
                self.ask_clock()
                if not self.must_stop:
                    self.run_callbacks()
            self.checkpoint_writer.wait()
            if self.must_stop:
                raise Stopped(self.signals.received or SIGTERM)
        except Stopped as stopped:
            self.save_and_stop(stopped)
            raise

    @property
    def must_stop(self) -> bool:
        """Whether the run was asked to stop; many processes stop when all of them know."""
        return self.stop_was_asked or (self.processes.count == 1 and self.signals.received is not None)

    @property
    def last_step(self) -> int:
        """The last step: the recipe's, or what the clock decided."""
        return self.time_budget.last_step

    def is_logged(self, step: int) -> bool:
        """Whether the loss is read after `step` updates."""
        return step % self.settings.log_every == 0 or step == self.last_step

    def ask_clock(self) -> None:
        """Decide the last step anew where the run has its minutes and the pace asks for it."""
        if self.time_budget.decide(self.step) is None:
            return
        self.run.event(EVENT, **self.time_budget.event())
        if self.time_budget.is_late and not self.said_late:
            self.say(self.time_budget.explain())
        self.said_late = self.time_budget.is_late

    def advance(self) -> float:
        """One update of the weights; returns the learning rate.

        Raises:
            Failed: the loss or its gradient is not finite; the weights have not moved.
        """
        parts = self.batch_split.parts
        for number in self.batch_split.mine:
            self.gradients.begin(number == self.batch_split.mine[-1])
            torch.manual_seed(((self.seed * 1_000_003 + self.step) * 1_009 + number) & (2**63 - 1))
            with part("forward"), precision.autocast(self.precision, self.device):
                losses = self.objective.losses(self.step, number, parts)
                share = losses.per_sample.float().sum() / losses.of
            with part("backward"):
                (share * self.scale.value if self.scale.is_needed else share).backward()
            self.gradients.add(share.detach() / self.settings.context_parallel)
            self.loss_records.append(
                blackbox.LossRecord(self.step, losses.ids, losses.per_sample.detach(), losses.of)
            )
        with part("gradients"):
            loss, wishes = self.gradients.total(self.signals.received is not None)
            if self.checks_every_step or self.is_logged(self.step + 1):
                self.stop_was_asked = bool(wishes)
            gradients = [weight.grad for weight in self.weights if weight.grad is not None]
            self.norm = self.gradients.norm(gradients)
            moves = not self.scale.is_needed or self.unscale(gradients, loss)
            if moves:
                self.check_finite(loss)
            excess = self.clip(gradients) if moves else None
        with part("optimizer"):
            skips = None if self.checks_every_step else self.not_finite
            done = self.time_budget.done(self.step)
            rate = self.optimizer.step(self.step, skips, excess, done) if moves else 0.0
            self.gradients.clear()
        self.step += 1
        if self.timestep_importance is not None:
            self.timestep_importance.refresh(self.step, self.processes.add)
        self.loss_sum += loss
        self.loss_count += 1
        with part("averages"):
            self.train_state.update(self.step)
        self.callbacks.step(self.step, loss)
        if self.progress is not None:
            figures = {} if self.last_loss != self.last_loss else {"loss": self.last_loss}
            self.progress(self.step, self.last_step, self.phase, **figures, samples_per_second=self.speed)
        return rate

    def unscale(self, gradients: list[Tensor], loss: Tensor) -> bool:
        """Undo the loss's scale; whether the weights move: not where the scaled gradient overflowed."""
        scale = self.scale.value
        torch._foreach_mul_(gradients, 1 / scale)  # pyright: ignore[reportPrivateImportUsage]
        self.norm = self.norm / scale
        is_finite = bool(torch.isfinite(self.norm))
        self.scale.update(is_finite)
        if is_finite or not torch.isfinite(loss) or self.scale.is_exhausted:
            return True  # and where it is not finite, `check_finite` says so
        self.loss_records.clear()
        self.run.event("note", text=f"step {self.step + 1} overflowed in fp16 and moved nothing")
        return False

    def check_finite(self, loss: Tensor) -> None:
        """Stop before the weights move if the loss or its gradient is not finite.

        Where asking would stall the device, the optimizer is told on the device to leave the weights
        alone, and the question is asked when the loss is read.
        """
        finite = torch.isfinite(loss) & torch.isfinite(self.norm)
        if self.checks_every_step:
            if not finite:
                self.fail_not_finite()
            self.loss_records.clear()
        else:
            self.not_finite = torch.maximum(self.not_finite, (~finite).to(self.not_finite.dtype))

    def fail_not_finite(self) -> None:
        """Write the black box and raise."""
        self.gradients.clear()
        if self.checks_every_step:
            self.save()
        self.checkpoint_writer.wait()
        raise Failed(blackbox.write(self.run, self.objective, self.network, self.loss_records, self.settings))

    def clip(self, gradients: list[Tensor]) -> Tensor | None:
        """Scale the gradient down to the largest norm allowed, or return what the optimizer divides it by."""
        most = self.settings.max_grad_norm
        if not most or (self.device.type == "cpu" and float(self.norm) <= most):
            return None  # a GPU is not asked: a factor of 1 changes nothing
        if self.optimizer.skips_on_device:
            return (self.norm.float() / most).clamp(min=1.0)
        torch.nn.utils.clip_grads_with_norm_(self.weights, most, self.norm, foreach=True)
        return None

    # ------------------------------------------------------------------------- what follows a step

    def read_figures(self) -> None:
        """Read the loss and the gradient's norm, once, when all steps before are done."""
        figures = [self.loss_sum / max(1, self.loss_count), self.norm.float(), self.not_finite.float()]
        self.figures = torch.stack(figures).tolist()

    def log(self, rate: float) -> None:
        """Write the step event."""
        loss, norm, not_finite = self.figures
        if not self.checks_every_step and not_finite:
            self.fail_not_finite()
        self.loss_records.clear()
        if sentence := self.loss_spikes.update(self.step, loss):
            self.run.event("note", text=sentence)
        self.last_loss = loss
        self.loss_sum.zero_()
        steps, self.loss_count = self.loss_count, 0
        self.seconds += self.window_seconds
        self.speed = (
            steps * self.settings.batch / self.window_seconds if self.window_seconds else float("nan")
        )
        self.window_seconds = 0.0
        self.run.event(
            "step",
            step=self.step,
            loss=loss,
            learning_rate=rate,
            gradient_norm=norm,
            samples_per_second=round(self.speed, 3),
            seconds=round(self.seconds, 3),
        )

    def run_callbacks(self) -> None:
        """Measure and draw where due, then save where due: a kill in between only repeats them."""
        step, is_last = self.step, self.step == self.last_step
        self.checkpoint_writer.finish_if_written()
        is_best = self.periodic_tasks.run_due(step, is_last, self.signals) and self.settings.keep_best
        self.tasks_are_due = False
        if step % self.settings.save_every == 0 or is_last or is_best or self.early_stopping.is_over:
            self.save(has_more_steps=not (is_last or self.early_stopping.is_over))

    # ------------------------------------------------------------------------- saving and resuming

    def save(self, has_more_steps: bool = True) -> Path:
        """Write a checkpoint of this moment, unless a number in it is not finite.

        Raises:
            Failed: a number is not, or the run's folder is gone.
        """
        self.run.check_is_there()
        if not self.checks_every_step and bool(self.not_finite):
            self.fail_not_finite()
        groups, state = self.train_state.state_dict()
        state |= {
            "seconds": self.seconds + self.window_seconds,
            "loss": [float(self.loss_sum), self.loss_count],
            "owes": self.tasks_are_due,
            "precision": self.precision,
            "loss_scale": self.scale.state(),
            "verdict": self.early_stopping.state(),
        }
        if self.time_budget.is_used:
            state["time_budget"] = self.time_budget.state()
        if self.timestep_importance is not None:
            state["adaptive"] = self.timestep_importance.state(self.processes.add)
        settings = self.settings
        best = self.early_stopping.best_step if settings.keep_best else 0
        if self.processes.is_rank_zero or self.train_state.shards is not None:
            kept = CheckpointRetention(settings.keep_checkpoints, settings.keep_every, best)
            self.checkpoint_writer.save(self.step, groups, state, kept, has_more_steps)
        self.saved = self.step, self.tasks_are_due
        return self.run.checkpoint_folder(self.step)

    def save_and_stop(self, stopped: Stopped) -> None:
        """Save, if this step is not saved yet, and say how to go on."""
        is_saved = self.saved == (self.step, self.tasks_are_due)
        folder = self.run.checkpoint_folder(self.step) if is_saved else self.save(has_more_steps=False)
        self.checkpoint_writer.wait()
        self.run.event("stop", step=self.step, reason=stopped.signal.name, sync=True)
        self.say(
            f"Stopped by {stopped.signal.name} at step {self.step} of {self.last_step}, saved in "
            f"{folder}. The same command goes on from there."
        )

    def resume(self) -> None:
        """Take up the newest checkpoint that is whole; all processes the same."""
        folder = checkpoint.newest_intact(self.run, self.say) if self.processes.is_rank_zero else None
        number = -1 if folder is None else int(folder.name.removeprefix("step-"))
        number = self.processes.broadcast_number(number)
        if number < 0:
            if self.train_state.shards is None:
                self.processes.broadcast_weights(self.network)
            return
        folder = self.run.checkpoint_folder(number)
        state, changed = self.train_state.load(folder)
        self.step = self.resumed = int(state["step"])
        self.seconds = float(state["seconds"])
        self.loss_sum.fill_(state["loss"][0])
        self.loss_count = int(state["loss"][1])
        self.tasks_are_due = bool(state["owes"])
        if self.time_budget.is_used:
            known = state.get("time_budget", {"seconds": self.seconds})
            self.time_budget.load(self.step, known, self.run.events())
        if "loss_scale" in state and self.scale.is_needed:
            self.scale.load(state["loss_scale"])
        if "verdict" in state:
            self.early_stopping.load(state["verdict"])
        if self.timestep_importance is not None and "adaptive" in state:
            self.timestep_importance.load(state["adaptive"], self.processes.is_rank_zero)
        self.saved = self.step, self.tasks_are_due
        self.say(f"Going on from {folder.name} of {self.run.path}.")
        if lost := self.run.damaged_events():
            lines = ", ".join(map(str, lost[:5])) + (" …" if len(lost) > 5 else "")
            self.say(f"{self.run.events_file}: line {lines} is torn or was changed; the curves do without.")
        rates = [changed.pop(name) for name in sorted(RATES & changed.keys())]
        self.note(rates, f"from step {self.step} on, as in a run where that was planned for this step.")
        self.note(list(changed.values()), "the run goes on, but not bit for bit as it would have.")

    def note(self, changed: Sequence[str], outcome: str) -> None:
        """Say what was changed and what comes of it, and write it down; nothing if nothing was."""
        if changed:
            sentence = f"{'; '.join(changed)}: {outcome}"
            self.say(sentence)
            self.run.event("note", text=sentence)

    def say_if_complete(self) -> None:
        """Say so where nothing is left to train, and what would make the run go on."""
        last = self.last_step
        if self.step < last and not self.early_stopping.is_over:
            return
        more = f"train.steps={max(self.step, last) * 2}"
        if self.time_budget.is_used and self.step < self.settings.steps:
            more = f"train.minutes={self.settings.minutes * 2:g}"
        if self.step < last:
            self.say(
                f"{self.run.path} ended at step {self.step}, because the held-out loss no longer fell for "
                f"{self.settings.patience} measurements. It goes on with train.patience=0."
            )
        elif self.step == last:
            self.say(f"{self.run.path} is complete: {self.step} steps. It goes on with {more}, for example.")
        else:
            self.say(
                f"{self.run.path} has {self.step} steps already, which is more than train.steps = "
                f"{last}; they stay. It goes on with {more}, for example."
            )

    def announce(self, counts: Mapping[str, int]) -> None:
        """Write the start event."""
        self.run.event(
            "start",
            step=self.step,
            resumed=self.resumed > 0,
            counts=dict(counts),
            settings=asdict(self.settings),
            parameters=sum(one.numel() for one in self.network.parameters() if one.requires_grad),
            parallel=self.strategy.name,
            parallel_why=self.strategy.why,
            device=str(self.device),
            precision=self.precision,
            threads=torch.get_num_threads(),
            processes=self.processes.count,
            sync=True,
        )
