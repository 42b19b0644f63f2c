"""All that a run has learned: weights, their average, the optimizer's state; written and taken up again."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models import files
from sfumato.settings import plain, saved_settings, toml
from sfumato.training.distributed.sharding import shards_of, trained_parameters
from sfumato.training.optim.bf16_weights import to_bfloat16
from sfumato.training.optim.ema import EMA, ScheduleFreeEMA
from sfumato.training.optim.run_optimizer import RunOptimizer
from sfumato.training.settings import TrainSettings
from sfumato.training.state import checkpoint
from sfumato.training.state.posthoc_ema import PosthocEMA

HARMLESS = {
    *("log_every", "save_every", "keep_checkpoints", "keep_every", "keep_best", "save_async", "patience"),
    *(
        "validate_every",
        "threads",
        "trackers",
        "ema_snapshot_every",
        "gradient_checkpointing",
        "offload",
        "sanity",
    ),
    "callbacks",
}
"""Settings that do not change the weights."""
LENGTHS = {"steps", "minutes", "min_steps"}
RATES = {"learning_rate", "text_learning_rate", "lr_multipliers", "lr_schedule", "warmup_steps", *LENGTHS}
"""Settings that decide a step's learning rate, which each step asks for anew."""


class TrainState:
    """A network in training, with its optimizer and its average.

    Raises:
        Refused: unknown optimizer. Failed: nothing to train.
    """

    def __init__(self, network: nn.Module, settings: TrainSettings) -> None:
        self.network, self.settings = network, settings
        if settings.weight_dtype != "fp32":
            to_bfloat16(network)
        self.shards = shards_of(network)
        named = trained_parameters(network)
        self.optimizer = RunOptimizer(named, settings)
        self.average: EMA | ScheduleFreeEMA | None = None
        if self.optimizer.keeps_average:
            self.average = ScheduleFreeEMA(named, self.optimizer.parts)
        elif settings.ema:
            self.average = EMA(named, settings.ema)
        self.posthoc_ema = PosthocEMA(network) if settings.ema_snapshot_every else None
        self.weights = list(named.values())

    def update(self, step: int) -> None:
        """Take the weights after `step` updates into the averages."""
        if self.average is not None:
            self.average.update(step)
        if self.posthoc_ema is not None:
            self.posthoc_ema.update(step)

    def state_dict(self) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """What a checkpoint of this moment holds: the tensors of each file, and JSON."""
        buffers = _buffers(self.network)
        model = {name: weight.detach() for name, weight in trained_parameters(self.network).items()}
        tensors, rest = self.optimizer.state()
        groups: dict[str, Mapping[str, Tensor]] = {"model": {**model, **buffers}, "optimizer": tensors}
        if self.average is not None:
            groups["ema"] = {**self.average.state(), **buffers}
        if self.posthoc_ema is not None:
            groups |= self.posthoc_ema.groups()
        return groups, {
            "optimizer": rest,
            "threads": torch.get_num_threads(),
            "settings": asdict(self.settings),
        }

    def load(self, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
        """Take up a checkpoint that is whole.

        Returns:
            its state, and what was changed since, as {setting: half a sentence}.
        Raises:
            Refused: it is of another network.
        """
        state = checkpoint.read_state(folder)
        wanted = self.shards.wanted if self.shards is not None else None
        model = files.read(folder, "model", wanted)
        _copy(model, self.network, folder)
        if self.average is not None:
            self.average.load(files.read(folder, "ema", wanted) or model)
        if self.posthoc_ema is not None:
            kept = {group: files.read(folder, group, wanted) for group in self.posthoc_ema.groups()}
            self.posthoc_ema.load({group: tensors or model for group, tensors in kept.items()})
        if state["settings"]["optimizer"] == self.settings.optimizer:
            former = saved_settings("train", state["settings"], TrainSettings)
            self.optimizer.load(
                files.read(folder, "optimizer", wanted), state["optimizer"], former.get("lr_multipliers", {})
            )
        return state, self._changed(state)

    def _changed(self, state: Mapping[str, Any]) -> dict[str, str]:
        was = saved_settings("train", state["settings"], TrainSettings)
        now = asdict(self.settings)
        for one in (was, now):  # the text encoders' rate is among the multipliers too; it is said once
            if one.get("text_learning_rate"):
                multipliers = dict(one["lr_multipliers"])
                multipliers.pop("text_encoder*", None)
                one["lr_multipliers"] = multipliers
        harmless = set(HARMLESS)
        if was.get("lr_schedule") == now["lr_schedule"] == "constant":
            harmless |= LENGTHS
        changed = {
            name: f"train.{name} was {toml(value)} and is {toml(now[name])}"
            for name, value in was.items()
            if name in now and plain(now[name]) != plain(value) and name not in harmless
        }
        if state["threads"] != torch.get_num_threads():
            changed["threads"] = f"threads were {state['threads']} and are {torch.get_num_threads()}"
        return changed


def _buffers(network: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers: what a state dict holds besides parameters. None where a part is frozen."""
    if not all(weight.requires_grad for weight in network.parameters()):
        return {}
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return {name: value.detach() for name, value in network.state_dict().items() if name not in parameters}


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], network: nn.Module, folder: Path) -> None:
    """Copy a checkpoint's weights into the network.

    Raises:
        Refused: names or shapes differ.
    """
    own = {**trained_parameters(network), **_buffers(network)}
    strange = sorted(own.keys() ^ tensors.keys()) or sorted(
        name for name, tensor in tensors.items() if tensor.shape != own[name].shape
    )
    if strange:
        raise Refused(
            f'{folder} is of another network: "{strange[0]}" differs ({len(strange)} in all). The recipe\'s '
            "[model] was changed after this run began; change it back, or choose another output."
        )
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
