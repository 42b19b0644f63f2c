"""Prior preservation: beside a subject's pictures a step shows as many of its class, so that the class stays.

loss = mean over the subject's + weight · mean over the class's        (DreamBooth, arXiv:2208.12242)
"""

from dataclasses import dataclass
from typing import Any

import torch

from sfumato.training.objective.diffusion import DiffusionObjective, Losses


@dataclass
class WithPrior:
    """Two objectives on one model as one; each draws its own samples, times and noise from the step.

    Args:
        subject: the pictures that are to be learned; prior: those of their class. weight: of the latter.
    """

    subject: DiffusionObjective
    prior: DiffusionObjective
    weight: float

    def losses(self, step: int, part: int, parts: int) -> Losses:
        """The losses of one part of both batches; their sum over the subject's batch is the step's loss."""
        subject, prior = (one.losses(step, part, parts) for one in (self.subject, self.prior))
        share = self.weight * subject.of / prior.of
        both = torch.cat([subject.per_sample, share * prior.per_sample])
        return Losses(both, [*subject.ids, *prior.ids], subject.of)

    def name_of(self, sample: int) -> str:
        """The file or row the sample came from."""
        return (self.prior if sample in set(self.prior.encoded.ids) else self.subject).name_of(sample)

    def describe_part(self, step: int, part: int, parts: int) -> dict[str, Any]:
        """What one part of a step was made of."""
        return {
            "subject": self.subject.describe_part(step, part, parts),
            "prior": self.prior.describe_part(step, part, parts),
        }
