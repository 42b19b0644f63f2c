"""Plain DDPM: a UNet on pixels that nothing guides.

Source: Ho et al. 2020, arXiv:2006.11239.
"""

from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.pretrained.family import Family


class PlainDDPM(Family):
    """Latents are pixels."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    network = "unet"
    patch = 1

    def size(self, pipe: Any) -> tuple[int, int]:
        """The size it was trained at."""
        side = pipe.unet.config.sample_size
        return (side, side) if isinstance(side, int) else (side[0], side[1])

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """ε (or v, or x_0) [B, C, H, W], without a variance where there is one."""
        return network(x, clock).sample[:, : x.shape[1]]
