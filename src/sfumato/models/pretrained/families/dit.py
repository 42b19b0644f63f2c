"""DiT: a transformer conditioned on a class; it also answers a variance, left out here.

Source: Peebles & Xie 2022, arXiv:2212.09748.
"""

from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.pretrained.family import Family


class ClassDiT(Family):
    """`labels` [B]; one number beyond the last class says nothing."""

    pipelines = ("DiTPipeline",)

    def size(self, pipe: Any) -> tuple[int, int]:
        """The size it was trained at."""
        side = int(pipe.transformer.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1))
        return side, side

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """ε [B, 4, H, W], without the variance."""
        return network(x, timestep=clock, class_labels=condition["labels"]).sample[:, : x.shape[1]]
