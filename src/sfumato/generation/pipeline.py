"""Drawing: conditioners → solver → codec.

A picture depends on its prompt and its own seed, not on what is drawn beside it.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato import models
from sfumato.errors import Refused, one_of
from sfumato.generation import finite, image_guidance
from sfumato.generation.adjustable_model import AdjustableModel
from sfumato.generation.grid import GridCell, draw_cells
from sfumato.generation.guidance import GuidanceOptions, check_negative, mark_perturbed
from sfumato.generation.image_guidance import ImageGuidance
from sfumato.generation.memory_limit import LimitedPlacement, place_within, within_memory
from sfumato.generation.regions import Regions, parse_regions
from sfumato.generation.requests import SampleRequest, batches, parse_requests
from sfumato.generation.video import VideoConditioning, parse_video
from sfumato.models import Condition, Model
from sfumato.models.codecs import tiling
from sfumato.models.io.model import DTYPES
from sfumato.models.pretrained import prompt_weights
from sfumato.settings import parse_bytes
from sfumato.theory import Theory, noise, solve
from sfumato.theory import guidance as forms
from sfumato.theory import times as sampling_times
from sfumato.theory.definition import as_float64
from sfumato.theory.types import Denoise
from sfumato.trust import trusting

# ----------------------------------------------------------------
# What is decided before a picture is begun: when the network is asked, and what guides its answers.


@dataclass(frozen=True)
class SamplingSchedule:
    """When the network is asked, and how its answers become steps.

    grid: of times, or None for `steps` evaluations of the solver's own choice; scale: of the first state;
    clip: the bound within which a pretrained pipeline keeps the clean sample; uses_own_scheduler: whether its
    scheduler takes the steps itself.
    """

    grid: Any
    steps: int
    solver: str | Callable[..., Any] | None = None
    order: int | None = None
    scale: float = 1.0
    clip: float | None = None
    uses_own_scheduler: bool = False


@dataclass(frozen=True)
class SamplingPlan:
    """All that is decided before the first picture is begun; `options` are left for the conditioner."""

    shape: tuple[int, ...]
    guidance: float
    schedule: SamplingSchedule
    images: ImageGuidance
    video: VideoConditioning
    guidance_options: GuidanceOptions
    regions: Regions
    extra_guidance: Mapping[str, Any]
    options: dict[str, Any]
    literal_prompt: bool = False

    def part(self, rows: slice) -> "SamplingPlan":
        """What is decided about some of the pictures."""
        return replace(self, images=self.images.part(rows), video=self.video.part(rows))


DEFAULT_STEPS, DEFAULT_GUIDANCE, DEFAULT_SIDE = 20, 3.0, 64


class Pipeline(AdjustableModel):
    """A model that draws."""

    video = VideoConditioning()
    """How the frames of clips are asked for."""

    def with_video(self, video: VideoConditioning) -> Self:
        """The same model, its clips asked for so."""
        other = copy(self)
        other.video = video
        return other

    def predict(self, x_t: Tensor, t: Tensor | float, condition: Condition) -> Tensor:
        """The network's answer at t in the theory's own time: scalar, [B], or one for each frame [B, F]."""
        times = as_float64(t)  # where they are: those on the host cost a GPU nothing
        return self.video.ask(super().predict, self.theory)(x_t, times, condition)

    @torch.no_grad()
    def decode(self, latents: Tensor, tile: int = 0, chunk: int = 0) -> Tensor:
        """Latents → pixels, not clamped; to save memory, tiles of so many pixels, frames of a chunk."""
        if not (cut := tiling.Tiling(tile, chunk)):
            try:
                return super().decode(latents)
            except torch.OutOfMemoryError:
                if not (isinstance(self.placement, LimitedPlacement) and tiling.can_tile(self.codec)):
                    raise
            cut = tiling.usual(self.codec)
            self.placement.say(f"The codec does not fit at once: it decodes tiles of {cut.tile} pixels.")
        with self.at_work(self.codec):
            return tiling.decode_tiled(self.codec, self.codec_input(latents), cut)

    def grid(
        self,
        axes: Mapping[str, Sequence[Any]],
        watch: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> Iterator[GridCell]:
        """Draw one picture (or clip) for each cell of a grid, and yield it with its place and settings.

            for cell in model.grid({"lora": [0, 0.5, 1], "seed": [1, 2, 3, 4]}, prompt="a red apple"): ...

        Each is, bit for bit, what `generate` draws with the same settings; those of one seed begin with the
        same noise. Afterwards the model's weights are as they were.

        Args:
            axes: {name: values}: any argument of `generate`, one value for each cell; `lora` for
                `set_lora_scale`, `checkpoint` for steps or names of the run's checkpoints, or "all", and
                `size` for (width, height).
            watch: called with (hundredths of cells done, in all); settings: as of `generate`, of every cell.
        Raises:
            Refused: an axis without values, no such checkpoint, no LoRA to scale.
        """
        return draw_cells(self, axes, watch, **settings)

    def save(self, folder: Path | str) -> None:
        """Write everything into one folder of safetensors and JSON, all or nothing."""
        models.save(self, folder)

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
        solver: str | Callable[..., Any] | None = None,
        latents: Tensor | None = None,
        batch: int = 64,
        tile: int = 0,
        chunk: int = 0,
        watch: Callable[[int, int], None] | None = None,
        literal_prompt: bool = False,
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
            solver: default the nearest to the pretrained pipeline's scheduler, else "auto"; one's own is a
                function or `file.py:name` (`theory.solvers.user_solver`).
            latents: unit noise [B, C, (F,) h, w] to start from, instead of noise from the seeds.
            batch: pictures drawn at once; changes memory, not pictures.
            tile, chunk: decode in tiles of so many pixels a side, so many frames of a clip at once; 0: whole.
            watch: called with (pictures' steps done, in all).
            literal_prompt: read brackets as they stand; else (red:1.3), ((word)) and [word] are weights where
                the model reads with CLIP or T5 (`prompt_weights`), and where it does not, a warning says so.
            options: pictures that guide (`control`, `reference`, `init`, `mask`, `image`, …) as
                `image_guidance.parse_image_guidance` explains; `regions` as in `regions.parse_regions`;
                guidance_form, guidance_rescale, … as `GuidanceOptions`; of clips `window`, `overlap`,
                `image`, `last_image` as `video.parse_video`; further arguments of the conditioner, by the
                pipeline's names.
        Returns:
            PIL images, RGB; clips as uint8 arrays [F, H, W, 3].
        Raises:
            Refused: sizes, lists or arguments that do not fit, a weight that is no number.
            Failed: what was drawn is no number.
        """
        finite.check_arguments({"guidance": guidance, "times": times, "latents": latents, **options})
        prompt = [str(label) for label in options.pop("labels")] if "labels" in options else prompt
        shown = {
            name: options.pop(name)
            for name in self.conditioner.image_arguments
            if options.get(name) is not None
        }
        todo = parse_requests(prompt, negative, seed, shown)
        shape = self.latent_shape(*self.size_from_images(todo, height, width), frames)
        if latents is not None and tuple(latents.shape) != (len(todo), *shape):
            raise Refused(f"latents are {list(latents.shape)}, but {[len(todo), *shape]} are needed.")
        plan = self.sampling_plan(
            len(todo), shape, guidance, self.schedule(shape, steps, times, solver), options
        )
        plan = replace(plan, literal_prompt=literal_prompt)
        if not literal_prompt:
            texts = [text or "" for request in todo for text in (request.prompt, request.negative)]
            for sentence in prompt_weights.notes(self.conditioner, [*texts, *plan.regions.prompts]):
                warnings.warn(sentence, prompt_weights.LiteralPromptWarning, stacklevel=2)
        pictures: list[Any] = []
        for some in batches(todo, batch):
            rows = slice(len(pictures), len(pictures) + len(some))
            start = self.initial_noise(some, shape) if latents is None else latents[rows]
            tell = (
                None if watch is None else partial(_tell_steps, watch, plan.schedule.steps, rows, len(todo))
            )
            draw = partial(self.sample_pixels, plan.part(rows), some, start, tile, chunk, tell)
            pixels = within_memory(self, draw)
            finite.check_result(pixels, self, plan.guidance)
            pictures += to_pictures(pixels, "frames" in self.info, frames)
        return pictures

    def size_from_images(
        self, todo: Sequence[SampleRequest], height: int | None, width: int | None
    ) -> tuple[int | None, int | None]:
        """Width and height; where none is said, those a pretrained pipeline takes from what it is shown."""
        if todo[0].shown and height is None and width is None and self.sampling is not None:
            height, width = self.sampling.output_size(next(iter(todo[0].shown.values()))) or (None, None)
        return width, height

    def schedule(
        self, shape: tuple[int, ...], steps: int | None, times: Any, solver: str | Callable[..., Any] | None
    ) -> SamplingSchedule:
        """When the network is asked, and which solver makes steps of its answers."""
        steps = int(self.info.get("steps", DEFAULT_STEPS)) if steps is None else steps
        grid = sampling_times.grid(times, self.theory, steps) if isinstance(times, str) else times
        if times is None and solver in (None, "auto") and self.fitted_times is not None:
            return SamplingSchedule(self.fitted_times.grid(self.theory, steps), steps, "auto")
        if self.sampling is None:
            return SamplingSchedule(grid, steps, solver)
        order, most, scale = None, None, 1.0
        if solver is None and grid is None and self.sampling.uses_own_scheduler(steps):
            times, nearest = self.sampling.times(steps, shape), self.sampling.solver
            return SamplingSchedule(times, steps, nearest, self.sampling.order, uses_own_scheduler=True)
        if solver is None:
            solver, order = self.sampling.solver, self.sampling.order
            most = self.sampling.clip_sample_range if grid is None else None
        if grid is None:
            grid, scale = self.sampling.times(steps, shape), self.sampling.init_noise_sigma(steps)
        return SamplingSchedule(grid, steps, solver, order, scale, most)

    def sampling_plan(
        self,
        count: int,
        shape: tuple[int, ...],
        guidance: float | None,
        schedule: SamplingSchedule,
        options: dict[str, Any],
    ) -> SamplingPlan:
        """Take what is said about guidance, pictures that guide and frames out of `options`."""
        extra = {name: options.pop(name, usual) for name, usual in self.denoiser.guidance.options.items()}
        how = self.guidance_options(options)
        pixels = self.codec.pixel_size(shape)
        moving = 1 + (shape[1] - 1) * self.codec.time_stride if "frames" in self.info else 0
        images = image_guidance.parse_image_guidance(
            self, options, count, (pixels["width"], pixels["height"]), moving
        )
        if images.init is not None:
            steps, grid = schedule.steps, schedule.grid
            grid = sampling_times.cosine(self.theory, steps) if grid is None else grid
            if (
                schedule.uses_own_scheduler and self.sampling is not None
            ):  # it begins with noise: ours goes on
                scale = self.sampling.init_noise_sigma(steps)
                schedule = replace(schedule, scale=scale, uses_own_scheduler=False)
            schedule = replace(schedule, grid=images.truncate_grid(grid))
        video = parse_video(self, options, count, shape)
        regions = parse_regions(options, shape, (pixels["width"], pixels["height"]))
        guidance = float(self.info.get("guidance", DEFAULT_GUIDANCE)) if guidance is None else guidance
        return SamplingPlan(shape, guidance, schedule, images, video, how, regions, extra, options)

    @torch.no_grad()
    def sample_pixels(
        self,
        plan: SamplingPlan,
        todo: Sequence[SampleRequest],
        start: Tensor,
        tile: int = 0,
        chunk: int = 0,
        watch: Callable[[int], None] | None = None,
    ) -> Tensor:
        """The pixels [B, 3, (F,) H, W] of these requests, from their unit noise `start`."""
        schedule, images = plan.schedule, plan.images
        sampler = self.with_video(plan.video)
        given = plan.options | self.image_conditions(todo, plan.shape)
        read = partial(self._read_prompts, plan.literal_prompt, **given)
        prompted = read([request.prompt for request in todo])
        denoise = sampler.guided_denoiser(prompted, todo, replace(plan, options=given))
        if plan.regions:
            others = [[replace(request, prompt=text) for request in todo] for text in plan.regions.prompts]
            conditions = [read([request.prompt for request in some]) for some in others]
            elsewhere = map(
                partial(sampler.guided_denoiser, plan=replace(plan, options=given)), conditions, others
            )
            denoise = plan.regions.blended([denoise, *elsewhere])
        if schedule.clip is not None:
            denoise = clamp_x0(denoise, self.theory, schedule.clip)
        denoise = sampler.video.constrain_known(denoise, self.theory)
        x, first = start, start * schedule.scale
        if images.init is not None:
            denoise = self.with_inpainting(denoise, images, start)
            first = images.initial_state(self.theory, start, schedule.grid, first)
        elif self.sampling is None:
            first = self.scale_noise(first, schedule.grid)
        with self.at_work(self.denoiser):
            for step, state in enumerate(self.states(todo, first, denoise, schedule), 1):
                x = state
                if watch is not None:
                    watch(step)
        x = sampler.video.restore_known(images.paste_latents(self.denoiser.finalize_latents(x, prompted)))
        return images.paste_pixels(self.decode(x, tile, chunk))

    def states(
        self, todo: Sequence[SampleRequest], start: Tensor, denoise: Denoise, schedule: SamplingSchedule
    ) -> Iterator[Tensor]:
        """The states from these requests' unit noise to their latents."""
        x = start.to(self.device, self.dtype)
        if schedule.uses_own_scheduler:
            return self.sampling.states(denoise, x, schedule.steps, x.shape[1:])
        draw = noise.of([request.seed for request in todo])
        given = schedule.steps if schedule.grid is None else schedule.grid
        return solve(denoise, x, self.theory, given, schedule.solver or "auto", schedule.order, noise=draw)

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
        shape, multiple = self.codec.latent_shape(width, height, count), self.denoiser.latent_multiple
        if shape[-1] % multiple or shape[-2] % multiple:
            step = multiple * self.codec.stride
            fit = [max(step, side // step * step) for side in (width, height)]
            raise Refused(
                f"The picture is {width}×{height}, but this network needs sides in multiples of {step}. "
                f"Choose {fit[0]}×{fit[1]}."
            )
        return shape

    def initial_noise(self, todo: Sequence[SampleRequest], shape: tuple[int, ...]) -> Tensor:
        """The noise each picture starts from [B, C, h, w]."""
        return noise.normal(shape, [request.seed for request in todo], [0] * len(todo), purpose="start")

    def scale_noise(self, start: Tensor, grid: Any) -> Tensor:
        """Unit noise as the state at a grid's first time; where that is t_noise `solve` does it."""
        first = None if grid is None else torch.as_tensor(grid, dtype=torch.float64)[..., 0]
        if first is None or bool((first == self.theory.t_noise).all()):
            return start
        return self.theory.mix(torch.zeros_like(start), start, first)

    def image_conditions(self, todo: Sequence[SampleRequest], shape: tuple[int, ...]) -> dict[str, Any]:
        """What the conditioner is told of the pictures these requests are shown, and of what is drawn."""
        shown: dict[str, Any] = {name: [request.shown[name] for request in todo] for name in todo[0].shown}
        return shown | (self.codec.pixel_size(shape) if shown and self.conditioner.sizes_images else {})

    @torch.no_grad()
    def _read_prompts(self, literal: bool, prompts: Sequence[str], **options: Any) -> Condition:
        """The condition of prompts whose weights act; with `literal` as `condition` reads them."""
        with self.at_work(self.conditioner):
            return prompt_weights.encode(self.conditioner, prompts, literal, **options)

    def guided_denoiser(
        self, prompted: Condition, todo: Sequence[SampleRequest], plan: SamplingPlan
    ) -> Denoise:
        """The denoiser of these requests: leaning away from the weaker answer unless guidance is 1.

        Raises:
            Refused: a negative or a form of guidance that would not act on this network or scale.
        """
        guidance, images, given = plan.guidance, plan.images, plan.options
        policy, extra = self.denoiser.guidance, plan.extra_guidance
        away = [request.negative for request in todo]
        has_negative = any(text is not None for text in away)
        first = policy.guidance_at(guidance, self.theory.t_noise, extra)
        leans = bool(len(prompted)) and policy.needs_negative(first, has_negative)
        check_negative(any(away), leans, guidance)
        how = plan.guidance_options.effective(leans, has_negative)
        how.validate(self.denoiser, leans, has_negative)
        times = self.step_times(plan.schedule)

        def denoiser_of(*conditions: Condition) -> Denoise:
            joined = conditions[0] if len(conditions) == 1 else Condition.join(*conditions)
            embedded = policy.embed_guidance(joined, guidance).to(self.device, self.dtype)
            return lambda x_t, t: self.predict(x_t, t, images.at_step(embedded, t, times))

        answers = [images.add_to(prompted).to(self.device)]
        alone = denoiser_of(*answers)
        if not leans and not how.pag_scale:
            return alone
        prompts = [request.prompt for request in todo]
        other = how.autoguidance_denoiser(self, prompts, given, plan.literal_prompt)
        if leans and other is None:
            with torch.no_grad(), self.at_work(self.conditioner):
                negative = prompt_weights.encode(
                    self.conditioner, away, plan.literal_prompt, negative=True, **given
                )
                weak = images.add_to(negative, is_weak=True)
            answers.append(weak.to(self.device))
        if how.pag_scale:
            answers = [*(mark_perturbed(one, False) for one in answers), mark_perturbed(answers[0], True)]

        def form(strong: Denoise, *others: Denoise) -> Denoise:
            weak = others[0] if leans and other is None else other
            perturbed = others[-1] if others else strong
            return how.apply(self.theory, policy, guidance, extra, strong, weak, perturbed)

        guided = forms.batched_call(denoiser_of(*answers), form, len(answers))
        if how.interval is None:
            return guided
        return forms.only_in_interval(alone, guided, self.theory, *how.interval)

    def guidance_options(self, options: dict[str, Any]) -> GuidanceOptions:
        """Take what is said about guidance out of `options`; the rest is as the model's recipe had it.

        Raises:
            Refused: a value that cannot be meant, a weaker model that cannot be read.
        """
        how = GuidanceOptions.pop_from(options, self.info.get("guidance_options"))
        if not isinstance(how.autoguidance_model, str | Path):
            return how
        place, known = str(how.autoguidance_model), self.__dict__.setdefault("_weaker", {})
        if place not in known:
            known[place] = load(place, device=str(self.device))
        return replace(how, autoguidance_model=known[place])

    def step_times(self, schedule: SamplingSchedule) -> list[float]:
        """The times at which steps begin, and the end; without a grid, as if they were even in time."""
        grid = sampling_times.linear(self.theory, schedule.steps) if schedule.grid is None else schedule.grid
        return torch.as_tensor(grid, dtype=torch.float64).flatten().tolist()

    def with_inpainting(self, denoise: Denoise, images: ImageGuidance, unit: Tensor) -> Denoise:
        """The denoiser, with the true answer where the picture is kept; `unit` is the noise it began with."""
        if images.hole is None:
            return denoise
        return lambda x_t, t: images.known_answer(self.theory, unit, denoise(x_t, t), t)


def _tell_steps(watch: Callable[[int, int], None], steps: int, rows: slice, count: int, step: int) -> None:
    """Tell of a step of the pictures `rows`, of `count` with `steps` each."""
    watch(rows.start * steps + step * (rows.stop - rows.start), count * steps)


def clamp_x0(denoise: Denoise, theory: Theory, most: float) -> Denoise:
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
    folder: Path | str,
    dtype: str = "float32",
    device: str = "cpu",
    config: Path | str | None = None,
    *,
    memory: str | float | None = None,
    say: Callable[[str], None] = lambda sentence: None,
    trust: bool = False,
) -> Pipeline:
    """The model of a folder, a run or a single file, ready to draw; `models.load` says what it takes.

    Args:
        dtype: what the network and the text encoders are kept and computed in: float32, bfloat16 or float16.
            The states between steps and the codec stay float32.
        memory: of a GPU, what may be taken: bytes, a text like "8GB", or "free" for what is free there.
            Stages then take turns on the device, and the largest come block by block; pictures are the same.
        say: hears where the stages are, and what is changed where memory is out after all.
        trust: code that the folder names as `file.py:name` may run, also if it was neither named by you nor
            run on this machine before.
    Raises:
        Refused: no such model, device or dtype; a memory that is none, or on a CPU.
    """
    number = DTYPES[one_of("dtype", dtype, DTYPES)]
    limit = None if memory in (None, "free") else parse_bytes(memory) if isinstance(memory, str) else memory
    with trusting(trust):
        at_first = device if memory is None else "cpu"
        model: Pipeline = models.load(folder, number, at_first, Pipeline, config, torch.float32)
    if number != torch.float32:
        model.denoiser.compute_dtype = number
    if memory is not None:
        place_within(model, torch.device(device), limit, say)
    model.source = Path(folder)
    return model


def as_pipeline(model: Model, denoiser: Any = None) -> Pipeline:
    """The same stages as a model that draws, optionally with other weights (the averaged ones)."""
    pipeline = Pipeline(model.theory, model.codec, model.conditioner, denoiser or model.denoiser, model.info)
    pipeline.origin, pipeline.sampling, pipeline.trained = model.origin, model.sampling, model.trained
    pipeline.fitted_times, pipeline.placement = model.fitted_times, model.placement
    return pipeline
