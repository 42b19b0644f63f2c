"""Callbacks: objects of one's own that are told of steps, measurements, pictures and checkpoints.

They hear what the run records, when it has been recorded. What they do changes nothing of the run: gradients
are off, the network's mode is put back, and a step's random numbers follow from its number alone.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Failed, Refused
from sfumato.run_folder import RunFolder
from sfumato.training.distributed.processes import current_processes
from sfumato.user_code import (
    accepted_arguments,
    check_call,
    describe_error,
    load_user_object,
    make_user_object,
)

COMMON = ("step", "run", "network")
HOOKS: Mapping[str, tuple[str, ...]] = {
    "on_step": ("loss",),
    "on_validation": ("split", "weights", "loss", "error"),
    "on_preview": ("files",),
    "on_checkpoint": ("folder",),
}
"""What each hook may take beside COMMON; it is given those that its signature names."""
CONTRACT = (
    "A callback is an object with any of "
    + ", ".join(f"{hook}({', '.join((*COMMON, *more))})" for hook, more in HOOKS.items())
    + "; each takes those of these arguments that it names."
)
EVENTS = {"validation": "on_validation", "pictures": "on_preview", "checkpoint": "on_checkpoint"}


def check(word: str) -> None:
    """Raises Refused unless `file.py:name` has hooks that can be told; a class is not made for that."""
    found = load_user_object(word)
    hooks = [hook for hook in HOOKS if callable(getattr(found, hook, None))]
    if not hooks:
        what = found.__name__ if inspect.isclass(found) else type(found).__name__
        raise Refused(f"train.callbacks: {word} is a {what} without a hook. {CONTRACT}")
    for hook in hooks:
        try:
            check_call(getattr(found, hook), (*COMMON, *HOOKS[hook]), of_class=inspect.isclass(found))
        except TypeError as problem:
            raise Refused(f"train.callbacks: {word}: {hook}: {problem}. {CONTRACT}") from None


@dataclass(frozen=True)
class Callback:
    """One callback and the word that names it."""

    word: str
    target: Any

    @classmethod
    def load(cls, word: str) -> "Callback":
        """What `file.py:name` stands for; a class is made without arguments.

        Raises:
            Refused: it has none of the hooks, or one that takes what is not known.
        """
        check(word)
        return cls(word, make_user_object(word))

    def call(self, hook: str, known: Mapping[str, Any]) -> None:
        """Call a hook, if there is one.

        Raises:
            Failed: it fails, naming file, hook and step.
        """
        work = getattr(self.target, hook, None)
        if work is None:
            return
        try:
            with torch.no_grad():
                work(**{name: known[name] for name in accepted_arguments(work, known)})
        except Exception as problem:
            where = describe_error(self.word, problem)
            raise Failed(
                f"train.callbacks: {hook} fails at step {known['step']} in {where}. Mend it or leave it out; "
                "the same command goes on from the last checkpoint."
            ) from problem


class Callbacks:
    """The callbacks of a run, told on the leading process; one with `every_process = True` on each.

    on_checkpoint is told where checkpoints are recorded, on the leading process alone.
    """

    def __init__(self, listed: Sequence[Callback], run: RunFolder, network: nn.Module) -> None:
        leads = current_processes().is_rank_zero
        self.listed = [one for one in listed if leads or getattr(one.target, "every_process", False)]
        self.run, self.network = run, network

    def step(self, step: int, loss: Tensor) -> None:
        """Tell of an update; `loss` [] stays on its device, where reading it waits."""
        if self.listed:
            self._call("on_step", step, {"loss": loss})

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Tell of what the run records."""
        hook = EVENTS.get(event["kind"])
        if hook is None:
            return
        known = {name: event[name] for name in HOOKS[hook] if name in event}
        if hook == "on_preview":
            known["files"] = [self.run.path / name for name in event["files"]]
        if hook == "on_checkpoint":
            known["folder"] = self.run.path / event["path"]
        self._call(hook, event["step"], known)

    def _call(self, hook: str, step: int, known: Mapping[str, Any]) -> None:
        training = self.network.training
        everything = {"step": step, "run": self.run.path, "network": self.network, **known}
        for one in self.listed:
            one.call(hook, everything)
        if self.network.training != training:
            self.network.train(training)


@contextmanager
def listening(callbacks: Callbacks) -> Iterator[None]:
    """Inside it the callbacks hear what the run records."""
    callbacks.run.listeners.append(callbacks.on_event)
    try:
        yield
    finally:
        callbacks.run.listeners.remove(callbacks.on_event)
