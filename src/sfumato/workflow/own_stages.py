"""One's own stages, tried on two samples before anything is trained: shapes, numbers, batches."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Failed, Refused
from sfumato.generation import Pipeline
from sfumato.models import Codec, Condition, Conditioner, Denoiser
from sfumato.models.interface import Stage, seeded
from sfumato.models.stage_folder import contract
from sfumato.recipe import Recipe
from sfumato.training.estimate.sanity import Check
from sfumato.user_code import describe_error
from sfumato.workflow import base_images, control_training

ALIKE = 1e-3
"""Share of an answer's size by which a sample in a batch may differ from the sample alone."""
PROMPTS = ("a red apple", "")


@torch.no_grad()
def own_stage_checks(recipe: Recipe, model: Pipeline) -> Iterator[Check]:
    """Try each stage that the user wrote; the stages are left as they were.

    Raises:
        Refused: a stage breaks its contract, which is said.
    """
    stages = (model.codec, model.conditioner, model.denoiser)
    if not any(stage.own_name for stage in stages):
        return
    was_training = [stage.training for stage in stages]
    try:
        for stage in stages:
            stage.eval()
        with model.at_work(model.codec, model.conditioner):
            if model.codec.own_name:
                yield from _codec(recipe, model)
            if model.conditioner.own_name:
                yield from _conditioner(model.conditioner)
            if model.denoiser.own_name:
                yield from _denoiser(recipe, model)
    finally:
        for stage, training in zip(stages, was_training, strict=True):
            stage.train(training)


def check_own_stages(recipe: Recipe, model: Pipeline) -> None:
    """Raises Refused for a stage of one's own that breaks its contract."""
    for _ in own_stage_checks(recipe, model):
        pass


def _asked(stage: Stage, kind: type[Stage], work: Callable[[], Any], what: str) -> Any:
    """What a user's stage answers; the same draws each time.

    Raises:
        Refused: it fails, naming file and line.
    """
    try:
        return seeded(0, work)
    except (Refused, Failed, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        where = describe_error(stage.own_name, problem)
        raise Refused(f"{what} fails in {where}. {contract(kind)}") from problem


def _tensor(found: Any, shape: tuple[int, ...], stage: Stage, kind: type[Stage], what: str) -> Tensor:
    """The tensor that a stage answered with.

    Raises:
        Refused: it is none, of another shape, not of floats, or not finite.
    """
    if not isinstance(found, Tensor) or tuple(found.shape) != shape:
        seen = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise Refused(f"{stage.own_name}: {what} gives {seen}, not {list(shape)}. {contract(kind)}")
    if not found.is_floating_point():
        raise Refused(f"{stage.own_name}: {what} gives {found.dtype}, not floats. {contract(kind)}")
    if not bool(found.isfinite().all()):
        raise Refused(f"{stage.own_name}: {what} gives numbers that are not finite.")
    return found


def _alone(claim: str, together: Tensor, apart: Tensor) -> Check:
    """Whether two samples are answered in a batch as one by one."""
    size = float(together.abs().max().clamp(min=1e-12))
    off = float((together - apart).abs().max()) / size
    detail = f"they differ by {off:.1e} of their size"
    advice = ": samples of a batch must not hear of each other, so no means over the batch"
    return Check(claim, off <= ALIKE, detail if off <= ALIKE else detail + advice)


def _codec(recipe: Recipe, model: Pipeline) -> Iterator[Check]:
    codec, side, frames = model.codec, recipe.data.resolution, recipe.data.frames
    shape = (2, 3, *([frames] if codec.of_clips else []), side, side)
    pixels = seeded(0, lambda: torch.rand(shape)).mul(2).sub(1).to(model.device, model.dtype)
    wanted = (2, *codec.latent_shape(side, side, frames or 1))
    latents = _asked(codec, Codec, lambda: codec.encode(pixels), "model.codec: encode")
    latents = _tensor(latents, wanted, codec, Codec, "encode")
    decoded = _asked(codec, Codec, lambda: codec.decode(latents), "model.codec: decode")
    _tensor(decoded, shape, codec, Codec, "decode")
    apart = torch.cat([codec.encode(one[None]) for one in pixels])
    yield _alone("your codec encodes two pictures as it does one", latents, apart)


def _conditioner(conditioner: Conditioner) -> Iterator[Check]:
    read = _asked(conditioner, Conditioner, lambda: conditioner(list(PROMPTS)), "model.text_encoder")
    empty = _asked(
        conditioner, Conditioner, lambda: conditioner.encode_empty(2), "model.text_encoder: encode_empty"
    )
    for what, found in (("it", read), ("encode_empty", empty)):
        if not isinstance(found, Condition) or found.size != 2:
            seen = f"one of {found.size}" if isinstance(found, Condition) else f"a {type(found).__name__}"
            raise Refused(
                f"{conditioner.own_name}: {what} gives {seen} for two prompts, not a Condition of two "
                f"(from sfumato.models import Condition). {contract(Conditioner)}"
            )
    width = int(getattr(conditioner, "width", 0))
    for name, wide in (("tokens", width), ("pooled", int(getattr(conditioner, "pooled_width", width)))):
        if name in read and read[name].shape[-1] != wide:
            key = "pooled_width" if name == "pooled" else "width"
            raise Refused(
                f'{conditioner.own_name}: "{name}" is {list(read[name].shape)}, but its {key} is {wide}. '
                f"{contract(Conditioner)}"
            )
    apart: list[Mapping[str, Tensor]] = [conditioner([text]).row(0) for text in PROMPTS]
    pairs = [(read.row(i), one) for i, one in enumerate(apart)]
    off = max(
        (
            float((mine[name].float() - one[name].float()).abs().max())
            for mine, one in pairs
            for name in one
            if mine[name].shape == one[name].shape and one[name].numel()
        ),
        default=0.0,
    )
    shapes = all(mine[name].shape == one[name].shape for mine, one in pairs for name in one)
    missing = "their shapes differ: is `mask` missing beside `tokens`?"
    detail = f"they differ by {off:.1e}" if shapes else missing
    yield Check("your text encoder reads two prompts as it does one", shapes and off <= ALIKE, detail)


def _denoiser(recipe: Recipe, model: Pipeline) -> Iterator[Check]:
    denoiser = model.denoiser
    side, place = recipe.data.resolution, (model.device, model.dtype)
    texts = list(PROMPTS) if model.conditioner.kind != "none" else [""] * 2
    unguided = base_images.example_condition(model, recipe.data, texts).to(*place)
    condition = control_training.with_blank_control(model, unguided, side)
    shape = (2, *model.codec.latent_shape(side, side, recipe.data.frames or 1))
    x, clock = seeded(0, lambda: torch.randn(shape)).to(*place), torch.full((2,), 500.0).to(*place)
    ask = "model.denoiser: forward"
    answer = _asked(denoiser, Denoiser, lambda: denoiser(x, clock, condition), ask)
    answer = _tensor(answer, tuple(x.shape), denoiser, Denoiser, "forward")
    rows = [Condition.stack([row]) if row else Condition({}, size=1) for row in condition.rows()]
    apart = [denoiser(x[i : i + 1], clock[i : i + 1], rows[i].to(x.device, x.dtype)) for i in range(2)]
    yield _alone("your denoiser answers two samples as it does one", answer, torch.cat(apart))
