"""The optimizer of a run: chosen by name, its state readable as plain tensors and numbers.

The state leaves as {name: tensor} and JSON and
comes back bit for bit; nothing is pickled.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sfumato.errors import Failed

from .average import trained
from .optimisers import build
from .schedule import factor
from .settings import TrainSettings

FROM_SETTINGS = {"params", "lr", "weight_decay", "initial_lr"}
"""Entries of a parameter group that the recipe decides, on a resumed run too."""


class Optimiser:
    """The optimizer named in the settings, stepping all trained parameters of a network.

    Raises:
        Refused: no such optimizer. Failed: the network has nothing to train.
    """

    def __init__(self, network: nn.Module, settings: TrainSettings) -> None:
        self.settings = settings
        self.names = {id(weight): name for name, weight in trained(network).items()}
        if not self.names:
            raise Failed("The network has no parameter that may be trained: every requires_grad is off.")
        self.parts = build(network, settings)
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]

    @property
    def averages(self) -> bool:
        """Whether the optimizer itself holds an average, which its evaluation mode shows (schedule-free)."""
        return all(hasattr(part, "train") and hasattr(part, "eval") for part in self.parts)

    @property
    def skips_on_device(self) -> bool:
        """Whether a step can be told, without asking the device, to leave the weights alone."""
        return all(getattr(part, "_step_supports_amp_scaling", False) for part in self.parts)

    def step(self, step: int, skip: Tensor | None = None) -> float:
        """Move the weights in step `step` (0, 1, …); with `skip` (float, 1 to skip) decided on the device.

        Returns:
            the learning rate of the first group.
        """
        settings = self.settings
        scale = factor(settings.schedule, step, settings.steps, settings.warmup)
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            if skip is not None:
                part.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
            part.step()
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

    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        entries: dict[str, dict[str, Any]] = {}
        for key, value in [*tensors.items(), *rest["values"].items()]:
            owner, _, entry = key.rpartition("/")
            entries.setdefault(owner, {})[entry] = value
        for number, part in enumerate(self.parts):
            packed = part.state_dict()
            ordered = [weight for group in part.param_groups for weight in group["params"]]
            owners = [f"{number}/{self.names[id(weight)]}" for weight in ordered]
            packed["state"] = {i: entries[owner] for i, owner in enumerate(owners) if owner in entries}
            for index, group in enumerate(packed["param_groups"]):
                group |= rest["groups"][number][index] | entries.get(f"{number}/group {index}", {})
            part.load_state_dict(packed)
