"""A clip's frames: some are known, and more may be wanted than the network sees at once.

Known frames are shown to the network clean, with a time of their own, and come out as they went in. Long
clips are asked for in windows that overlap; where several answer, the answer is their mean, each counting
more towards its middle (MultiDiffusion, arXiv:2302.08113, along time).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.interface import Model, known_time
from sfumato.models.pretrained.image_inputs import images_per_prompt, picture
from sfumato.readers import clips, media
from sfumato.theory import Theory

Ask = Callable[[Tensor, Tensor, Condition], Tensor]
Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class KnownFrames:
    """Latents of known frames: latents [B, C, K, h, w] where `which` [K] is true, anything elsewhere."""

    latents: Tensor
    which: Tensor

    def shown(self, ask: Ask, theory: Theory) -> Ask:
        """`ask` with the known frames in place of the noisy ones; also for a doubled batch."""
        clean = known_time(theory)

        def answer(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            times = t.reshape(-1, 1).expand(len(x_t), x_t.shape[2]).clone()
            times[:, self.which.to(times.device)] = clean
            latents = self.latents.to(x_t).repeat(len(x_t) // len(self.latents), 1, 1, 1, 1)
            return ask(torch.where(self.place(x_t), latents, x_t), times, condition)

        return answer

    def constrain_known(self, denoise: Denoise, theory: Theory) -> Denoise:
        """`denoise` that answers for known frames what leads to them."""

        def answer(x_t: Tensor, t: Tensor) -> Tensor:
            latents = self.latents.to(x_t)
            moments = torch.as_tensor(t, dtype=torch.float64, device=x_t.device).expand(len(x_t))
            a, s = (one.view(-1, 1, 1, 1, 1).to(x_t) for one in theory.data(moments))
            target = theory.target(latents, (x_t - a * latents) / s, moments)
            return torch.where(self.place(x_t), target, denoise(x_t, t))

        return answer

    def place(self, x: Tensor) -> Tensor:
        """Where the known frames are, [1, 1, K, 1, 1]."""
        return self.which.to(x.device).view(1, 1, -1, 1, 1)


@dataclass(frozen=True)
class Windows:
    """Pieces of `size` latent frames that overlap by `overlap`, the last one moved back to the end."""

    size: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise Refused(
                f"Windows of {self.size} latent frames cannot overlap by {self.overlap}: choose less than "
                f"{self.size}."
            )

    def pieces(self, frames: int) -> list[slice]:
        """Where the windows lie in so many latent frames."""
        if frames <= self.size:
            return [slice(0, frames)]
        starts = [*range(0, frames - self.size, self.size - self.overlap), frames - self.size]
        return [slice(start, start + self.size) for start in starts]

    def weights(self, frames: int) -> Tensor:
        """How much each frame of a window counts: a triangle, nowhere 0."""
        rising = torch.arange(1, frames + 1, dtype=torch.float32)
        return torch.minimum(rising, rising.flip(0))

    def asked(self, ask: Ask) -> Ask:
        """`ask` in windows: x_t [B, C, K, h, w] of any K, t [B] or [B, K]."""

        def answer(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            pieces = self.pieces(x_t.shape[2])
            if len(pieces) == 1:
                return ask(x_t, t, condition)
            total, counted = torch.zeros_like(x_t), torch.zeros(x_t.shape[2], device=x_t.device)
            for piece in pieces:
                times = t[:, piece] if t.ndim == 2 else t
                weight, own = self.weights(self.size).to(x_t), of_frames(condition, piece, x_t.shape[2])
                total[:, :, piece] += ask(x_t[:, :, piece], times, own) * weight.view(-1, 1, 1)
                counted[piece] += weight
            return total / counted.view(-1, 1, 1).to(x_t)

        return answer


def of_frames(condition: Condition, piece: slice, frames: int) -> Condition:
    """The condition of a window: what it says of each frame [B, C, K, …] is cut to the window's."""
    cut = {
        name: tensor[:, :, piece] if tensor.ndim == 5 and tensor.shape[2] == frames else tensor
        for name, tensor in condition.items()
    }
    return Condition(cut, size=condition.size, negative=condition.negative)


@dataclass(frozen=True)
class VideoConditioning:
    """How a clip is asked for: what is known of it, and in which windows."""

    known: KnownFrames | None = None
    windows: Windows | None = None

    def ask(self, ask: Ask, theory: Theory) -> Ask:
        """The network, asked so."""
        ask = self.windows.asked(ask) if self.windows else ask
        return self.known.shown(ask, theory) if self.known else ask

    def constrain_known(self, denoise: Denoise, theory: Theory) -> Denoise:
        """The guided network, known frames answered exactly."""
        return self.known.constrain_known(denoise, theory) if self.known else denoise

    def restore_known(self, x: Tensor) -> Tensor:
        """The last state, with the known frames as they are."""
        return torch.where(self.known.place(x), self.known.latents.to(x), x) if self.known else x

    def part(self, rows: slice) -> "VideoConditioning":
        """Of some of the clips."""
        return VideoConditioning(
            self.known and KnownFrames(self.known.latents[rows], self.known.which), self.windows
        )


KNOWN = {"image": "first", "last_image": "last"}
"""Arguments of `generate` that give a frame, by the pipelines' names, and what models remember of them."""


def parse_video(
    model: Model, options: dict[str, Any], count: int, shape: tuple[int, ...]
) -> VideoConditioning:
    """What is asked of the frames, taken out of `generate`'s options, for latents of this shape [C, K, h, w].

    Args:
        options: `window` and `overlap`, frames the network sees at once and those that windows share (of our
            own network by default as it was trained, and half of it); `image` and `last_image`, frames to
            begin and end with, where it was trained for that.

    Raises:
        Refused: for a model of pictures, or one that was not trained with known frames.
    """
    windows = _windows(model, options, shape)
    if getattr(model.conditioner, "image_arguments", ()):
        return VideoConditioning(None, windows)
    given = {name: options.pop(name) for name in KNOWN if options.get(name) is not None}
    if not given or "frames" not in model.info:
        options |= given
        return VideoConditioning(None, windows)
    for name in given:
        if KNOWN[name] not in model.info.get("known", ()):
            raise Refused(
                f"{name}: this model was not trained with known frames. Train with train.first_frame_share = "
                "0.25"
                f"{' and train.last_frame_share = 0.5' if name == 'last_image' else ''}, or leave {name} out."
            )
    if "image" not in given:
        raise Refused("last_image needs the first frame too: give image, or leave it out.")
    return VideoConditioning(_known(model, given, count, shape), windows)


def _known(model: Model, given: dict[str, Any], count: int, shape: tuple[int, ...]) -> KnownFrames:
    """Latents of the given frames at their places."""
    size = model.codec.pixel_size(shape)
    latents, which = torch.zeros(count, *shape), torch.zeros(shape[1], dtype=torch.bool)
    for name, shown in given.items():
        pictures = [one[0] for one in images_per_prompt(shown, count, name)]
        stills = torch.stack([image_pixels(one, size["width"], size["height"]) for one in pictures])
        if name == "image":
            latents[:, :, :1] = model.encode(stills[:, :, None]).cpu()
            which[0] = True
        else:
            held = stills[:, :, None].expand(-1, -1, 1 + model.codec.time_stride, -1, -1)
            latents[:, :, -1:] = model.encode(held)[:, :, -1:].cpu()
            which[-1] = True
    return KnownFrames(latents, which)


def _windows(model: Model, options: dict[str, Any], shape: tuple[int, ...]) -> Windows | None:
    """The windows asked for; of our own network, as long as its clips were wherever more is wanted."""
    window, overlap = options.pop("window", None), options.pop("overlap", None)
    if window is None and overlap is None and not model.denoiser.frames_apart:
        return None
    if "frames" not in model.info:
        if window is None and overlap is None:
            return None
        raise Refused("window and overlap are about clips, but this model draws pictures. Leave them out.")
    step = model.codec.time_stride
    size = model.codec.latent_frames(1 + -(-(int(window or model.info["frames"]) - 1) // step) * step)
    both = size // 2 if overlap is None else -(-int(overlap) // step)
    return Windows(size, both) if window or overlap or shape[1] > size else None


# ----------------------------------------------------------------
# Films: what a model of clips is shown, as frames of its size at its own rate.


def image_pixels(picture: Image.Image, width: int, height: int) -> Tensor:
    """A picture cropped and scaled to this size, [3, H, W] in [-1, 1]."""
    image = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def clip_pixels(shown: Any, width: int, height: int, frames: int, fps: float = 0.0) -> Tensor:
    """The first frames of a clip, cropped and scaled to this size, [3, F, H, W] in [-1, 1].

    Args:
        shown: uint8 [F, H, W, 3], the path of a video or an animation, or a picture, which stands still; the
            last frame of a clip that is too short is held.
        fps: a file is seen so many times a second, whatever rate it has; 0 takes its frames as they come.
    Raises:
        Refused: nothing of that kind.
    """
    if isinstance(shown, str | Path):
        images = frames_in(Path(shown).expanduser(), frames, fps)
    elif isinstance(shown, np.ndarray) and shown.dtype == np.uint8 and shown.ndim == 4:
        images = [Image.fromarray(frame) for frame in shown[:frames]]
    else:
        images = [picture(shown)]
    stills = [image_pixels(image.convert("RGB"), width, height) for image in images]
    return torch.stack(stills + stills[-1:] * (frames - len(stills)), 1)


def frames_in(path: Path, most: int, fps: float = 0.0) -> list[Image.Image]:
    """The first frames of a video or animation, or what it shows every 1/fps seconds, as training reads them.

    Of a picture one.

    Raises:
        Refused: it cannot be read.
    """
    try:
        return clips.first_frames(path, most, fps)
    except (media.Unreadable, OSError) as problem:
        raise Refused(
            f"{path} cannot be read: {problem}. Give a picture or a clip: "
            f"{', '.join(media.PICTURES + media.CLIPS)}."
        ) from problem
