"""One answer, asked everywhere: what was written must answer as the model it was written from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import Failed
from sfumato.generation import Pipeline
from sfumato.models.pretrained.stages import PretrainedConditioner

CLOSE = 1e-3
"""The largest difference between our answer and that of the file, over the answer's deviation."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how near the answer of the file is to ours (over the answer's deviation)."""

    files: tuple[Path, ...]
    difference: float
    effect: float
    metadata: Mapping[str, str]


# ---------------------------------------------------------------- one answer, asked everywhere


def example_inputs(model: Pipeline, words: str = "") -> tuple[Tensor, Any]:
    """Latents and a condition that any copy of this model can be asked about; its prompt says `words` too."""
    kind = model.conditioner.kind
    sees = model.conditioner.shows if isinstance(model.conditioner, PretrainedConditioner) else ()
    side = 8 * model.codec.stride if model.codec.stride > 1 else int(model.info["width"])
    frames = 1 + model.codec.time_stride if "frames" in model.info else None
    if kind == "labels":
        side = int(model.info["width"])
    shape = model.latent_shape(side, side, frames)
    given: dict[str, Any] = {}
    if sees:
        given = {name: Image.new("RGB", (side, side), (180, 90, 40)) for name in sees}
        given |= model.codec.pixel_size(shape) if model.conditioner.sizes_images else {}
    prompts = ["0"] if kind == "labels" else [f"a picture of a red circle {words}".strip()]
    prompt = None if kind == "none" else prompts
    condition = model.condition(prompt, **given) if prompt is not None else model.condition()
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)), condition


@torch.no_grad()
def answers(model: Pipeline, x: Tensor, condition: Any) -> list[Tensor]:
    """The denoiser's answers at much and at little noise."""
    moments = [
        model.theory.t_data + share * (model.theory.t_noise - model.theory.t_data) for share in (0.95, 0.3)
    ]
    return [model.predict(x.to(model.dtype), moment, condition).float() for moment in moments]


def answers_and_conditions(model: Pipeline, x: Tensor, condition: Any) -> list[Tensor]:
    """The answers, and what was read before them."""
    read = [tensor.float() for tensor in condition.values() if tensor.is_floating_point()]
    return [*answers(model, x, condition), *read]


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, over the deviation."""
    return max(float((a - b).abs().max() / a.std().clamp(min=1e-8)) for a, b in zip(one, other, strict=True))


def check_agreement(ours: list[Tensor], theirs: list[Tensor], where: str) -> float:
    """The difference of two answers.

    Raises:
        Failed: it is too large.
    """
    difference = largest_difference(ours, theirs)
    if not difference < CLOSE:
        raise Failed(
            f"What was written answers otherwise once {where} has loaded it: the difference is "
            f"{difference:.1e} of the answer's deviation, more than {CLOSE:.0e}. Nothing was kept."
        )
    return difference


def with_same_prompts(fresh: Pipeline, model: Pipeline) -> Pipeline:
    """The fresh model, its prompts read with the run's options, and asked in the run's theory."""
    if model.trained is not None:
        fresh.retarget(model.theory)
    if isinstance(fresh.conditioner, PretrainedConditioner):
        fresh.conditioner.usual = dict(model.info.get("prompt_options", {}))
    return fresh
