"""The three stages around a pretrained pipeline's own networks; what differs is asked of its family."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from hashlib import sha256
from typing import Any, Self

import torch
from torch import Tensor, nn

from sfumato.errors import Refused, nearest
from sfumato.models.condition import Condition
from sfumato.models.interface import Conditioner, Denoiser
from sfumato.models.pretrained import context_parallel
from sfumato.models.pretrained.chat_templates import bounded_templates, check_templates
from sfumato.models.pretrained.family import Family, called_with
from sfumato.models.pretrained.image_inputs import SHOWN, Encode, ImageCondition, images_per_prompt

INTERNAL = {
    "self", "prompt", "negative_prompt", "negative_prompt_2", "negative_prompt_3", "device", "dtype",
    "num_images_per_prompt", "num_videos_per_prompt", "do_classifier_free_guidance", "kwargs", "lora_scale",
}  # fmt: skip
"""Arguments of encode_prompt that are not a user's to choose; tensors (…_embeds, …_mask) are not either."""


class PretrainedConditioner(Conditioner):
    """A pipeline's tokenizers and text encoders, read as the pipeline reads them."""

    kind = "pretrained text"

    def __init__(self, family: Family, pipe: Any, encode: Encode):
        super().__init__()
        self.family, self.pipe, self.encode = family, pipe, encode
        self.image_arguments, self.sizes_images = (
            family.image_arguments,
            "height" in family.image_size_arguments,
        )
        check_templates(pipe)
        self.shows = family.required_images(pipe)
        """Those of `image_arguments` without which the network cannot be asked."""
        self.usual: dict[str, Any] = {}
        """Options of every prompt unless it says otherwise."""
        for name, part in pipe.components.items():
            if name.startswith(("text_encoder", "image_encoder")) and isinstance(part, nn.Module):
                self.add_module(name, part)

    def training_images(self) -> dict[str, ImageCondition]:
        """What training shows the network beside words."""
        return self.family.training_images(self.pipe, self.encode)

    def config(self) -> dict[str, Any]:
        """The pipeline whose reading this is, and its vocabularies."""
        words = {
            name: sha256(str(sorted(part.get_vocab().items())).encode()).hexdigest()
            for name, part in self.pipe.components.items()
            if name.startswith("tokenizer") and part is not None
        }
        usual = {name: str(value) for name, value in sorted(self.usual.items())}
        return {"pipeline": type(self.pipe).__name__, **words, **usual}

    def settings(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options for encode_prompt: the pipeline's own defaults, then the given.

        Raises:
            Refused: for an option it does not have.
        """
        call = called_with(type(self.pipe))
        names = options_of(type(self.pipe)) | {name: call[name] for name in self.family.image_size_arguments}
        names |= {name: call[name] for name in self.family.micro_conditioning_arguments if name in call}
        names.pop("image", None)
        for word in (given := {**self.usual, **options}):
            if word not in names:
                raise Refused(
                    f'{type(self.pipe).__name__} takes no "{word}" with its prompts.{nearest(word, names)}'
                )
        return {name: call.get(name, default) for name, default in names.items()} | given

    def forward(self, prompt: Sequence[str], **options: Any) -> Condition:
        """The condition of a batch of prompts and of the pictures beside them.

        Options are named as the pipeline names them; `image` holds one picture for each prompt, or a list.
        """
        return self.both(self.family.read, prompt, options)

    def words(self, prompt: Sequence[str]) -> Condition:
        """What is read of prompts alone, where a picture is shown beside them and not to their reader."""
        settings = self.settings({})
        for name in self.family.image_size_arguments:
            settings.pop(name, None)
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            return Condition(self.family.read(self.pipe, list(prompt), settings))

    def encode_negative(self, prompt: Sequence[str | None], **options: Any) -> Condition:
        """The condition to lean away from, encoded as the pipeline encodes a negative prompt."""
        return self.both(self.family.read_negative, prompt, options)

    def both(self, read: Callable[..., dict[str, Tensor]], prompt: Sequence[Any], options: Any) -> Condition:
        """What is read and what is seen; with gradients only where the encoders learn."""
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            return self._both(read, prompt, options)

    def _both(self, read: Callable[..., dict[str, Tensor]], prompt: Sequence[Any], options: Any) -> Condition:
        given = {name: options.pop(name) for name in SHOWN if options.get(name) is not None}
        for name in SHOWN:
            options.pop(name, None)
        if wrong := [name for name in given if name not in self.image_arguments]:
            raise Refused(
                f"{type(self.pipe).__name__} takes no {wrong[0]}: "
                + (
                    f"it takes {' and '.join(self.image_arguments)}."
                    if self.image_arguments
                    else "it draws from words alone."
                )
            )
        if self.family.requires_image and "image" not in given and any(prompt):
            raise Refused(
                f"{type(self.pipe).__name__} starts from a picture: give image=[…], or --image FILE."
            )
        settings = self.settings(options)
        shown = {name: images_per_prompt(value, len(prompt), name) for name, value in given.items()}
        apart = {name: settings.pop(name) for name in self.family.image_size_arguments}
        reads = "image" in inspect.signature(self.pipe.encode_prompt).parameters
        beside = {"image": shown.get("image")} if reads else {}
        with bounded_templates(self.pipe):
            tensors = read(self.pipe, prompt, settings | beside)
        return Condition(
            tensors | (self.family.encode_images(self.pipe, shown, apart, self.encode) if shown else {})
        )

    def encode_empty(self, count: int) -> Condition:
        """What the pipeline leans away from when it is given no negative."""
        return self.encode_negative([None] * count)


@cache
def options_of(pipeline: type) -> dict[str, Any]:
    """What a user may choose of a pipeline's encode_prompt, with the defaults."""
    return {
        name: parameter.default if parameter.default is not inspect.Parameter.empty else None
        for name, parameter in inspect.signature(pipeline.encode_prompt).parameters.items()
        if name not in INTERNAL and not name.endswith(("_embeds", "_mask"))
    }


class PretrainedDenoiser(Denoiser):
    """A pipeline's own network, asked as its family asks it."""

    kind = "pretrained denoiser"

    def __init__(self, family: Family, network: nn.Module):
        super().__init__()
        self.family, self.network, self.guidance = family, network, family.guidance_policy(network)
        self.lora_targets, self.micro_conditioning = family.lora_targets, family.micro_conditioning
        self.trains_micro_conditioning = family.trains_micro_conditioning

    def train(self, mode: bool = True) -> Self:
        """As any network; but classes are dropped by whoever trains, so the network must not drop its own."""
        super().train(mode)
        for part in self.network.modules():
            if type(part).__name__ == "LabelEmbedding":
                part.training = False
        return self

    def config(self) -> dict[str, Any]:
        """The network's own config."""
        config: Any = self.network.config
        return {"class": type(self.network).__name__, **dict(config)}

    def forward(self, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """The network's raw answer, in the latents' layout."""
        try:
            return self.family.predict(self.network, x, clock, condition)
        except AssertionError as problem:
            if "divisible by mesh size" not in str(problem):
                raise
            size = "×".join(map(str, x.shape[2:]))
            raise Refused(
                f"Latents of {size} become tokens that cannot be shared evenly by the processes of "
                "train.context_parallel. Choose another data.resolution, data.frames or "
                "train.context_parallel."
            ) from problem

    def check_context_parallel(self, count: int) -> None:
        """Raises Refused unless so many processes can share a sample."""
        context_parallel.check(self.network, count, self.family.no_context_parallel)

    def enable_context_parallel(self, mesh: Any) -> None:
        """Let the processes of a mesh share each sample, through diffusers' hooks; None: no longer."""
        if mesh is None:
            context_parallel.unshare(self.network)
        else:
            self.check_context_parallel(mesh.size())
            context_parallel.share(self.network, mesh)

    def mask_error(self, error: Tensor, condition: Condition) -> Tensor:
        """Without what the network is given."""
        return self.family.mask_error(error, condition)

    def finalize_latents(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents as they are decoded."""
        return self.family.finalize_latents(self.network, x, condition)
