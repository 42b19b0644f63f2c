"""AuraFlow: a rectified flow on SDXL's latents that reads UMT5, whose padding it sees.

Source: Fal 2024; Esser et al. 2024, arXiv:2403.03206.
"""

from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.models.lora.layer_names import LayerNames
from sfumato.models.pretrained.family import Family


class AuraFlow(Family):
    """Tokens of a fixed length, zero where there are no words."""

    pipelines = ("AuraFlowPipeline",)
    layer_names = LayerNames((), "plain", "")
    comfyui_loads_whole = True
    timestep_input = "share of noise"

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 4, H, W]."""
        return network(x, encoder_hidden_states=condition["tokens"], timestep=clock).sample
