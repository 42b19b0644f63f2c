"""An average of any length, chosen after training, as a model to draw and measure with."""

from dataclasses import dataclass
from pathlib import Path

import torch

from sfumato import models
from sfumato.errors import Failed, Refused
from sfumato.generation import load
from sfumato.run_folder import RunFolder
from sfumato.training.state import posthoc_ema

MOST_MISSED = 0.5
"""The part of an average's profile that may be missed: beyond it, another average would be written."""


@dataclass(frozen=True)
class AveragedModel:
    """A model that was averaged: its folder, the step it was averaged up to, the profile's relative error."""

    folder: Path
    step: int
    missed: float


def average(
    run: RunFolder | Path | str, length: float, step: int | None = None, out: Path | str | None = None
) -> AveragedModel:
    """Write the model whose weights are averaged over `length` of a run.

    Args:
        length: a share of the run, above 0 and below 0.25 (EDM2's sigma_rel, arXiv:2312.02696).
        step: where the average ends; default the last snapshot.
        out: the folder; default `RUN/averages/ema-0.100`.
    Raises:
        Refused: no such length, or the run kept too few averages for it. Failed: one of them is damaged.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    weights, missed = posthoc_ema.reconstruct(folder, length, step)
    last = step or posthoc_ema.snapshots(folder)[-1].step
    if missed > MOST_MISSED:
        ends = sorted({one.step for one in posthoc_ema.snapshots(folder)})
        raise Refused(
            f"What {folder.path} kept up to step {last} misses this average by {missed:.0%}. Choose a later "
            f"step (kept: {', '.join(map(str, ends[-5:]))}), a length nearer to "
            f"{' or '.join(map(str, posthoc_ema.LENGTHS))}, or a lower train.ema_snapshot_every next time."
        )
    model = load(folder.path)
    own = {**dict(model.denoiser.named_parameters()), **dict(model.denoiser.named_buffers())}
    if strange := sorted(weights.keys() - own.keys()):
        raise Failed(f'{folder.path}/averages are of another network: it has no "{strange[0]}".')
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)
    model.info |= {"averaged": {"run": str(folder.path), "length": length, "step": last}}
    home = Path(out) if out else folder.path / "averages" / f"ema-{length:.3f}"
    models.save(model, home, text_by_name=True)
    return AveragedModel(home, last, missed)
