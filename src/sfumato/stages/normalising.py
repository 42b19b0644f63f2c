"""How an autoencoder's latents are normalised, from its config."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

ALL = ("factor", "shift", "channels")


def statistics(vae: Any, heeded: Collection[str] = ALL) -> tuple[Tensor, Tensor]:
    """(shift, scale) [C, 1, 1] or [C, 1, 1, 1]: latents = (raw − shift) / scale.

    latents = (raw − mean)·factor/std per channel where the config has both, else (raw − shift)·factor; of
    these three (`ALL`) only what is heeded, for pipelines differ in what they look at.
    """
    config = vae.config
    factor = (config.get("scaling_factor") if "factor" in heeded else None) or 1.0
    channels = config.get("z_dim") or config["latent_channels"]
    axes = [1] * (3 if "3d" in " ".join(type(m).__name__.lower() for m in vae.modules()) else 2)
    measured = {**config, **dict(vae.named_buffers(recurse=False))} if "channels" in heeded else {}
    mean, std = measured.get("latents_mean"), measured.get("latents_std")
    if mean is not None and std is not None:
        shift = torch.as_tensor(mean, dtype=torch.float32).view(-1, *axes)
        return shift, torch.as_tensor(std, dtype=torch.float32).view(-1, *axes) / factor
    whole = torch.ones(channels, *axes)
    shift = (config.get("shift_factor") if "shift" in heeded else None) or 0.0
    return whole * shift, whole / factor
