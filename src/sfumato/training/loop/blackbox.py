"""The black box: when a number stops being finite, who, where and how to see it again.

Written before the optimizer moves, so that the weights beside it are the last good ones.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfumato import paths
from sfumato.run_folder import RunFolder, write_atomic
from sfumato.training.objective.diffusion import Objective
from sfumato.training.settings import TrainSettings

NAMED = 5


class LossRecord(NamedTuple):
    """The losses [b] of one part of a step, whose they are, and the size of the whole batch."""

    step: int
    ids: Sequence[int]
    per_sample: Tensor
    of: int


def write(
    run: RunFolder,
    objective: Objective,
    network: nn.Module,
    records: Sequence[LossRecord],
    settings: TrainSettings,
) -> str:
    """Write `black_box.json` into the run folder and return the sentence to fail with."""
    step = next((entry.step for entry in records if not entry.per_sample.isfinite().all()), records[-1].step)
    entries = [entry for entry in records if entry.step == step]
    losses = {
        sample: loss
        for entry in entries
        for sample, loss in zip(entry.ids, entry.per_sample.tolist(), strict=True)
    }
    bad = [sample for sample, loss in losses.items() if not _is_finite(loss)]
    what = "loss" if bad else "gradient"
    module, culprits = _search(objective, network, step, entries[0].of)
    names = [objective.name_of(sample) for sample in (bad or culprits or list(losses))]
    box: dict[str, Any] = {
        "step": step,
        "what": what,
        "samples": names,
        "ids": bad or culprits or list(losses),
        "losses": {str(sample): repr(loss) for sample, loss in losses.items()},
        "first_module": module,
        "replay": paths.command("train", run.path, f"train.steps={step + 1}"),
    }
    describe = getattr(objective, "describe_part", None)
    if describe is not None:
        box["parts"] = [
            describe(step, part, settings.gradient_accumulation)
            for part in range(settings.gradient_accumulation)
        ]
    write_atomic(run.path / "black_box.json", json.dumps(box, indent=1, ensure_ascii=False))
    listed = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    where = f"; the first such value came out of {module}" if module else ""
    run.event("note", text=f"step {step}: the {what} is not finite", samples=names[:NAMED], sync=True)
    return (
        f"The {what} of step {step} is not finite for {listed}{where}. The weights did not move; details are "
        f"in {run.path / 'black_box.json'}. Look at these samples, or lower train.learning_rate and start "
        "again from an earlier checkpoint."
    )


def _is_finite(value: float) -> bool:
    return value - value == 0


def _search(objective: Objective, network: nn.Module, step: int, count: int) -> tuple[str, list[int]]:
    """Compute each sample of the step alone: the first module with a non-finite output, the guilty ids."""
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_record_if_not_finite(name, found))
        for name, module in network.named_modules()
        if name and not list(module.children())
    ]
    culprits: list[int] = []
    try:
        for part in range(count):
            losses = objective.losses(step, part, count)
            losses.per_sample.sum().backward()
            gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
            if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
                culprits += losses.ids
            for weight in network.parameters():
                weight.grad = None
    finally:
        for hook in hooks:
            hook.remove()
    return (found[0] if found else ""), culprits


def _record_if_not_finite(name: str, found: list[str]) -> Any:
    """A forward hook that notes the module's name if its output is not finite."""

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else [output]
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                found.append(name)

    return note
