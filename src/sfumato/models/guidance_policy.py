"""How a denoiser is guided: one object, which its family makes and everything around it hands on.

A network of ours leans by `theory.guidance.guide`. Pretrained ones differ: some were distilled to read the
guidance scale beside the time, some lean only away from a negative prompt, some keep a norm. All of that, and
nothing else, is said here and in the families' policies; drawing asks `denoiser.guidance`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sfumato.models.condition import Condition
from sfumato.theory import guidance


@dataclass(frozen=True)
class GuidancePolicy:
    """Classifier-free guidance wherever the scale is not 1.

    Args:
        supports_perturbed_attention: whether a condition's `perturbed` [B] (bool) disturbs the attention of
            these samples.
        options: further numbers of the pipeline's call that guide (`true_cfg_scale`), with their defaults.
        has_own_form: whether `combine` or `options` make it more than classifier-free guidance, so that no
            other form can take its place.
    """

    supports_perturbed_attention: bool = False
    options: Mapping[str, float | None] = field(default_factory=dict)
    has_own_form: bool = False

    @property
    def is_embedded(self) -> bool:
        """Whether the network itself reads the guidance scale."""
        return False

    def embed_guidance(self, condition: Condition, scale: float) -> Condition:
        """The condition of a network that reads the guidance scale; most do not."""
        return condition

    def guidance_at(self, scale: float, t: float, options: Mapping[str, Any]) -> float:
        """How far to lean at time t of the theory, from what the user asked for."""
        return scale

    def needs_negative(self, scale: float, has_negative: bool) -> bool:
        """Whether guidance needs a weaker answer; `has_negative` where a negative prompt was given.

        Raises:
            Refused: a negative that could not act on this network.
        """
        return scale != 1

    def combine(self, strong: Tensor, weak: Tensor, scale: float) -> Tensor:
        """The guided answer [B, C, …]."""
        return guidance.guide(strong, weak, scale)


class PipelineGuidance(GuidancePolicy):
    """As diffusers' pipelines do it: above 1, and rounded as they round."""

    def needs_negative(self, scale: float, has_negative: bool) -> bool:
        """Above 1."""
        return scale > 1

    def combine(self, strong: Tensor, weak: Tensor, scale: float) -> Tensor:
        """weak + scale · (strong − weak)."""
        return guidance.extrapolate(strong, weak, scale)
