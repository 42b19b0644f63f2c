"""How guidance leans: which form it takes, when it acts, and what the weaker answer is.

`guidance` says how far. What is said here is put around it, each a denoiser around a denoiser; all answers of
one network at one time come from one call.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused, one_of
from sfumato.stages import Condition, Denoiser, Model
from sfumato.theory import Theory, translate
from sfumato.theory import guidance as guiding

Denoise = Callable[[Tensor, Tensor], Tensor]
Form = Callable[[Denoise, Denoise, float], Denoise]

FORMS = ("cfg", "cfg-zero-star", "apg")
MOMENTUM = -0.5
"""Of APG, as its paper has it for latent models."""


@dataclass(frozen=True)
class Leaning:
    """What a user may say about guidance beside its scale; every argument of `generate` is guidance_ + name.

    Args:
        form: cfg, cfg-zero-star (arXiv:2503.18886) or apg (arXiv:2410.02416).
        rescale: share, 0 to 1, by which x_0 gets back the prompted one's deviation (arXiv:2305.08891).
        interval: (low, high), the noise-to-signal ratios s/a between which it acts (arXiv:2404.07724).
        perturbed: how far to lean away from the same network with its attention disturbed
            (arXiv:2403.17377); on top of the rest, also without prompts.
        by: a smaller or less trained model of the same latents, whose answer to the same prompt is the
            weaker one (arXiv:2406.02507); of any theory.
    """

    form: str = "cfg"
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    perturbed: float = 0.0
    by: Model | None = None

    @classmethod
    def taken(cls, options: dict[str, Any]) -> "Leaning":
        """Take the guidance_… arguments out of `options`.

        Raises:
            Refused: a value that cannot be meant.
        """
        said = {one.name: options.pop(f"guidance_{one.name}", None) for one in fields(cls)}
        how = cls(**{name: value for name, value in said.items() if value is not None})
        one_of("guidance_form", how.form, FORMS)
        if not 0 <= how.rescale <= 1:
            raise Refused(f"guidance_rescale is {how.rescale:g}; it is a share between 0 and 1.")
        if not 0 <= how.perturbed < float("inf"):
            raise Refused(f"guidance_perturbed is {how.perturbed:g}; it must be 0 or above.")
        if how.interval is not None and not (
            len(how.interval) == 2 and 0 <= how.interval[0] < how.interval[1]
        ):
            raise Refused(
                f"guidance_interval is {how.interval}; give two noise-to-signal ratios s/a, the lower first."
            )
        return how

    def fits(self, denoiser: Denoiser, leans: bool, asked: bool) -> None:
        """Refuse what would not act on this network at this guidance."""
        acts = {
            "guidance_form": self.form != "cfg",
            "guidance_rescale": self.rescale > 0,
            "guidance_interval": self.interval is not None,
            "guidance_by": self.by is not None,
        }
        idle = [name for name, said in acts.items() if said]
        if self.perturbed:
            idle = [name for name in idle if name in ("guidance_form", "guidance_by")]
            if not denoiser.perturbs:
                raise Refused(
                    f"guidance_perturbed needs a network whose attention can be disturbed, and "
                    f'"{denoiser.kind}" does not offer that; our DiT does.'
                )
        if idle and not leans:
            raise Refused(
                f"{idle[0]} shapes guidance, but this model does not lean here: "
                "give it prompts and a guidance other than 1, or leave it out."
            )
        if self.form != "cfg" and denoiser.leans_its_own_way:
            raise Refused(
                f'guidance_form "{self.form}" would replace how this model leans by itself; leave it out.'
            )
        if self.by is not None and asked:
            raise Refused("guidance_by says what to lean away from, and so does negative; give one of them.")

    def around(
        self, theory: Theory, scale: float, usual: Form, strong: Denoise, weak: Denoise | None, third: Denoise
    ) -> Denoise:
        """The guided network: `usual` or another form, pushed away from `third`, rescaled."""
        guided = strong
        if weak is not None and self.form == "cfg":
            guided = usual(strong, weak, scale)
        elif weak is not None and self.form == "cfg-zero-star":
            guided = guiding.zero_star(strong, weak, scale, theory)
        elif weak is not None:
            guided = guiding.adaptive_projected(strong, weak, scale, theory, momentum=MOMENTUM)
        if self.perturbed:
            guided = guiding.also(guided, strong, third, self.perturbed)
        return guiding.deviating_as(strong, guided, theory, self.rescale) if self.rescale else guided

    def weaker(self, model: Model, prompts: Sequence[str], options: Mapping[str, Any]) -> Denoise | None:
        """The denoiser of `by` for these prompts, in the theory of `model`; None where there is no `by`."""
        by = self.by
        if by is None:
            return None
        if by.codec.latent_channels != model.codec.latent_channels or by.codec.stride != model.codec.stride:
            raise Refused(
                f"guidance_by has latents of {by.codec.latent_channels} channels and stride "
                f"{by.codec.stride}, this model {model.codec.latent_channels} and {model.codec.stride}; "
                "both must have been trained on the same codec."
            )
        told = by.condition(prompts, **options).to(by.device, by.dtype)

        def ask(x_t: Tensor, t: Tensor) -> Tensor:
            return by.predict(x_t.to(by.device, by.dtype), t.to(by.device), told).to(x_t)

        return ask if by.theory is model.theory else translate(ask, by.theory, model.theory)


AS_USUAL = Leaning()


def marked(condition: Condition, perturbed: bool) -> Condition:
    """The condition, whose samples are or are not to have their attention disturbed."""
    flags = torch.full((condition.size,), perturbed, dtype=torch.bool)
    return Condition({**condition, "perturbed": flags})
