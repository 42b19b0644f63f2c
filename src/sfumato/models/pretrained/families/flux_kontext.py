"""FLUX.1 Kontext: FLUX.1 that edits; the picture it is shown stands in the sequence behind the noise.

Source: Labs et al. 2025, arXiv:2506.15742.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from sfumato.errors import Refused
from sfumato.models.pretrained.families.flux import Flux as Flux1
from sfumato.models.pretrained.image_inputs import Encode, ImageCondition, Pictures, encoded


class FluxKontext(Flux1):
    """`reference` [B, 16, h, w]: latents of the picture, at the nearest size of the training.

    `_auto_resize=False` keeps its own size, cut to whole patches.
    """

    pipelines = ("FluxKontextPipeline",)
    image_arguments = ("image",)
    image_size_arguments = ("_auto_resize",)
    as_trained: ClassVar[Mapping[str, Any]] = {"_auto_resize": False}

    def training_images(self, pipe: Any, encode: Encode) -> dict[str, ImageCondition]:
        """The picture to begin with, as large as what is learned."""
        return {"reference": ImageCondition(False, encode, "1")}

    def encode_images(
        self, pipe: Any, shown: Mapping[str, Sequence[Pictures]], options: Mapping[str, Any], encode: Encode
    ) -> dict[str, Tensor]:
        """One picture for each prompt."""
        from diffusers.pipelines.flux import pipeline_flux_kontext as kontext

        step, pixels = pipe.vae_scale_factor * 2, []
        for pictures in shown["image"]:
            if len(pictures) != 1:
                raise Refused(f"FLUX.1 Kontext is shown one picture for each prompt, not {len(pictures)}.")
            height, width = pipe.image_processor.get_default_height_width(pictures[0])
            if options["_auto_resize"]:
                known = kontext.PREFERRED_KONTEXT_RESOLUTIONS
                _, width, height = min((abs(width / height - w / h), w, h) for w, h in known)
            width, height = width // step * step, height // step * step
            resized = pipe.image_processor.resize(pictures[0], height, width)
            pixels.append(pipe.image_processor.preprocess(resized, height, width))
        return {"reference": encoded(encode, pixels)}
