"""Qwen-Image-Edit: Qwen-Image that edits; the picture is read by Qwen2.5-VL and stands in the sequence.

Edit Plus (2509) is shown several pictures, smaller ones to its reader.
Source: Wu et al. 2025, arXiv:2508.02324, section 4.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.pretrained.families.qwen_image import QwenImage as Qwen
from sfumato.models.pretrained.image_inputs import Encode, ImageCondition, Pictures, encode_references


class VisionTextProcessor:
    """What Qwen2VLProcessor does, composed of a tokenizer and an image processor: no torchvision is needed.

    Every mark of a picture in the text becomes as many as the picture has tokens.
    """

    written_as = ("transformers", "Qwen2VLProcessor")
    """How a pipeline's index names it."""

    def __init__(self, image_processor: Any, tokenizer: Any):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.mark = getattr(tokenizer, "image_token", None) or "<|image_pad|>"

    def __call__(self, text: Sequence[str], images: Any = None, **options: Any) -> Any:
        """Token numbers and masks of the texts, with the pictures' patches."""
        from transformers import BatchFeature

        texts, seen = list(text), {}
        if images is not None:
            seen = dict(self.image_processor(images=images, return_tensors="pt"))
            merged = self.image_processor.merge_size**2
            counts = [int(one.prod()) // merged for one in seen["image_grid_thw"]]
            for place, line in enumerate(texts):
                pieces = line.split(self.mark)
                filled = [self.mark * counts.pop(0) + piece for piece in pieces[1:]]
                texts[place] = "".join([pieces[0], *filled])
        words = self.tokenizer(texts, padding=True, return_tensors="pt")
        return BatchFeature({**words, **seen})

    def save_pretrained(self, folder: Path) -> None:
        """The files from which either is built again."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class QwenImageEdit(Qwen):
    """`reference` [B, 16, 1, h, w]: latents of the picture, at about a megapixel."""

    pipelines = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")
    image_arguments = ("image",)
    requires_image = True

    def custom_components(self, folder: Path) -> dict[str, Any]:
        """The processor, from its own files."""
        from transformers import AutoTokenizer, Qwen2VLImageProcessor

        place = folder / "processor"
        files = [place / name for name in ("preprocessor_config.json", "processor_config.json")]
        said = next((json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()), {})
        settings = said.get("image_processor", said)
        looks = Qwen2VLImageProcessor.from_dict(dict(settings))
        words = place if (place / "tokenizer_config.json").is_file() else folder / "tokenizer"
        return {
            "processor": VisionTextProcessor(
                looks, AutoTokenizer.from_pretrained(words, local_files_only=True, trust_remote_code=False)
            )
        }

    def read(self, pipe: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Each prompt with its pictures; alone, since pictures differ in their number of tokens."""
        shown = options.get("image") or [[] for _ in prompts]
        rows = []
        for prompt, pictures in zip(prompts, shown, strict=True):
            seen = [self.looked_at(pipe, one) for one in pictures]
            if self.several(pipe):
                given: Any = seen or None
            elif len(seen) == 1:
                given = seen[0]
            else:
                raise Refused(f"Qwen-Image-Edit is shown one picture for each prompt, not {len(seen)}.")
            read = super().read(pipe, [prompt], {**options, "image": given})
            rows.append({"tokens": read["tokens"][0][read["mask"][0]]})
        return dict(Condition.stack(rows))

    reads_pictures = True

    def training_images(self, pipe: Any, encode: Encode) -> dict[str, ImageCondition]:
        """The picture to begin with, as large as what is learned."""
        return {"reference": ImageCondition(False, encode, "1")}

    def several(self, pipe: Any) -> bool:
        """Whether this pipeline is shown several pictures."""
        return type(pipe).__name__ == "QwenImageEditPlusPipeline"

    def module(self, pipe: Any) -> Any:
        """The pipeline's module, which holds its sizes."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

        return pipeline_qwenimage_edit_plus if self.several(pipe) else pipeline_qwenimage_edit

    def sides(self, pipe: Any, picture: Any, name: str) -> tuple[int, int]:
        """(width, height) for the reader (CONDITION_IMAGE_SIZE) or the codec (VAE_IMAGE_SIZE)."""
        home = self.module(pipe)
        area = getattr(home, name, 1024 * 1024)
        width, height = home.calculate_dimensions(area, picture.width / picture.height)[:2]
        return width, height

    def looked_at(self, pipe: Any, picture: Any) -> Any:
        """The picture as the reader is shown it."""
        width, height = self.sides(pipe, picture, "CONDITION_IMAGE_SIZE")
        return pipe.image_processor.resize(picture, height, width)

    def encode_images(
        self, pipe: Any, shown: Mapping[str, Sequence[Pictures]], options: Mapping[str, Any], encode: Encode
    ) -> dict[str, Tensor]:
        """References in the order they are shown."""

        def prepare(one: Any) -> Tensor:
            width, height = self.sides(pipe, one, "VAE_IMAGE_SIZE")
            if not self.several(pipe):
                one = pipe.image_processor.resize(one, height, width)
            return pipe.image_processor.preprocess(one, height, width).unsqueeze(2)

        return encode_references(shown["image"], prepare, encode)

    def output_size(self, pipe: Any, pictures: Pictures) -> tuple[int, int] | None:
        """About a megapixel with the last picture's ratio."""
        width, height = self.sides(pipe, pictures[-1], "VAE_IMAGE_SIZE")
        step = pipe.vae_scale_factor * 2
        return height // step * step, width // step * step
