"""Drawing: conditioners → solver → codec.

A picture depends on its prompt and its own seed, not on what is drawn beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato import stages
from sfumato.errors import Refused
from sfumato.stages import Condition, Model
from sfumato.theory import guidance as guiding
from sfumato.theory import noise, solve
from sfumato.theory import times as sampling_times

DEFAULT_STEPS, DEFAULT_GUIDANCE, DEFAULT_SIDE = 20, 3.0, 64


@dataclass(frozen=True)
class Wish:
    """One picture to be drawn: what it shows, what it leans away from, and its own seed."""

    prompt: str
    negative: str | None
    seed: int


def wishes(
    prompt: str | Sequence[str] | None, negative: str | Sequence[str] | None, seed: int | Sequence[int]
) -> list[Wish]:
    """One wish a picture; single values serve all, and picture i of an int seed uses seed + i.

    Raises:
        Refused: lists of different lengths, or an empty one.
    """
    lists = {"prompt": prompt, "negative": negative, "seed": seed}
    lengths = {
        name: len(value)
        for name, value in lists.items()
        if isinstance(value, Sequence) and not isinstance(value, str)
    }
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        said = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise Refused(f"Lists must be as long as there are pictures, at least 1, but these have {said}.")
    count = next(iter(lengths.values()), 1)
    prompts = [prompt or ""] * count if prompt is None or isinstance(prompt, str) else list(prompt)
    away = [negative] * count if negative is None or isinstance(negative, str) else list(negative)
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    return [Wish(*wish) for wish in zip(prompts, away, seeds, strict=True)]


class PaintingModel(Model):
    """A model that draws."""

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        negative: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        times: Any = None,
        solver: str | None = None,
        latents: Tensor | None = None,
        batch: int = 64,
        watch: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> list[Image.Image]:
        """Draw one picture a prompt.

        Args:
            prompt, negative, seed: one for all or a list; without a negative, guidance leans away from
                the model's unprompted answer.
            steps: network evaluations a picture; guidance: 1 for none, then also half the work.
            height, width: pixels; default the size the model was trained at.
            times: a grid for `solve`, or its name ("linear", "karras", …); default the solver's own.
            solver: default "auto".
            latents: unit noise [B, C, h, w] to start from, instead of noise from the seeds.
            batch: pictures drawn at once; changes memory, not pictures.
            watch: called with (pictures' steps done, in all).
            options: further arguments of the conditioner.
        Returns:
            PIL images, RGB.
        Raises:
            Refused: sizes, lists or arguments that do not fit.
        """
        if frames is not None:
            raise Refused(f"frames = {frames}: this model draws pictures, not clips. Leave frames out.")
        todo = wishes(prompt, negative, seed)
        side = int(self.info.get("resolution", DEFAULT_SIDE))
        steps = int(self.info.get("steps", DEFAULT_STEPS)) if steps is None else steps
        guidance = float(self.info.get("guidance", DEFAULT_GUIDANCE)) if guidance is None else guidance
        shape = self.latent_shape(width or side, height or side)
        if latents is not None and tuple(latents.shape) != (len(todo), *shape):
            raise Refused(f"latents are {list(latents.shape)}, but {[len(todo), *shape]} are needed.")
        grid = sampling_times.grid(times, self.theory, steps) if isinstance(times, str) else times
        pictures: list[Image.Image] = []
        for first in range(0, len(todo), batch):
            some = todo[first : first + batch]
            start = self.start(some, shape) if latents is None else latents[first : first + batch]
            denoise = self.guided(some, guidance, options)
            x = start.to(self.device, self.dtype)
            with torch.no_grad():
                path = solve(denoise, x, self.theory, steps if grid is None else grid, solver or "auto")
                for step, state in enumerate(path, 1):
                    x = state
                    if watch is not None:
                        watch(first * steps + step * len(some), len(todo) * steps)
                pictures += to_images(self.decode(x))
        return pictures

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """[C, h, w] of the latents of a picture of this size."""
        self.codec.check_size(width, height)
        return self.codec.latent_channels, height // self.codec.stride, width // self.codec.stride

    def start(self, todo: Sequence[Wish], shape: tuple[int, ...]) -> Tensor:
        """The noise each picture starts from [B, C, h, w]."""
        return noise.normal(shape, [wish.seed for wish in todo], [0] * len(todo), purpose="start")

    def guided(
        self, todo: Sequence[Wish], guidance: float, options: dict[str, Any]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The denoiser of these wishes: leaning away from the weaker answer unless guidance is 1."""
        prompted = self.condition([wish.prompt for wish in todo], **options)
        if guidance == 1 or not len(prompted):
            strong = prompted.to(self.device, self.dtype)
            return lambda x_t, t: self.predict(x_t, t, strong)
        away = [wish.negative for wish in todo]
        weak = (
            self.conditioner.null(len(todo))
            if all(text is None for text in away)
            else self.condition([text or "" for text in away], **options)
        )
        both = Condition.join(prompted, weak).to(self.device, self.dtype)
        return guiding.batched(lambda x_t, t: self.predict(x_t, t, both), guidance)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1], clamped → PIL images."""
    bytes_ = pixels.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in bytes_]


def load(folder: Path | str, dtype: str = "float32", device: str = "cpu") -> PaintingModel:
    """The model in a folder, or of a run, ready to draw; `stages.load` says what it takes."""
    return cast(PaintingModel, stages.load(folder, dtype, device, model_class=PaintingModel))


def painting(model: Model, denoiser: Any = None) -> PaintingModel:
    """The same stages as a model that draws, optionally with other weights (the averaged ones)."""
    return PaintingModel(model.theory, model.codec, model.conditioner, denoiser or model.denoiser, model.info)
