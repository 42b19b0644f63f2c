"""Reading shapes: what a drawing shows, measured from its pixels alone.

Every pixel is a mixture of the background and one color, so unmixing gives each color's cover; a connected
patch of cover is the shape whose silhouette, of the same area and centre of mass, overlaps it most.
"""

import numpy as np
from PIL import Image

from sfumato.data.sources.shapes import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    collection,
    draw,
    is_unseen,
    parse,
    silhouette,
)

_PALETTE = np.array(list(COLORS.values()), np.float32)
_NAMES = list(COLORS)
SMALLEST = 0.35 * np.pi * SIZES["small"] ** 2
"""Patches that cover less of the picture than this are specks, not things."""


def _smooth(image: np.ndarray) -> np.ndarray:
    """Mean over 3 × 3 pixels of [H, W, …], edges repeated."""
    padded = np.pad(image, [(1, 1), (1, 1)] + [(0, 0)] * (image.ndim - 2), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def background(image: Image.Image) -> tuple[str, np.ndarray]:
    """Name and measured color [3] of what surrounds the things: the median of the picture's rim."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    rim = np.concatenate(
        [
            pixels[:2].reshape(-1, 3),
            pixels[-2:].reshape(-1, 3),
            pixels[:, :2].reshape(-1, 3),
            pixels[:, -2:].reshape(-1, 3),
        ]
    )
    color = np.median(rim, axis=0)
    name = min(BACKGROUNDS, key=lambda one: float(np.square(color - BACKGROUNDS[one]).sum()))
    return name, color


def _patches(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected patches of a mask [H, W], each as a mask."""
    left, found = mask.copy(), []
    while left.any():
        patch = np.zeros_like(left)
        front = [tuple(np.argwhere(left)[0])]
        left[front[0]] = False
        while front:
            y, x = front.pop()
            patch[y, x] = True
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= near[0] < left.shape[0] and 0 <= near[1] < left.shape[1] and left[near]:
                    left[near] = False
                    front.append(near)
        found.append(patch)
    return found


def _moments(cover: np.ndarray) -> tuple[float, float, float]:
    """Area in pixels and centre of mass (x, y), in pixels from the upper left corner."""
    area = float(cover.sum())
    y, x = np.indices(cover.shape, dtype=np.float32) + 0.5
    return area, float((cover * x).sum()) / area, float((cover * y).sum()) / area


def _unit(shape: str) -> tuple[float, float, float]:
    """Area and centre of mass of the shape of radius 1."""
    area, x, y = _moments(silhouette(shape, 40, 40, 25, 80))
    return area / 25**2, (x - 40) / 25, (y - 40) / 25


_UNITS = {shape: _unit(shape) for shape in SHAPES}


def _cut_out(cover: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The square around all cover with a margin, and its left and top in the picture."""
    rows, columns = np.flatnonzero(cover.any(1)), np.flatnonzero(cover.any(0))
    side = max(np.ptp(rows), np.ptp(columns)) + 9
    top, left = int(rows[0]) - 4, int(columns[0]) - 4
    padded = np.pad(cover, side)[top + side : top + 2 * side, left + side : left + 2 * side]
    return padded, left, top


def _classify(cover: np.ndarray, color: str) -> SceneObject:
    """The thing whose silhouette overlaps a cover [S, S] most (soft intersection over union)."""
    side = cover.shape[0]
    cover, left, top = _cut_out(cover)
    area, x, y = _moments(cover)
    best = (-1.0, SHAPES[0], 0.0, 0.0, 1.0)
    for shape, (unit, dx, dy) in _UNITS.items():
        radius = (area / unit) ** 0.5
        at_x, at_y = x - dx * radius, y - dy * radius
        drawn = silhouette(shape, at_x, at_y, radius, cover.shape[0])
        overlap = float(np.minimum(drawn, cover).sum() / np.maximum(drawn, cover).sum())
        best = max(best, (overlap, shape, at_x, at_y, radius))
    _, shape, at_x, at_y, radius = best
    at_x, at_y = at_x + left, at_y + top
    size = min(SIZES, key=lambda one: abs(SIZES[one] - radius / side))
    return SceneObject(shape, color, size, at_x / side, at_y / side, radius / side)


def read(image: Image.Image) -> list[SceneObject]:
    """The things a square drawing shows, the largest first; mild blur and noise do no harm."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    if pixels.shape[0] != pixels.shape[1]:
        raise ValueError(
            f"shapes are read from square pictures; this one is {pixels.shape[1]}×{pixels.shape[0]}."
        )
    _, ground = background(image)
    away = pixels - ground  # [S, S, 3]
    toward = _PALETTE - ground  # [6, 3]
    share = np.clip(away @ toward.T / np.square(toward).sum(1), 0, 1)  # [S, S, 6]: cover, were it this color
    miss = np.square(away[:, :, None] - share[..., None] * toward).sum(-1)
    color_at = _smooth(miss).argmin(-1)
    things = []
    for index, name in enumerate(_NAMES):
        cover = np.where(color_at == index, share[..., index], 0)
        for patch in _patches(cover > 0.35):
            if patch.sum() < SMALLEST * patch.size:
                continue
            wide = _smooth(patch.astype(np.float32)) > 0  # takes the soft edge in
            things.append(_classify(share[..., index] * wide, name))
    return sorted(things, key=lambda thing: -thing.radius)


def _stands(first: SceneObject, second: SceneObject, relation: str) -> bool:
    dx, dy = first.x - second.x, first.y - second.y
    upright = abs(dy) > abs(dx)
    return {
        "above": upright and dy < 0,
        "below": upright and dy > 0,
        "left of": not upright and dx < 0,
        "right of": not upright and dx > 0,
    }[relation]


def judge(image: Image.Image, caption: str) -> dict[str, bool]:
    """Whether a picture shows what its caption says.

    shape_and_color: exactly the named things are there, each in its shape and color.
    position: the things of the named colors stand as said (one thing alone: it is there).
    size, background: likewise, for those who want to know.

    Raises:
        Refused: when the caption is not in the words of this data set.
    """
    asked, things = parse(caption), read(image)
    wanted = sorted((thing.shape, thing.color) for thing in asked.things)
    exact = wanted == sorted((thing.shape, thing.color) for thing in things)
    by_color = {thing.color: thing for thing in reversed(things)}
    there = [by_color.get(thing.color) for thing in asked.things]
    found = [thing for thing in there if thing is not None]
    complete = len(found) == len(asked.things)
    placed = complete and (asked.relation is None or _stands(found[0], found[1], asked.relation))
    sized = complete and all(a.size in ("", b.size) for a, b in zip(asked.things, found, strict=True))
    return {
        "shape_and_color": exact,
        "position": placed,
        "size": sized,
        "background": background(image)[0] == asked.background,
    }


def accuracy(count: int = 200, seed: int = 1, size: int = 64) -> float:
    """The reader's own: share of clean drawings of which it reads every shape, color and position right."""
    drawn = collection(count, seed, size, held_out=0).samples
    right = 0
    for sample in drawn:
        assert sample.picture is not None
        picture = sample.picture()
        assert isinstance(picture, Image.Image)
        verdict = judge(picture, sample.captions[0])
        right += verdict["shape_and_color"] and verdict["position"]
    return right / max(1, count)


__all__ = [
    "Scene",
    "SceneObject",
    "accuracy",
    "background",
    "collection",
    "draw",
    "is_unseen",
    "judge",
    "parse",
    "read",
]
