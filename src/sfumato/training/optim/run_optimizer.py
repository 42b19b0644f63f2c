"""The optimizer of a run: chosen by name, its state readable as plain tensors and numbers.

The state leaves as {name: tensor} and JSON and
comes back bit for bit; nothing is pickled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Failed, Refused
from sfumato.settings import Table
from sfumato.training.optim.bf16_weights import MasterWeights
from sfumato.training.optim.lr_schedule import lr_factor
from sfumato.training.optim.optimizers import new_optimizer, spec_of
from sfumato.training.optim.param_groups import check_lr_multipliers, param_groups
from sfumato.training.settings import TrainSettings

FROM_SETTINGS = {"params", "lr", "weight_decay", "initial_lr"}
"""Entries of a parameter group that the recipe decides, on a resumed run too."""


class RunOptimizer:
    """The optimizer named in the settings, stepping the trained parameters of a network.

    Args:
        named: those parameters, as `trained_parameters` gives them.
    Raises:
        Refused: no such optimizer, or what it cannot do. Failed: the network has nothing to train.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], settings: TrainSettings) -> None:
        self.settings = settings
        if not named:
            raise Failed("The network has no parameter that may be trained: every requires_grad is off.")
        check_lr_multipliers(named, settings.lr_multipliers)
        self.master_weights: MasterWeights | None = None
        if any(weight.dtype == torch.bfloat16 for weight in named.values()):
            if spec_of(settings.optimizer).needs_float32:
                raise Refused(
                    f'train.optimizer = "{settings.optimizer}" needs weights in float32. Say '
                    'train.weight_dtype = "fp32", or choose adamw, lion, muon or adafactor.'
                )
            self.master_weights = MasterWeights(named, are_kept=settings.weight_dtype != "bf16")
            named = self.master_weights.named
        self.names = {id(weight): name for name, weight in named.items()}
        chunks = [named] if self.master_weights is None else self.master_weights.chunks()
        self.parts = [part for chunk in chunks for part in new_optimizer(chunk, settings)]
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]
        if self.master_weights is not None:
            for part in self.parts:
                self.master_weights.release(part)

    @property
    def keeps_average(self) -> bool:
        """Whether the optimizer itself holds an average, which its evaluation mode shows (schedule-free)."""
        return all(hasattr(part, "train") and hasattr(part, "eval") for part in self.parts)

    @property
    def skips_on_device(self) -> bool:
        """Whether a step can be told, without asking the device, to leave the weights alone."""
        return self.master_weights is None and all(
            getattr(part, "_step_supports_amp_scaling", False) for part in self.parts
        )

    def step(
        self,
        step: int,
        skip: Tensor | None = None,
        excess: Tensor | None = None,
        done: float | None = None,
    ) -> float:
        """Move the weights in step `step` (0, 1, …).

        Args:
            skip: a number on the device, 1 to leave the weights alone; excess: what gradients are divided by
                on the way; both only where `skips_on_device`.
            done: share of training that is done, where the clock says so; else the settings' steps do.
        Returns:
            the learning rate of the first group.
        """
        settings = self.settings
        scale = lr_factor(settings.lr_schedule, step, settings.steps, settings.warmup_steps, done)
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            if skip is not None or excess is not None:
                part.found_inf, part.grad_scale = skip, excess  # pyright: ignore[reportAttributeAccessIssue]
            if self.master_weights is not None:
                self.master_weights.load_gradients(part)
            part.step()
            if excess is not None:
                part.grad_scale = None  # pyright: ignore[reportAttributeAccessIssue]
            if self.master_weights is not None:
                self.master_weights.round_into_weights(part, step)
                self.master_weights.release(part)
        return self.parts[0].param_groups[0]["lr"]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state as tensors by "part/parameter/entry" and, as JSON, all that is no tensor."""
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {"values": {}, "groups": []}
        for number, part in enumerate(self.parts):
            for weight, entries in part.state.items():
                for entry, value in entries.items():
                    key = f"{number}/{self.names[id(weight)]}/{entry}"
                    if isinstance(value, Tensor):
                        tensors[key] = value.detach()
                    else:
                        rest["values"][key] = value
            rest["groups"].append([self._own_numbers(group) for group in part.param_groups])
            for index, group in enumerate(part.param_groups):
                own = {key: value.clone() for key, value in group.items() if isinstance(value, Tensor)}
                tensors |= {f"{number}/group {index}/{key}": value for key, value in own.items()}
        if self.master_weights is not None:
            tensors |= {f"masters/{name}": value for name, value in self.master_weights.state().items()}
        return tensors, rest

    @staticmethod
    def _own_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
        """What an optimizer keeps of its own in a group (Prodigy's distance, schedule-free's weights)."""
        plain = (int, float, bool, str, type(None))
        return {
            name: value
            for name, value in group.items()
            if name not in FROM_SETTINGS and isinstance(value, plain)
        }

    def _former_groups(self, part: torch.optim.Optimizer, multipliers: Mapping[str, float]) -> Sequence[int]:
        """For each group of a part the number of the one whose numbers it takes over."""
        if multipliers == self.settings.lr_multipliers:
            return range(len(part.param_groups))
        weights = {self.names[id(one)]: one for group in part.param_groups for one in group["params"]}
        before = param_groups(weights, replace(self.settings, lr_multipliers=Table(multipliers)))
        home = {id(one): number for number, group in enumerate(before) for one in group["params"]}
        return [home[id(group["params"][0])] for group in part.param_groups]

    def load(
        self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any], multipliers: Mapping[str, float]
    ) -> None:
        """Continue from what `state` gave.

        Args:
            multipliers: the `lr_multipliers` it was given under. Where they are others now, weights stand in
                other groups; a group then goes on with the numbers of the one its first weight was in.
        """
        if self.master_weights is not None:
            masters = {name: value for name, value in tensors.items() if name.startswith("masters/")}
            self.master_weights.load(
                {name.removeprefix("masters/"): value for name, value in masters.items()}
            )
        entries: dict[str, dict[str, Any]] = {}
        for key, value in [*tensors.items(), *rest["values"].items()]:
            owner, _, entry = key.rpartition("/")
            entries.setdefault(owner, {})[entry] = value
        for number, part in enumerate(self.parts):
            packed = part.state_dict()
            ordered = [weight for group in part.param_groups for weight in group["params"]]
            owners = [f"{number}/{self.names[id(weight)]}" for weight in ordered]
            packed["state"] = {i: entries[owner] for i, owner in enumerate(owners) if owner in entries}
            formers = self._former_groups(part, multipliers)
            for group, index in zip(packed["param_groups"], formers, strict=True):
                group |= rest["groups"][number][index] | entries.get(f"{number}/group {index}", {})
            part.load_state_dict(packed)
            if self.master_weights is not None:
                self.master_weights.release(part)
