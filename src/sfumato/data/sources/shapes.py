"""Shapes: captioned drawings whose every word can be read back from the pixels.

A scene is one or two plain shapes on a plain background; its caption says all that it shows. `shapes`
goes the other way, so that a generated picture is judged exactly, with no network in between.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from sfumato.data.sources.sample import HELD_OUT, TRAIN, Collection, Sample
from sfumato.errors import Refused

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "blue": (30, 90, 220),
    "purple": (140, 50, 170),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (178, 178, 178), "black": (0, 0, 0)}
SIZES = {"small": 0.145, "large": 0.205}
"""Radius of the circle of that size, as a part of the picture's side; other shapes cover about its area."""
RELATIONS = ("above", "below", "left of", "right of")
DRAWN = ("above", "left of")
"""Relations of the training pictures: what is named first stands first. All four can be judged."""
PAIRS = tuple(product(SHAPES, COLORS))
FINE = 8  # a pixel is drawn as FINE × FINE dots and averaged


@dataclass(frozen=True)
class SceneObject:
    """One shape; x, y (centre) and radius are parts of the picture's side, y downwards."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float

    @property
    def words(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"

    def __repr__(self) -> str:
        """As the store's keys have it: in 0.1 the class was called Thing."""
        values = ", ".join(f"{one.name}={getattr(self, one.name)!r}" for one in fields(self))
        return f"Thing({values})"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: things[0] stands in `relation` to things[1], if there are two."""

    things: tuple[SceneObject, ...]
    background: str
    relation: str | None

    @property
    def caption(self) -> str:
        """All that the scene shows, in words: "a small red circle above a large blue square on black"."""
        words = f" {self.relation} ".join(thing.words for thing in self.things)
        return words if self.background == "white" else f"{words} on {self.background}"


def outline(shape: str) -> np.ndarray:
    """Corners [N, 2] of the shape of radius 1, its centre of mass near the origin, its area near π."""
    turn = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    if shape == "circle":
        return np.stack([np.cos(turn), np.sin(turn)], 1)
    if shape == "square":
        return 0.89 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        return np.array(
            [(1.35 * math.sin(a), -1.35 * math.cos(a)) for a in (0, 2 * math.pi / 3, -2 * math.pi / 3)]
        )
    if shape == "star":
        reach = (1.35, 0.58)
        return np.array(
            [
                (reach[i % 2] * math.sin(i * math.pi / 5), -reach[i % 2] * math.cos(i * math.pi / 5))
                for i in range(10)
            ]
        )
    if shape == "cross":
        a, b = 1.08, 0.38
        half = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b)]
        return np.array(half + [(-x, -y) for x, y in half])
    x = 16 * np.sin(turn) ** 3
    y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    return np.stack([x, -y], 1) / 13.5


_OUTLINES = {shape: outline(shape) for shape in SHAPES}


def silhouette(shape: str, x: float, y: float, radius: float, size: int) -> np.ndarray:
    """How much of each pixel the shape covers, [size, size] in [0, 1]; x, y, radius in pixels."""
    fine = Image.new("L", (size * FINE, size * FINE))
    corners = (_OUTLINES[shape] * radius + (x, y)) * FINE - 0.5
    ImageDraw.Draw(fine).polygon([tuple(corner) for corner in corners], fill=255)
    return np.asarray(fine.reduce(FINE), np.float32) / 255


def draw(scene: Scene, size: int) -> Image.Image:
    """The scene as an anti-aliased RGB picture of size × size pixels."""
    pixels = np.empty((size, size, 3), np.float32)
    pixels[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        cover = silhouette(thing.shape, thing.x * size, thing.y * size, thing.radius * size, size)[..., None]
        pixels += cover * (np.array(COLORS[thing.color], np.float32) - pixels)
    return Image.fromarray((pixels + 0.5).astype(np.uint8))


def _place(
    relation: str | None, radii: list[float], chance: np.random.Generator
) -> list[tuple[float, float]]:
    """Centres that keep the shapes apart, inside the picture, and the relation beyond doubt."""
    if relation is None:
        return [(float(x), float(y)) for x, y in chance.uniform(0.47, 0.53, (1, 2))]
    edge, gap = 0.045, 0.05
    reach = [1.3 * radius for radius in radii]  # the star's points
    slack = 1 - 2 * edge - gap - 2 * (radii[0] + radii[1])
    first = edge + radii[0] + slack * chance.uniform(0.22, 0.3)
    second = 1 - edge - radii[1] - slack * chance.uniform(0.22, 0.3)
    across = [float(np.clip(chance.normal(0.5, 0.012), edge + r, 1 - edge - r)) for r in reach]
    if relation in ("below", "right of"):
        first, second = 1 - first, 1 - second
    along = (first, second)
    upright = relation in ("above", "below")
    return [(across[i], along[i]) if upright else (along[i], across[i]) for i in range(2)]


def is_unseen(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether no training picture shows these (shape, color) together, in whatever order: a fifth of all."""
    return (PAIRS.index(one) + PAIRS.index(other)) % 5 == 0


def random_scene(chance: np.random.Generator, unseen: bool = False) -> Scene:
    """A random scene; `unseen` ones have two things that training never shows together."""
    two = unseen or chance.random() < 0.8
    pairs = [PAIRS[chance.integers(len(PAIRS))]]
    while two and len(pairs) < 2:
        other = PAIRS[chance.integers(len(PAIRS))]
        if other[1] != pairs[0][1] and is_unseen(pairs[0], other) == unseen:
            pairs.append(other)
    sizes = [str(chance.choice(list(SIZES))) for _ in pairs]
    relation = str(chance.choice(DRAWN)) if two else None
    radii = [SIZES[size] * float(chance.uniform(0.97, 1.03)) for size in sizes]
    centers = _place(relation, radii, chance)
    things = tuple(
        SceneObject(shape, color, size, x, y, radius)
        for (shape, color), size, (x, y), radius in zip(pairs, sizes, centers, radii, strict=True)
    )
    return Scene(things, str(chance.choice(list(BACKGROUNDS))), relation)


def parse(caption: str) -> Scene:
    """The scene a caption describes, its things at the origin.

    Raises:
        Refused: when the caption is not in the words of this data set.
    """
    thing = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
    ground = rf"on (?:an? )?({'|'.join(BACKGROUNDS)})(?: background)?"
    form = rf"{thing}(?: ({'|'.join(RELATIONS)}) {thing})?(?: {ground})?"
    found = re.fullmatch(form, caption.strip().lower().rstrip("."))
    if found is None:
        raise Refused(
            f'"{caption}" cannot be judged: shapes are asked for as "a small red circle above a large '
            f'blue square on black", with {", ".join(SHAPES)}; {", ".join(COLORS)}; {", ".join(RELATIONS)}.'
        )
    size, color, shape, relation, size_2, color_2, shape_2, background = found.groups()
    things = [SceneObject(shape, color, size or "", 0, 0, 0)]
    if relation:
        things.append(SceneObject(shape_2, color_2, size_2 or "", 0, 0, 0))
    return Scene(tuple(things), background or "white", relation)


def collection(count: int = 2500, seed: int = 0, size: int = 64, held_out: int = 128) -> Collection:
    """`count` training pictures, and `held_out` ones of two things that no training picture shows together.

    The i-th picture depends on (seed, i) alone, so a larger collection begins with the smaller one.
    """

    def sample(index: int, split: str) -> Sample:
        unseen = split == HELD_OUT
        drawn = random_scene(np.random.default_rng([seed, index, unseen]), unseen)
        picture: Callable[[], Image.Image] = partial(draw, drawn, size)
        name = f"shapes/{seed}/{size}/{split}-{index:06d}"
        content = f"drawing 1, {size} pixels: {drawn!r}"
        return Sample(name, (drawn.caption,), split=split, picture=picture, content=content)

    samples = [sample(i, TRAIN) for i in range(count)] + [sample(i, HELD_OUT) for i in range(held_out)]
    return Collection("shapes", sorted(samples, key=lambda one: one.name))
