"""Shapes that are shown rather than named, and shapes that are changed: what guides beside the caption.

shapes-alone: one thing in the middle, and a caption that says all of it, or all but its shape and color.
shapes-reference: the same pictures. The reference shows such a thing elsewhere, in a size and on a ground of
its own; the caption never says its shape and color.
shapes-edit: the source shows a thing, and the caption is an instruction ("make it blue").
What is held out are shapes in colors (shapes-edit: in new colors) that no training picture shows.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from .sample import HELD_OUT, TRAIN, Collection, Sample
from .scenes import BACKGROUNDS, COLORS, PAIRS, SIZES, Scene, Thing, draw

UNSEEN = tuple(pair for index, pair in enumerate(PAIRS) if index % 5 == 2)
SEEN = tuple(pair for pair in PAIRS if pair not in UNSEEN)


RADII = {"small": 0.18, "large": 0.27}
"""Of things that are alone in the middle: larger than where two must fit."""


def alone(
    pair: tuple[str, str], chance: np.random.Generator, radii: Mapping[str, float] = SIZES, free: bool = True
) -> Scene:
    """One thing of this shape and color, somewhere or (not `free`) in the middle, on some ground."""
    size = str(chance.choice(list(radii)))
    radius = radii[size] * float(chance.uniform(0.97, 1.03))
    reach = 0.5 - 1.45 * radius - 0.03 if free else 0.01
    x, y = (float(one) for one in chance.uniform(0.5 - reach, 0.5 + reach, 2))
    return Scene((Thing(*pair, size, x, y, radius),), str(chance.choice(list(BACKGROUNDS))), None)


def named(scene: Scene) -> str:
    """The caption that says all: "a small red circle on black"."""
    return f"{scene.things[0].words} on {scene.background}"


def unnamed(scene: Scene) -> str:
    """The caption that says neither shape nor color: "a small one on black"."""
    return f"a {scene.things[0].size} one on {scene.background}"


def _pair(split: str, chance: np.random.Generator) -> tuple[str, str]:
    pairs = UNSEEN if split == HELD_OUT else SEEN
    return pairs[chance.integers(len(pairs))]


def _sample(
    name: str, captions: tuple[str, ...], split: str, target: Scene, size: int, **shown: Scene
) -> Sample:
    """The sample that is drawn as `target`; `shown` are its companions."""
    picture: Callable[[], Image.Image] = partial(draw, target, size)
    content = f"drawing 1, {size} pixels: {target!r}"
    companions = {what: partial(draw, other, size) for what, other in shown.items()}
    return Sample(name, captions, split=split, picture=picture, content=content, companions=companions)


def lone(count: int = 3000, seed: int = 0, size: int = 64, held_out: int = 128) -> Collection:
    """Things alone, named or not; see the module."""

    def sample(index: int, split: str) -> Sample:
        chance = np.random.default_rng([seed, index, split == HELD_OUT, 1])
        target = alone(_pair(split, chance), chance, RADII, free=False)
        name = f"shapes-alone/{seed}/{size}/{split}-{index:06d}"
        return _sample(name, (named(target), unnamed(target)), split, target, size)

    return _collected("shapes-alone", sample, count, held_out)


def reference(count: int = 3000, seed: int = 0, size: int = 64, held_out: int = 128) -> Collection:
    """Things shown by a reference; see the module."""

    def sample(index: int, split: str) -> Sample:
        chance = np.random.default_rng([seed, index, split == HELD_OUT, 1])
        pair = _pair(split, chance)
        target = alone(pair, chance, RADII, free=False)
        name = f"shapes-reference/{seed}/{size}/{split}-{index:06d}"
        other = alone(pair, chance, RADII)
        return _sample(name, (unnamed(target),), split, target, size, reference=other)

    return _collected("shapes-reference", sample, count, held_out)


def edit(count: int = 3000, seed: int = 0, size: int = 64, held_out: int = 128) -> Collection:
    """Things whose color is changed; see the module."""

    def sample(index: int, split: str) -> Sample:
        chance = np.random.default_rng([seed, index, split == HELD_OUT, 2])
        shape, color = _pair(split, chance)
        target = alone((shape, color), chance)
        before = str(chance.choice([one for one in COLORS if one != color]))
        source = replace(target, things=(replace(target.things[0], color=before),))
        name = f"shapes-edit/{seed}/{size}/{split}-{index:06d}"
        return _sample(name, (f"make it {color}",), split, target, size, edit_source=source)

    return _collected("shapes-edit", sample, count, held_out)


def _collected(name: str, sample: Callable[[int, str], Sample], count: int, held_out: int) -> Collection:
    samples = [sample(i, TRAIN) for i in range(count)] + [sample(i, HELD_OUT) for i in range(held_out)]
    return Collection(name, sorted(samples, key=lambda one: one.name))
