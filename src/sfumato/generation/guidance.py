"""How guidance leans: which form it takes, when it acts, and what the weaker answer is.

`guidance` says how far. What is said here picks among the forms of `theory.guidance`, where all formulas
stand; all answers of one network at one time come from one call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused, one_of
from sfumato.generation.settings import FORMS
from sfumato.models import Codec, Condition, Denoiser, Model
from sfumato.models.guidance_policy import GuidancePolicy
from sfumato.models.pretrained import prompt_weights
from sfumato.theory import Theory, translate
from sfumato.theory import guidance as forms
from sfumato.theory.types import Denoise

MOMENTUM = -0.5
"""Of APG, as its paper has it for latent models."""
ARGUMENTS = {
    "form": "guidance_form",
    "rescale": "guidance_rescale",
    "interval": "guidance_interval",
    "pag_scale": "pag_scale",
    "autoguidance_model": "autoguidance_model",
}
"""{a field of `GuidanceOptions`: the argument of `generate` that means it}."""
RENAMED_ARGUMENTS = {"guidance_perturbed": "pag_scale", "guidance_by": "autoguidance_model"}
"""{what an argument was called before 0.2: what it is called}."""
RENAMED_FIELDS = {"perturbed": "pag_scale", "by": "autoguidance_model"}
"""{what a field was called in the info of models before 0.2: what it is called}."""


def check_negative(has_words: bool, leans: bool, guidance: float) -> None:
    """Raises Refused for a negative that nobody would hear.

    Args:
        has_words: whether a negative says anything; leans: whether the network leans away from it.
    """
    if has_words and not leans:
        raise Refused(
            f"negative says what to lean away from, but with guidance {guidance:g} this model does not lean. "
            "Give a guidance above 1, or leave negative out."
        )


@dataclass(frozen=True)
class GuidanceOptions:
    """What a user may say about guidance beside its scale; `ARGUMENTS` names the arguments of `generate`.

    Args:
        form: cfg, cfg-zero-star (arXiv:2503.18886) or apg (arXiv:2410.02416).
        rescale: share, 0 to 1, by which x_0 gets back the prompted one's deviation (arXiv:2305.08891).
        interval: (low, high), the noise-to-signal ratios s/a between which it acts (arXiv:2404.07724).
        pag_scale: how far to lean away from the same network with its attention disturbed
            (perturbed-attention guidance, arXiv:2403.17377); on top of the rest, also without prompts.
        autoguidance_model: a smaller or less trained model of the same latents, whose answer to the same
            prompt is the weaker one (arXiv:2406.02507); of any theory. Its folder may stand for it.
        said: the names among these that the caller gave; the others are the model's usual ones, kept from
            its recipe's [sample].
    """

    form: str = "cfg"
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    pag_scale: float = 0.0
    autoguidance_model: Model | str | Path | None = None
    said: frozenset[str] = frozenset()

    @classmethod
    def pop_from(cls, options: dict[str, Any], usual: Mapping[str, Any] | None = None) -> "GuidanceOptions":
        """Take the arguments about guidance out of `options`; what is not among them is as `usual`.

        Raises:
            Refused: a value that cannot be meant.
        """
        for old, new in RENAMED_ARGUMENTS.items():
            if (value := options.pop(old, None)) is not None:
                options.setdefault(new, value)
        asked = {name: options.pop(argument, None) for name, argument in ARGUMENTS.items()}
        said = {name: value for name, value in asked.items() if value is not None}
        known = {RENAMED_FIELDS.get(name, name): value for name, value in (usual or {}).items()}
        how = cls(**{**known, **said}, said=frozenset(said))
        if how.interval is not None:
            how = replace(how, interval=tuple(how.interval))
        one_of("guidance_form", how.form, FORMS)
        if not 0 <= how.rescale <= 1:
            raise Refused(f"guidance_rescale is {how.rescale:g}; it is a share between 0 and 1.")
        if not 0 <= how.pag_scale < float("inf"):
            raise Refused(f"pag_scale is {how.pag_scale:g}; it must be 0 or above.")
        if how.interval is not None and not (
            len(how.interval) == 2 and 0 <= how.interval[0] < how.interval[1]
        ):
            raise Refused(
                f"guidance_interval is {how.interval}; give two noise-to-signal ratios s/a, the lower first."
            )
        return how

    def effective(self, leans: bool, has_negative: bool) -> "GuidanceOptions":
        """Without those usual ways that have nothing to shape: no guidance, or a negative instead of
        `autoguidance_model`.
        """
        idle: set[str] = set()
        if not leans:
            idle = {"form", "autoguidance_model"} | (set() if self.pag_scale else {"rescale", "interval"})
        if has_negative and "autoguidance_model" not in self.said:
            idle.add("autoguidance_model")
        return replace(self, **{name: getattr(AS_USUAL, name) for name in idle - self.said})

    def validate(self, denoiser: Denoiser | type[Denoiser], leans: bool, has_negative: bool) -> None:
        """Refuse what would not act on this network at this guidance.

        Args:
            leans: whether there is a weaker answer to lean away from; has_negative: whether a negative was
                given.
        """
        policy = denoiser.guidance
        acts = {
            "guidance_form": self.form != "cfg",
            "guidance_rescale": self.rescale > 0,
            "guidance_interval": self.interval is not None,
            "autoguidance_model": self.autoguidance_model is not None,
        }
        idle = [name for name, said in acts.items() if said]
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
        if self.form != "cfg" and policy.has_own_form:
            raise Refused(
                f'guidance_form "{self.form}" would replace how this model leans by itself; leave it out.'
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
        if weak is not None and self.form == "cfg":
            guided = forms.classifier_free(strong, weak, scale_of(policy, scale, extra), policy.combine)
        elif weak is not None and self.form == "cfg-zero-star":
            guided = forms.zero_star(strong, weak, scale, theory)
        elif weak is not None:
            guided = forms.adaptive_projected(strong, weak, scale, theory, momentum=MOMENTUM)
        if self.pag_scale:
            guided = forms.plus_perturbed(guided, strong, perturbed, self.pag_scale)
        return forms.rescale_std(strong, guided, theory, self.rescale) if self.rescale else guided

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
        self, model: Model, prompts: Sequence[str], options: Mapping[str, Any], literal_prompt: bool = False
    ) -> Denoise | None:
        """`autoguidance_model` as a denoiser of these prompts, in the theory of `model`; None without it."""
        self.check_latents(model.codec)
        weaker = self.autoguidance_model
        if not isinstance(weaker, Model):
            return None
        with torch.no_grad(), weaker.at_work(weaker.conditioner):
            read = prompt_weights.encode(weaker.conditioner, prompts, literal_prompt, **options)
        condition = read.to(weaker.device, weaker.dtype)

        def ask(x_t: Tensor, t: Tensor) -> Tensor:
            return weaker.predict(x_t.to(weaker.device, weaker.dtype), t.to(weaker.device), condition).to(x_t)

        return ask if weaker.theory is model.theory else translate(ask, weaker.theory, model.theory)


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
