"""Pictures that guide a drawing: control, reference, a picture to edit, one to start from, what to repaint.

What a user hands over becomes tensors of the condition, encoded as the model's control modules read them; a
picture to start from becomes the state at a time, and where nothing is to be repainted the answer is known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import Refused
from sfumato.generation.video import clip_pixels, image_pixels
from sfumato.models import Condition, Model
from sfumato.models.control import WEAK, ControlledDenoiser
from sfumato.models.control.image_encoders import ImageConditionEncoder
from sfumato.models.pretrained.image_inputs import mask_picture, picture
from sfumato.models.pretrained.inpainting import HOLE, KEPT, hole_of, opening, repaints
from sfumato.theory import Theory

WORDS = (
    "control", "control_weight", "control_start", "control_end", "reference", "reference_scale",
    "reference_start", "reference_end", "init",
    "strength", "mask",
)  # fmt: skip
"""Arguments of `generate` that are about pictures that guide."""
CONTROLS = ("controlnet", "control")
"""Kinds of control modules that read a control picture."""
REFERENCE = ("reference", "reference_scale", "reference_start", "reference_end")


@dataclass(frozen=True)
class StepWindow:
    """How strongly a control module acts, and between which shares of the steps."""

    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def at(self, step: int, steps: int) -> float:
        """The weight in step number `step` of so many, as diffusers' pipelines count."""
        return 0.0 if step / steps < self.start or (step + 1) / steps > self.end else self.weight


@dataclass(frozen=True)
class ImageGuidance:
    """What guides some pictures.

    tensors: of the condition, [B, …] each; silent: [1, …], what stands in place of some of them beside a
    negative, where guidance leans away from; windows: by the control modules' names. init: latents
    [B, C, …] to start from, from share `strength` of the steps on. hole: [B, 1, …] in latents, 1 where it is
    repainted; pixels [B, 3, H, W] and cover [B, 1, H, W] of what is kept.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    silent: dict[str, Tensor] = field(default_factory=dict)
    windows: dict[str, StepWindow] = field(default_factory=dict)
    init: Tensor | None = None
    strength: float = 1.0
    hole: Tensor | None = None
    pixels: Tensor | None = None
    cover: Tensor | None = None

    def part(self, rows: slice) -> "ImageGuidance":
        """What guides some of the pictures."""
        cut = {
            name: None if getattr(self, name) is None else getattr(self, name)[rows]
            for name in ("init", "hole", "pixels", "cover")
        }
        return replace(self, tensors={name: one[rows] for name, one in self.tensors.items()}, **cut)

    def add_to(self, condition: Condition, is_weak: bool = False) -> Condition:
        """The condition with what guides; what guidance leans away from sees no reference."""
        if not self.tensors:
            return condition
        own = {
            name: self.silent[name].to(one).expand_as(one) if is_weak and name in self.silent else one
            for name, one in self.tensors.items()
        }
        own[WEAK] = torch.full((condition.size,), is_weak)
        own = {name: one.to(condition_device(condition, one)) for name, one in own.items()}
        return Condition({**condition, **own}, size=condition.size, negative=condition.negative)

    def at_step(self, condition: Condition, t: Tensor, times: Sequence[float]) -> Condition:
        """The condition with the modules' weights in the step that begins at time t, of those at `times`."""
        if all(window == StepWindow() for window in self.windows.values()):
            return condition
        near = float(t.flatten()[0]) - 1e-6 * abs(times[0] - times[-1])
        step = min(sum(time >= near for time in times[1:]), len(times) - 2)
        weights = {
            f"{name}_weight": torch.full((condition.size,), window.at(step, len(times) - 1))
            for name, window in self.windows.items()
        }
        return Condition({**condition, **weights}, size=condition.size, negative=condition.negative)

    def truncate_grid(self, grid: Any) -> Any:
        """The part of a grid from the time at which the drawing starts.

        Raises:
            Refused: no step is left.
        """
        if self.init is None or self.strength >= 1:
            return grid
        steps = len(grid) - 1
        taken = int(steps * self.strength)
        if taken < 1:
            raise Refused(
                f"strength {self.strength:g} leaves none of {steps} steps. Give more strength, or more steps."
            )
        return grid[steps - taken :]

    def initial_state(self, theory: Theory, noise: Tensor, grid: Any, otherwise: Tensor) -> Tensor:
        """The state at the grid's first time, of the picture to start from and this noise; `otherwise` where
        that is the beginning.
        """
        assert self.init is not None
        t = torch.as_tensor(grid, dtype=torch.float64)[0].expand(len(noise))
        if float(t[0]) == theory.t_noise:
            return otherwise
        return theory.mix(self.init.to(noise), noise, t.to(noise.device))

    def known_answer(self, theory: Theory, noise: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The answer, with the true one where the picture is kept."""
        assert self.init is not None and self.hole is not None
        noise, hole = noise.to(out), self.hole.to(out)
        times = torch.as_tensor(t, dtype=torch.float64, device=out.device).expand(len(out))
        target = theory.target(self.init.to(out), noise, times)
        return torch.lerp(target.to(out.dtype), out, hole)

    def paste_latents(self, x: Tensor) -> Tensor:
        """Latents, with those of the picture where it is kept."""
        return (
            x if self.hole is None or self.init is None else torch.lerp(self.init.to(x), x, self.hole.to(x))
        )

    def paste_pixels(self, pixels: Tensor) -> Tensor:
        """Pixels, with the picture's own where it is kept."""
        if self.cover is None or self.pixels is None:
            return pixels
        return torch.lerp(self.pixels.to(pixels), pixels.clamp(-1, 1), self.cover.to(pixels))


def condition_device(condition: Condition, otherwise: Tensor) -> torch.device:
    """Where the condition's tensors are."""
    return next((one.device for one in condition.values()), otherwise.device)


def fit_image(one: Any, width: int, height: int) -> Tensor:
    """A picture scaled and cut to this size, [3, H, W] in [-1, 1]."""
    return image_pixels(picture(one), width, height)


def one_each(shown: Any, count: int, name: str) -> list[Any]:
    """One picture for each of `count` drawings.

    Raises:
        Refused: a list of another length.
    """
    if not isinstance(shown, list | tuple):
        return [shown] * count
    shown = [one[0] if isinstance(one, list | tuple) and len(one) == 1 else one for one in shown]
    if len(shown) == 1:
        return shown * count
    if len(shown) != count:
        raise Refused(
            f"{name} holds {len(shown)} pictures for {count} drawings. Give one for all or one each."
        )
    return list(shown)


def numbers(said: Any, count: int, name: str, otherwise: float) -> list[float]:
    """One number for each of `count` control modules.

    Raises:
        Refused: a list of another length.
    """
    if said is None:
        return [otherwise] * count
    listed = [float(one) for one in said] if isinstance(said, list | tuple) else [float(said)] * count
    if not all(math.isfinite(one) for one in listed):
        raise Refused(f"{name} must be a number, not {listed}.")
    if len(listed) != count:
        raise Refused(f"{name} holds {len(listed)} numbers, but the model has {count} such control modules.")
    return listed


def parse_image_guidance(
    model: Model, options: dict[str, Any], count: int, size: tuple[int, int], frames: int = 0
) -> ImageGuidance:
    """What guides, taken out of `generate`'s options; size (width, height) of what is drawn, in pixels.

    Args:
        options: pictures, one for all or one for each that is drawn: `control` with control_weight,
            control_start and control_end (lists where there are several ControlNets), `reference` (for one
            drawing also a list, all looked at) with reference_scale, reference_start and reference_end,
            `init` with strength and `mask` (white is repainted), `image` (to be edited).
        frames: a clip of so many is begun from a clip, and guided by clips or pictures.

    Raises:
        Refused: pictures or numbers for a model without such a control module, or that do not fit.
    """
    said = {word: options.pop(word) for word in WORDS if options.get(word) is not None}
    denoiser = model.denoiser
    encoders = denoiser.encoders(model) if isinstance(denoiser, ControlledDenoiser) else {}
    modules = denoiser.control_modules if isinstance(denoiser, ControlledDenoiser) else []
    kinds = {module.name: module.kind for module in modules}
    if kinds.get("edit_source") and "image" in options:
        said["edit_source"] = options.pop("image")
    check_arguments(said, kinds)
    shown = {
        name: one_each(one, count, name)
        for name, one in images_of_modules(said, kinds).items()
        if one is not None
    }
    for name, listed in shown.items():
        if kinds[name] != "ip-adapter" and any(isinstance(one, list | tuple) for one in listed):
            raise Refused(f"{name} takes one picture for each drawing; only a reference may be several.")
    tensors = {name: encoded(model, encoders[name], listed, size, frames) for name, listed in shown.items()}
    silent = {
        name: null_image_tokens(encoders[name], tensors[name])
        for name in shown
        if kinds[name] == "ip-adapter"
    }
    found = ImageGuidance(
        tensors,
        silent,
        windows(said, [name for name, kind in kinds.items() if kind in CONTROLS], kinds),
    )
    return init_from_image(model, found, said, count, size, frames)


def null_image_tokens(how: ImageConditionEncoder, tensor: Tensor) -> Tensor:
    """What an IP-Adapter is shown beside a negative, [1, L, D], as long as what it is shown."""
    if how.silent is None:
        return torch.zeros_like(tensor[:1])
    return how.silent.repeat(1, tensor.shape[1] // how.silent.shape[1], 1)


def check_arguments(said: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Raises Refused for what could not act."""
    for words, some, what in (
        (("control", "control_weight", "control_start", "control_end"), CONTROLS, "ControlNet"),
        (REFERENCE, ("ip-adapter",), "IP-Adapter"),
    ):
        asked = [word for word in words if word in said]
        if asked and not set(some) & set(kinds.values()):
            raise Refused(
                f'{asked[0]}: this model has no {what}. Train one (model.train = "{some[0]}"), or give a '
                "trained one as a control module."
            )
        if asked and words[0] not in said:
            raise Refused(f"{asked[0]} acts on a picture: give {words[0]} too, or leave {asked[0]} out.")
    if ("mask" in said or "strength" in said) and "init" not in said:
        word = "mask" if "mask" in said else "strength"
        raise Refused(f"{word} is about a picture to start from: give init too, or leave {word} out.")
    strength = float(said.get("strength", 1.0))
    if not 0 < strength <= 1:
        raise Refused(f"strength is {strength:g}, but it must be above 0 and at most 1.")


def images_of_modules(said: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The pictures by the control modules' names; several ControlNets take a list, one for each."""
    nets = [name for name, kind in kinds.items() if kind in CONTROLS]
    found: dict[str, Any] = {name: said.get(name) for name in ("reference", "edit_source") if name in said}
    if "control" in said and len(nets) == 1:
        found[nets[0]] = said["control"]
    elif "control" in said:
        listed = said["control"]
        if not isinstance(listed, list | tuple) or len(listed) != len(nets):
            raise Refused(
                f"This model has {len(nets)} ControlNets: give control as a list of so many, None for none."
            )
        found |= dict(zip(nets, listed, strict=True))
    return found


def windows(said: Mapping[str, Any], nets: Sequence[str], kinds: Mapping[str, str]) -> dict[str, StepWindow]:
    """Weights and shares of the steps, by the control modules' names.

    Raises:
        Refused: shares that are none.
    """
    count = len(nets)
    weights = numbers(said.get("control_weight"), count, "control_weight", 1.0)
    starts = numbers(said.get("control_start"), count, "control_start", 0.0)
    ends = numbers(said.get("control_end"), count, "control_end", 1.0)
    each_net = zip(nets, zip(weights, starts, ends, strict=True), strict=True)
    found = {name: window("control", *one) for name, one in each_net}
    reference = next((name for name, kind in kinds.items() if kind == "ip-adapter"), "")
    if reference:
        usual = zip(REFERENCE[1:], (1, 0, 1), strict=True)
        found[reference] = window("reference", *(float(said.get(word, number)) for word, number in usual))
    return found


def window(word: str, weight: float, start: float, end: float) -> StepWindow:
    """A weight and shares of the steps.

    Raises:
        Refused: shares that are none.
    """
    if not math.isfinite(weight):
        raise Refused(f"{word}'s weight must be a number, not {weight}.")
    if not 0 <= start < end <= 1:
        raise Refused(
            f"{word} acts from {start:g} to {end:g} of the steps; both must lie in [0, 1], start first."
        )
    return StepWindow(weight, start, end)


@torch.no_grad()
def encoded(
    model: Model, how: ImageConditionEncoder, shown: Sequence[Any], size: tuple[int, int], frames: int = 0
) -> Tensor:
    """The tensor [B, …] a control module reads; each picture, or clip of so many frames, is encoded once.

    What is seen of several pictures for one drawing lies side by side: [B, L + L, D].

    Raises:
        Refused: drawings that are shown different numbers of pictures.
    """
    sides, most = how.size or size, frames if how.moves else min(frames, 1)
    known: dict[int, Tensor] = {}
    fps = float(model.info.get("fps", 0))

    def seen(one: Any) -> Tensor:
        if isinstance(one, list | tuple):
            return torch.cat([seen(part) for part in one], dim=1)
        if id(one) not in known:
            pixels = clip_pixels(one, *sides, most, fps) if frames else fit_image(one, *sides)
            known[id(one)] = how.encode(pixels[None].to(model.device, model.dtype))
        return known[id(one)]

    rows = [seen(one) for one in shown]
    if len({row.shape for row in rows}) > 1:
        raise Refused("Drawings of one batch must be shown equally many references. Draw them apart.")
    return torch.cat(rows)


def inpaint_masks(said: Mapping[str, Any], count: int, size: tuple[int, int], moves: bool = False) -> Tensor:
    """The masks [B, 1, H, W], 1 where it is repainted, cut as the pictures to start from.

    Raises:
        Refused: a mask of another shape than its picture, which would not lie where it should.
    """
    masks = [mask_picture(mask) for mask in one_each(said["mask"], count, "mask")]
    starts = one_each(said["init"], count, "init")
    for mask, start in () if moves else zip(masks, starts, strict=True):
        other = picture(start)
        if not math.isclose(mask.width * other.height, mask.height * other.width, rel_tol=0.02):
            raise Refused(
                f"The mask is {mask.width}×{mask.height}, but the picture to start from is "
                f"{other.width}×{other.height}. Give a mask of the picture's shape."
            )
    return opening(torch.stack([fit_image(mask, *size) for mask in masks]))


@torch.no_grad()
def inpaint_conditions(
    model: Model, found: ImageGuidance, said: Mapping[str, Any], count: int, size: tuple[int, int]
) -> ImageGuidance:
    """What guides a network that is itself shown the hole and what is kept; unasked it paints all."""
    cover = torch.ones(count, 1, size[1], size[0])
    pixels = torch.zeros(count, 3, size[1], size[0])
    if "init" in said:
        pixels = torch.stack([fit_image(one, *size) for one in one_each(said["init"], count, "init")])
    if "mask" in said:
        cover = inpaint_masks(said, count, size)
    usual = model.info.get("strength", 0.6) if "init" in said and "mask" not in said else 1.0
    strength = float(said.get("strength", usual))
    kept = model.encode(pixels * (1 - cover))
    shown = {HOLE: hole_of(cover, *kept.shape[-2:]), KEPT: kept}
    init = model.encode(pixels) if strength < 1 else None
    tensors = {**found.tensors, **shown}
    return replace(found, tensors=tensors, init=init, strength=strength, pixels=pixels, cover=cover)


@torch.no_grad()
def init_from_image(
    model: Model,
    found: ImageGuidance,
    said: Mapping[str, Any],
    count: int,
    size: tuple[int, int],
    frames: int,
) -> ImageGuidance:
    """What guides, with the picture or clip to start from and what is repainted of it."""
    if repaints(model.denoiser):
        return inpaint_conditions(model, found, said, count, size)
    if "init" not in said:
        return found
    shown = one_each(said["init"], count, "init")
    fps = float(model.info.get("fps", 0))
    pixels = torch.stack(
        [clip_pixels(one, *size, frames, fps) if frames else fit_image(one, *size) for one in shown]
    )
    usual = 1.0 if "mask" in said else model.info.get("strength", 0.6)
    found = replace(found, init=model.encode(pixels), strength=float(said.get("strength", usual)))
    if "mask" not in said:
        return found
    cover = inpaint_masks(said, count, size, moves=bool(frames))
    assert found.init is not None
    sides = found.init.shape[-2:]
    hole = torch.nn.functional.adaptive_max_pool2d(cover, sides)
    hole = hole.unsqueeze(2) if found.init.ndim == 5 else hole
    cover = cover.unsqueeze(2) if frames else cover
    return replace(found, hole=hole, pixels=pixels, cover=cover)
