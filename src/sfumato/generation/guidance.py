"""How guidance leans: which form it takes, when it acts, and what the weaker answer is.

`guidance` says how far. What is said here picks among the forms of `theory.guidance`, where all formulas
stand; all answers of one network at one time come from one call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused, one_of
from sfumato.generation.settings import FORMS
from sfumato.models import Codec, Condition, Denoiser, Model
from sfumato.models.guidance_policy import GuidancePolicy
from sfumato.theory import Theory, translate
from sfumato.theory import guidance as forms
from sfumato.theory.types import Denoise

MOMENTUM = -0.5
"""Of APG, as its paper has it for latent models."""


RENAMED_OPTIONS = {
    "form": "guidance_form",
    "rescale": "guidance_rescale",
    "interval": "guidance_interval",
    "perturbed": "pag_scale",
    "by": "autoguidance_model",
}
"""What model.json of 0.1 called the options in its entry "leaning"; `generate` put guidance_ before it."""


def saved_options(info: Mapping[str, Any]) -> dict[str, Any]:
    """The guidance options that a model's info holds, whichever version wrote them, by today's names."""
    saved: Mapping[str, Any] = info.get("guidance_options") or info.get("leaning") or {}
    return {RENAMED_OPTIONS.get(name, name): value for name, value in saved.items()}


@dataclass(frozen=True)
class GuidanceOptions:
    """What a user may say about guidance beside its scale: arguments of `generate`, and keys of [sample].

    Args:
        guidance_form: cfg, cfg-zero-star (arXiv:2503.18886) or apg (arXiv:2410.02416).
        guidance_rescale: share, 0 to 1, by which x_0 gets back the prompted one's deviation
            (arXiv:2305.08891).
        guidance_interval: (low, high), the noise-to-signal ratios s/a between which it acts
            (arXiv:2404.07724).
        pag_scale: how far to lean away from the same network with its attention disturbed
            (perturbed-attention guidance, arXiv:2403.17377); on top of the rest, also without prompts.
        autoguidance_model: a smaller or less trained model of the same latents, whose answer to the same
            prompt is the weaker one (arXiv:2406.02507); of any theory. Its folder may stand for it.
        given: the names among these that the caller gave; the others are the model's usual ones, kept from
            its recipe's [sample].
    """

    guidance_form: str = "cfg"
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    pag_scale: float = 0.0
    autoguidance_model: Model | str | Path | None = None
    given: frozenset[str] = frozenset()

    @classmethod
    def pop_from(cls, options: dict[str, Any], usual: Mapping[str, Any] | None = None) -> "GuidanceOptions":
        """Take these arguments out of `options`; what is not among them is as `usual`.

        The names that `generate` of 0.1 took, guidance_perturbed and guidance_by, are understood too.

        Raises:
            Refused: a value that cannot be meant, or an argument that is given by both its names.
        """
        for short, name in RENAMED_OPTIONS.items():
            old = f"guidance_{short}"
            if old != name and (value := options.pop(old, None)) is not None:
                if options.get(name) is not None:
                    raise Refused(f"{old} is the former name of {name}; give {name} alone.")
                options[name] = value
        names = [one.name for one in fields(cls) if one.name != "given"]
        asked = {name: options.pop(name, None) for name in names}
        given = {name: value for name, value in asked.items() if value is not None}
        how = cls(**{**(usual or {}), **given}, given=frozenset(given))
        if how.guidance_interval is not None:
            how = replace(how, guidance_interval=tuple(how.guidance_interval))
        one_of("guidance_form", how.guidance_form, FORMS)
        if not 0 <= how.guidance_rescale <= 1:
            raise Refused(f"guidance_rescale is {how.guidance_rescale:g}; it is a share between 0 and 1.")
        if not 0 <= how.pag_scale < float("inf"):
            raise Refused(f"pag_scale is {how.pag_scale:g}; it must be 0 or above.")
        if how.guidance_interval is not None and not (
            len(how.guidance_interval) == 2 and 0 <= how.guidance_interval[0] < how.guidance_interval[1]
        ):
            raise Refused(
                f"guidance_interval is {how.guidance_interval}; give two noise-to-signal ratios s/a, "
                "the lower first."
            )
        return how

    def effective(self, leans: bool, has_negative: bool) -> "GuidanceOptions":
        """Without those usual ways that have nothing to shape: no guidance, or a negative in its place."""
        idle = set[str]()
        if not leans:
            idle = {"guidance_form", "autoguidance_model"}
            idle |= set() if self.pag_scale else {"guidance_rescale", "guidance_interval"}
        if has_negative and "autoguidance_model" not in self.given:
            idle.add("autoguidance_model")
        return replace(self, **{name: getattr(AS_USUAL, name) for name in idle - self.given})

    def validate(self, denoiser: Denoiser | type[Denoiser], leans: bool, has_negative: bool) -> None:
        """Refuse what would not act on this network at this guidance.

        Args:
            leans: whether there is a weaker answer to lean away from; has_negative: whether a negative was
                given.
        """
        policy = denoiser.guidance
        acts = {
            "guidance_form": self.guidance_form != "cfg",
            "guidance_rescale": self.guidance_rescale > 0,
            "guidance_interval": self.guidance_interval is not None,
            "autoguidance_model": self.autoguidance_model is not None,
        }
        idle = [name for name, is_said in acts.items() if is_said]
        if self.pag_scale:
            idle = [name for name in idle if name in ("guidance_form", "autoguidance_model")]
            if not policy.supports_perturbed_attention:
                raise Refused(
                    f"pag_scale needs a network whose attention can be disturbed, and "
                    f'"{denoiser.kind}" does not offer that; our DiT does.'
                )
        if idle and not leans:
            raise Refused(
                f"{idle[0]} shapes guidance, but this model does not lean here: "
                "give it prompts and a guidance other than 1, or leave it out."
            )
        if self.guidance_form != "cfg" and policy.has_own_form:
            raise Refused(
                f'guidance_form "{self.guidance_form}" would replace how this model leans by itself; '
                "leave it out."
            )
        if self.autoguidance_model is not None and has_negative:
            raise Refused(
                "autoguidance_model says what to lean away from, and so does negative; give one of them."
            )

    def apply(
        self,
        theory: Theory,
        policy: GuidancePolicy,
        scale: float,
        extra: Mapping[str, Any],
        strong: Denoise,
        weak: Denoise | None,
        perturbed: Denoise,
    ) -> Denoise:
        """The guided network: as its policy combines answers or in another form, pushed away, rescaled.

        Args:
            scale: how far to lean; extra: the policy's further options.
            weak: the weaker answer, None where nothing is leaned away from.
            perturbed: the answer with disturbed attention.
        """
        guided = strong
        if weak is not None and self.guidance_form == "cfg":
            guided = forms.classifier_free(strong, weak, scale_of(policy, scale, extra), policy.combine)
        elif weak is not None and self.guidance_form == "cfg-zero-star":
            guided = forms.zero_star(strong, weak, scale, theory)
        elif weak is not None:
            guided = forms.adaptive_projected(strong, weak, scale, theory, momentum=MOMENTUM)
        if self.pag_scale:
            guided = forms.plus_perturbed(guided, strong, perturbed, self.pag_scale)
        if self.guidance_rescale:
            guided = forms.rescale_std(strong, guided, theory, self.guidance_rescale)
        return guided

    def check_latents(self, codec: Codec) -> None:
        """Refuse a weaker model whose latents are others."""
        if not isinstance(self.autoguidance_model, Model):
            return
        own = self.autoguidance_model.codec
        if own.latent_channels != codec.latent_channels or own.stride != codec.stride:
            raise Refused(
                f"autoguidance_model has latents of {own.latent_channels} channels and stride {own.stride}, "
                f"this model {codec.latent_channels} and {codec.stride}; "
                "both must have been trained on the same codec."
            )

    def autoguidance_denoiser(
        self, model: Model, prompts: Sequence[str], options: Mapping[str, Any]
    ) -> Denoise | None:
        """The weaker model's denoiser for these prompts, in the theory of `model`; None without one."""
        self.check_latents(model.codec)
        by = self.autoguidance_model
        if not isinstance(by, Model):
            return None
        told = by.condition(prompts, **options).to(by.device, by.dtype)

        def ask(x_t: Tensor, t: Tensor) -> Tensor:
            return by.predict(x_t.to(by.device, by.dtype), t.to(by.device), told).to(x_t)

        return ask if by.theory is model.theory else translate(ask, by.theory, model.theory)


AS_USUAL = GuidanceOptions()


def scale_of(policy: GuidancePolicy, scale: float, extra: Mapping[str, Any]) -> forms.Scale:
    """How far to lean, always or, where further options say so, at each time t [B]."""
    if not policy.options:
        return scale
    return lambda t: policy.guidance_at(scale, float(t.flatten()[0]), extra)


def mark_perturbed(condition: Condition, perturbed: bool) -> Condition:
    """The condition, whose samples are or are not to have their attention disturbed."""
    flags = torch.full((condition.size,), perturbed, dtype=torch.bool)
    return Condition({**condition, "perturbed": flags})
