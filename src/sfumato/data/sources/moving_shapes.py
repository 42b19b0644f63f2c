"""Moving shapes: captioned clips whose every word can be read back from the pixels.

One plain shape crosses a white picture; its caption says which, and which way: "a red circle moving left".
Clips on black are judged too ("a red circle moving left on black"), but training shows none. `judge` follows
the shape from frame to frame, so that a generated clip is judged exactly, with no network in between.
"""

import io
import re
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import product

import numpy as np
from PIL import Image

from sfumato.data.sources import shape_reader, shapes
from sfumato.data.sources.sample import HELD_OUT, TRAIN, Collection, Sample
from sfumato.errors import Refused

WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FRAMES, RATE = 9, 8
RADIUS = 0.26
BACKGROUNDS = ("white", "black")
TRIPLES = tuple(product(shapes.SHAPES, shapes.COLORS, WAYS))
STEADY = 0.75  # share of the frames that must show what was asked
LEAST_WAY = 0.12  # of the picture's side, from the first third of a clip to the last


@dataclass(frozen=True)
class MovingShape:
    """A shape that moves evenly; x, y: where its centre is half-way, far: its way, parts of the side."""

    shape: str
    color: str
    way: str
    background: str
    x: float
    y: float
    far: float
    radius: float = RADIUS

    @property
    def caption(self) -> str:
        """All that the clip shows, in words."""
        article = "an" if self.color[0] in "aeiou" else "a"
        words = f"{article} {self.color} {self.shape} moving {self.way}"
        return words if self.background == "white" else f"{words} on {self.background}"

    def __repr__(self) -> str:
        """As the store's keys have it: in 0.1 the class was called Crossing."""
        values = ", ".join(f"{one.name}={getattr(self, one.name)!r}" for one in fields(self))
        return f"Crossing({values})"

    def frame(self, when: float, size: int) -> Image.Image:
        """The picture at `when` in [0, 1]."""
        dx, dy = WAYS[self.way]
        x, y = self.x + dx * self.far * (when - 0.5), self.y + dy * self.far * (when - 0.5)
        thing = shapes.SceneObject(self.shape, self.color, "large", x, y, self.radius)
        return shapes.draw(shapes.Scene((thing,), self.background, None), size)


def clip(crossing: MovingShape, size: int, frames: int = FRAMES) -> np.ndarray:
    """The frames, uint8 [frames, size, size, 3]."""
    times = [index / max(1, frames - 1) for index in range(frames)]
    return np.stack([np.asarray(crossing.frame(when, size)) for when in times])


@lru_cache(maxsize=4096)
def as_webp(crossing: MovingShape, size: int) -> bytes:
    """The clip as a lossless animation at RATE frames a second."""
    images, file = [Image.fromarray(frame) for frame in clip(crossing, size)], io.BytesIO()
    images[0].save(
        file, "WEBP", save_all=True, append_images=images[1:], duration=1000 // RATE, lossless=True, method=0
    )
    return file.getvalue()


def is_unseen(shape: str, color: str, way: str) -> bool:
    """Whether no training clip shows this combination; any two of the three are shown together."""
    parts = shapes.SHAPES.index(shape), list(shapes.COLORS).index(color), list(WAYS).index(way)
    return sum(parts) % 4 == 3 and parts[1] != 5


def random_clip(chance: np.random.Generator, unseen: bool = False) -> MovingShape:
    """A random clip, of an unseen combination or of one that training shows."""
    fitting = [triple for triple in TRIPLES if is_unseen(*triple) == unseen]
    shape, color, way = fitting[chance.integers(len(fitting))]
    x, y = (float(at) for at in chance.uniform(0.46, 0.54, 2))
    radius = RADIUS * float(chance.uniform(0.97, 1.03))
    return MovingShape(shape, color, way, BACKGROUNDS[0], x, y, float(chance.uniform(0.3, 0.36)), radius)


def parse(caption: str) -> MovingShape:
    """The clip a caption describes.

    Raises:
        Refused: when the caption is not in the words of this data set.
    """
    colors, grounds = "|".join(shapes.COLORS), "|".join(BACKGROUNDS)
    form = rf"an? ({colors}) ({'|'.join(shapes.SHAPES)}) moving ({'|'.join(WAYS)})(?: on ({grounds}))?"
    found = re.fullmatch(form, caption.strip().lower().rstrip("."))
    if found is None:
        raise Refused(
            f'"{caption}" cannot be judged: moving shapes are asked for as "a red circle moving left on '
            f'black", with {", ".join(shapes.SHAPES)}; {", ".join(shapes.COLORS)}; {", ".join(WAYS)}.'
        )
    color, shape, way, ground = found.groups()
    return MovingShape(shape, color, way, ground or "white", 0.5, 0.5, 0.33)


def collection(count: int = 1200, seed: int = 0, size: int = 32, held_out: int = 96) -> Collection:
    """`count` training clips, and `held_out` ones of combinations that no training clip shows.

    The i-th clip depends on (seed, i) alone, so a larger collection begins with the smaller one.
    """

    def sample(index: int, split: str) -> Sample:
        unseen = split == HELD_OUT
        drawn = random_clip(np.random.default_rng([seed, index, unseen]), unseen)
        name = f"moving-shapes/{seed}/{size}/{split}-{index:06d}.webp"
        content = f"moving 3, {size} pixels: {drawn!r}"
        picture = partial(as_webp, drawn, size)
        return Sample(name, (drawn.caption,), split=split, picture=picture, content=content)

    samples = [sample(i, TRAIN) for i in range(count)] + [sample(i, HELD_OUT) for i in range(held_out)]
    return Collection("moving-shapes", sorted(samples, key=lambda one: one.name))


@dataclass(frozen=True)
class Track:
    """One color followed through a clip: where it is in each frame it is in, and what it looks like there.

    places: (frame, x, y), parts of the side; shapes: what it was recognised as; alone: frames in which
    nothing else is seen.
    """

    places: list[tuple[int, float, float]]
    shapes: list[str]
    alone: int
    frames: int

    @property
    def way(self) -> str:
        """The direction from the first third to the last, empty where it hardly moves."""
        third = max(1, self.frames // 3)
        begin = [(x, y) for frame, x, y in self.places if frame < third]
        end = [(x, y) for frame, x, y in self.places if frame >= self.frames - third]
        if not begin or not end:
            return ""
        dx, dy = np.mean(end, 0) - np.mean(begin, 0)
        if max(abs(dx), abs(dy)) < LEAST_WAY:
            return ""
        sideways = abs(dx) > abs(dy)
        return ("left" if dx < 0 else "right") if sideways else ("up" if dy < 0 else "down")


def follow(frames: np.ndarray, color: str) -> Track:
    """Follow the thing of a color through frames uint8 [F, H, W, 3]."""
    places, kinds, alone = [], [], 0
    for index, frame in enumerate(frames):
        found = shape_reader.read(Image.fromarray(frame))
        mine = [thing for thing in found if thing.color == color]
        if mine:
            largest = max(mine, key=lambda thing: thing.radius)
            places.append((index, largest.x, largest.y))
            kinds.append(largest.shape)
            alone += len(found) == 1
    return Track(places, kinds, alone, len(frames))


def judge(frames: np.ndarray, caption: str) -> dict[str, bool]:
    """Whether a clip uint8 [F, H, W, 3] shows what its caption says, frame by frame.

    color: one thing, of that color, in most frames; shape: it is read as that shape in most frames;
    direction: it goes that way; all: all three.

    Raises:
        Refused: when the caption is not in the words of this data set.
    """
    asked = parse(caption)
    track, needed = follow(frames, asked.color), STEADY * len(frames)
    found = {
        "shape": track.shapes.count(asked.shape) >= needed,
        "color": track.alone >= needed,
        "direction": track.way == asked.way,
    }
    return {**found, "all": all(found.values())}


def accuracy(count: int = 60, seed: int = 1, size: int = 32) -> float:
    """The judge's own: share of clean clips it finds right."""
    drawn = [random_clip(np.random.default_rng([seed, i])) for i in range(count)]
    return sum(judge(clip(one, size), one.caption)["all"] for one in drawn) / max(1, count)
