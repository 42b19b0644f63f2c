"""Drawing: conditioners → solver → codec.

A picture depends on its prompt and its own seed, not on what is drawn beside it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato import stages
from sfumato.errors import Refused
from sfumato.stages import Condition, Model
from sfumato.stages.seeing import pictures_of
from sfumato.theory import Theory, noise, solve
from sfumato.theory import guidance as guiding
from sfumato.theory import times as sampling_times

from . import guiding as showing
from .frames import Framed
from .frames import taken as frames_of
from .guiding import Guiding
from .leaning import AS_USUAL, Leaning, marked

Denoise = Callable[[Tensor, Tensor], Tensor]
DEFAULT_STEPS, DEFAULT_GUIDANCE, DEFAULT_SIDE = 20, 3.0, 64


@dataclass(frozen=True)
class Wish:
    """One picture to be drawn: what it shows, what it leans away from, and its own seed."""

    prompt: str
    negative: str | None
    seed: int
    shown: Mapping[str, list[Image.Image]] = field(default_factory=dict)

    @property
    def looks(self) -> list[tuple[str, tuple[int, int]]]:
        """The sizes of the pictures it is shown; only equal ones can be drawn together."""
        return [(name, one.size) for name, some in self.shown.items() for one in some]


def wishes(
    prompt: str | Sequence[str] | None,
    negative: str | Sequence[str] | None,
    seed: int | Sequence[int],
    shown: Mapping[str, Any],
) -> list[Wish]:
    """One wish a picture; single values serve all, and picture i of an int seed uses seed + i.

    `shown` holds pictures by the argument that brings them: one for all, one for each, or a list for each.

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
    many = [len(some) for some in shown.values() if isinstance(some, list | tuple)]
    count = next(iter(lengths.values()), max(many, default=1) if prompt is None else 1)
    prompts = [prompt or ""] * count if prompt is None or isinstance(prompt, str) else list(prompt)
    away = [negative] * count if negative is None or isinstance(negative, str) else list(negative)
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    seen = {name: pictures_of(some, count, name) for name, some in shown.items()}
    return [
        Wish(*wish, {name: some[i] for name, some in seen.items()})
        for i, wish in enumerate(zip(prompts, away, seeds, strict=True))
    ]


def together(todo: Sequence[Wish], most: int) -> Iterator[Sequence[Wish]]:
    """The wishes in order, at most so many at once, and only those that are shown pictures of equal sizes."""
    first = 0
    for last in range(1, len(todo) + 1):
        if last == len(todo) or last - first == most or todo[last].looks != todo[first].looks:
            yield todo[first:last]
            first = last


class PaintingModel(Model):
    """A model that draws."""

    framed = Framed()
    """How the frames of clips are asked for."""

    def asking(self, framed: Framed) -> Self:
        """The same model, its clips asked for so."""
        other = copy(self)
        other.framed = framed
        return other

    def predict(self, x_t: Tensor, t: Tensor | float, condition: Condition) -> Tensor:
        """The network's answer at t in the theory's own time: scalar, [B], or one for each frame [B, F]."""
        times = torch.as_tensor(t, dtype=torch.float64, device=x_t.device)
        return self.framed.ask(super().predict, self.theory)(x_t, times, condition)

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
        tile: int = 0,
        chunk: int = 0,
        watch: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> list[Any]:
        """Draw one picture (or clip) a prompt.

        Args:
            prompt, negative, seed: one for all or a list; without a negative, guidance leans away from
                the model's unprompted answer.
            steps: network evaluations a picture; guidance: 1 for none, then also half the work.
            height, width, frames: pixels, and pictures of a clip; default as the model was trained.
            times: a grid for `solve`, or its name ("linear", "karras", …); default the pretrained pipeline's
                own, else the solver's; times fitted to the model (`sfumato theory fit`) go before both.
            solver: default the nearest to the pretrained pipeline's scheduler, else "auto".
            latents: unit noise [B, C, (F,) h, w] to start from, instead of noise from the seeds.
            batch: pictures drawn at once; changes memory, not pictures.
            tile, chunk: decode in tiles of so many pixels a side, so many frames of a clip at once; 0 for the
                whole. Of our own codecs the result is the same.
            watch: called with (pictures' steps done, in all).
            options: pictures that guide (one for all or one for each prompt): `control` with control_weight,
                control_start, control_end (lists where there are several ControlNets), `reference` with
                reference_scale, `init` with strength and `mask` (white is repainted), `image` (to be edited,
                or a list for each); guidance_form, guidance_rescale, guidance_interval, guidance_perturbed,
                guidance_by as `Leaning` explains them; further arguments of the conditioner, by the
                pipeline's names.
                Of clips: `window` and `overlap`, frames the network sees at once and those that windows share
                (default of our own network: as it was trained, half of it); `image` and `last_image`, frames
                to begin and end with, where it was trained for that.
        Returns:
            PIL images, RGB; clips as uint8 arrays [F, H, W, 3].
        Raises:
            Refused: sizes, lists or arguments that do not fit.
        """
        prompt = [str(label) for label in options.pop("labels")] if "labels" in options else prompt
        shown = {name: options.pop(name) for name in self.conditioner.sees if options.get(name) is not None}
        knobs = {name: options.pop(name, usual) for name, usual in self.denoiser.knobs.items()}
        how = Leaning.taken(options)
        todo = wishes(prompt, negative, seed, shown)
        if shown and height is None and width is None and self.sampling is not None:
            height, width = self.sampling.size(next(iter(todo[0].shown.values()))) or (None, None)
        steps = int(self.info.get("steps", DEFAULT_STEPS)) if steps is None else steps
        guidance = float(self.info.get("guidance", DEFAULT_GUIDANCE)) if guidance is None else guidance
        shape = self.latent_shape(width, height, frames)
        pixels = self.codec.pixel_size(shape)
        moving = 1 + (shape[1] - 1) * self.codec.time_stride if "frames" in self.info else 0
        shows = showing.taken(self, options, len(todo), (pixels["width"], pixels["height"]), moving)
        if latents is not None and tuple(latents.shape) != (len(todo), *shape):
            raise Refused(f"latents are {list(latents.shape)}, but {[len(todo), *shape]} are needed.")
        grid = sampling_times.grid(times, self.theory, steps) if isinstance(times, str) else times
        order, most = None, None
        if times is None and solver in (None, "auto") and self.fitted is not None:
            grid, solver = self.fitted.grid(self.theory, steps), "auto"
        if self.sampling is not None and solver is None:
            solver, order = self.sampling.solver, self.sampling.order
            most = self.sampling.clip if grid is None else None
        scale = 1.0
        if self.sampling is not None and grid is None:
            grid, scale = self.sampling.times(steps, shape), self.sampling.first_scale(steps)
        if shows.init is not None:
            grid = shows.cut(sampling_times.cosine(self.theory, steps) if grid is None else grid)
        framed = frames_of(self, options, len(todo), shape)
        pictures: list[Any] = []
        for some in together(todo, batch):
            first = len(pictures)
            asker = self.asking(framed.part(slice(first, first + len(some))))
            start = self.start(some, shape) if latents is None else latents[first : first + len(some)]
            given = options | self.seen(some, shape)
            shown_now = shows.part(slice(first, first + len(some)))
            prompted = self.condition([wish.prompt for wish in some], **given)
            clock = self.clocked(grid, steps)
            denoise = asker.guided(prompted, some, guidance, given, knobs, shown_now, clock, how)
            if most is not None:
                denoise = within(denoise, self.theory, most)
            denoise = asker.framed.held(denoise, self.theory)
            with torch.no_grad():
                x, first_x = start, start * scale
                if shown_now.init is not None:
                    denoise = self.keeping(denoise, shown_now, start)
                    first_x = shown_now.started(self.theory, start, grid, first_x)
                for step, state in enumerate(
                    self.path(some, first_x, denoise, grid, steps, solver, order), 1
                ):
                    x = state
                    if watch is not None:
                        watch(first * steps + step * len(some), len(todo) * steps)
                x = asker.framed.finished(shown_now.kept(self.denoiser.finish(x, prompted)))
                pictures += to_pictures(
                    shown_now.pasted(self.decode(x, tile, chunk)), "frames" in self.info, frames
                )
        return pictures

    def path(
        self,
        todo: Sequence[Wish],
        start: Tensor,
        denoise: Callable[[Tensor, Tensor], Tensor],
        grid: Any,
        steps: int,
        solver: str | None,
        order: int | None = None,
    ) -> Iterator[Tensor]:
        """The states from these wishes' unit noise to their latents; without a grid, `steps` evaluations."""
        x = self.first_state(start, grid).to(self.device, self.dtype)
        draw = noise.of([wish.seed for wish in todo])
        given = steps if grid is None else grid
        return solve(denoise, x, self.theory, given, solver or "auto", order, noise=draw)

    def latent_shape(
        self, width: int | None = None, height: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """[C, (F,) h, w] of the latents of a picture or clip; by default as the model was trained.

        A number of frames that the codec does not give is rounded up; `generate` cuts what is too much.

        Raises:
            Refused: a size that does not fit, or frames of a model that draws pictures.
        """
        side = int(self.info.get("resolution", DEFAULT_SIDE))
        width = width or int(self.info.get("width", side))
        height = height or int(self.info.get("height", side))
        if frames is not None and "frames" not in self.info:
            raise Refused(f"frames = {frames}: this model draws pictures, not clips. Leave frames out.")
        if frames is not None and frames < 1:
            raise Refused(f"frames = {frames}: a clip has at least one frame.")
        step = self.codec.time_stride
        known = frames or int(self.info.get("frames", 1))
        count = 1 + -(-(known - 1) // step) * step
        return self.codec.latent_shape(width, height, count)

    def start(self, todo: Sequence[Wish], shape: tuple[int, ...]) -> Tensor:
        """The noise each picture starts from [B, C, h, w]."""
        return noise.normal(shape, [wish.seed for wish in todo], [0] * len(todo), purpose="start")

    def first_state(self, start: Tensor, grid: Any) -> Tensor:
        """What `solve` is given: unit noise; a pretrained pipeline takes it for its first state as it is."""
        if self.sampling is None or isinstance(grid, int):
            return start
        first = torch.as_tensor(grid, dtype=torch.float64)[..., 0]
        if float(first.max()) != self.theory.t_noise:
            return start
        return start / float(self.theory.data(first.max())[1])

    def seen(self, todo: Sequence[Wish], shape: tuple[int, ...]) -> dict[str, Any]:
        """What the conditioner is told of the pictures these wishes are shown, and of what is drawn."""
        shown: dict[str, Any] = {name: [wish.shown[name] for wish in todo] for name in todo[0].shown}
        return shown | (self.codec.pixel_size(shape) if shown and self.conditioner.placed else {})

    def guided(
        self,
        prompted: Condition,
        todo: Sequence[Wish],
        guidance: float,
        options: dict[str, Any],
        knobs: Mapping[str, Any],
        shows: Guiding,
        times: Sequence[float],
        how: Leaning = AS_USUAL,
    ) -> Denoise:
        """The denoiser of these wishes: leaning away from the weaker answer unless guidance is 1.

        `shows` holds the pictures that guide, `times` those at which steps begin and the last one ends.

        Raises:
            Refused: a negative that this network would not hear, a form of guidance that would not act.
        """
        away = [wish.negative for wish in todo]
        asked = any(text is not None for text in away)
        most = self.denoiser.scale(guidance, self.theory.t_noise, knobs)
        leans = bool(len(prompted)) and self.denoiser.leans(most, asked)
        if asked and not leans and "true_cfg_scale" in knobs:
            raise Refused(
                "This model hears its guidance and does not lean away from a negative by itself: "
                "leave the negative out, or give true_cfg_scale above 1 with it."
            )
        how.fits(self.denoiser, leans, asked)

        def asked_of(*conditions: Condition) -> Denoise:
            joined = conditions[0] if len(conditions) == 1 else Condition.join(*conditions)
            told = self.denoiser.told(joined, guidance).to(self.device, self.dtype)
            return lambda x_t, t: self.predict(x_t, t, shows.now(told, t, times))

        answers = [shows.beside(prompted).to(self.device)]
        alone = asked_of(*answers)
        if not leans and not how.perturbed:
            return alone
        given = how.weaker(self, [wish.prompt for wish in todo], options)
        if leans and given is None:
            with torch.no_grad():
                weak = shows.beside(self.conditioner.away(away, **options), is_weak=True)
            answers.append(weak.to(self.device))
        if how.perturbed:
            answers = [*(marked(one, False) for one in answers), marked(answers[0], True)]

        def usual(strong: Denoise, weak: Denoise, scale: float) -> Denoise:
            def answer(x_t: Tensor, t: Tensor) -> Tensor:
                now = self.denoiser.scale(scale, float(t.flatten()[0]), knobs) if knobs else scale
                return self.denoiser.lean(strong(x_t, t), weak(x_t, t), now)

            return answer

        def form(strong: Denoise, *others: Denoise) -> Denoise:
            weak = others[0] if leans and given is None else given
            return how.around(self.theory, guidance, usual, strong, weak, others[-1] if others else strong)

        guided = guiding.together(asked_of(*answers), form, len(answers))
        if how.interval is None:
            return guided
        return guiding.within(alone, guided, self.theory, *how.interval)

    def clocked(self, grid: Any, steps: int) -> list[float]:
        """The times at which steps begin, and the end; without a grid, as if they were even in time."""
        even = sampling_times.linear(self.theory, steps)
        return torch.as_tensor(even if grid is None else grid, dtype=torch.float64).flatten().tolist()

    def keeping(self, denoise: Denoise, shows: Guiding, unit: Tensor) -> Denoise:
        """The denoiser, with the true answer where the picture is kept; `unit` is the noise it began with."""
        if shows.hole is None:
            return denoise
        return lambda x_t, t: shows.known(self.theory, unit, denoise(x_t, t), t)


def within(denoise: Denoise, theory: Theory, most: float) -> Denoise:
    """The denoiser whose clean sample stays in [−most, most], at the same x_t."""

    def answer(x_t: Tensor, t: Tensor) -> Tensor:
        x_0, _ = theory.split(x_t, denoise(x_t, t), t)
        a, s = (level.to(x_t).view(-1, *[1] * (x_t.ndim - 1)) for level in theory.data(t))
        x_0 = x_0.clamp(-most, most)
        return theory.target(x_0, (x_t - a * x_0) / s, t)

    return answer


def to_pictures(pixels: Tensor, moving: bool, frames: int | None = None) -> list[Any]:
    """Pixels [B, 3, H, W] → PIL images; [B, 3, F, H, W] → clips [F, H, W, 3], or images unless `moving`.

    Of a clip the first `frames` frames are kept.
    """
    if pixels.ndim == 4:
        return to_images(pixels)
    if not moving:
        return to_images(pixels[:, :, 0])
    return [
        np.stack([np.asarray(image) for image in to_images(clip[:, :frames].transpose(0, 1))])
        for clip in pixels
    ]


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1], clamped → PIL images."""
    bytes_ = pixels.float().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in bytes_]


def load(
    folder: Path | str, dtype: str = "float32", device: str = "cpu", config: Path | str | None = None
) -> PaintingModel:
    """The model of a folder, a run or a single file, ready to draw; `stages.load` says what it takes."""
    return cast(PaintingModel, stages.load(folder, dtype, device, PaintingModel, config))


def painting(model: Model, denoiser: Any = None) -> PaintingModel:
    """The same stages as a model that draws, optionally with other weights (the averaged ones)."""
    painter = PaintingModel(
        model.theory, model.codec, model.conditioner, denoiser or model.denoiser, model.info
    )
    painter.origin, painter.sampling, painter.trained = model.origin, model.sampling, model.trained
    painter.fitted = model.fitted
    return painter
