"""Shapes that are shown rather than named, and shapes that are changed: what guides beside the caption.

shapes-alone: one thing in the middle, and a caption that says all of it, or all but its color.
shapes-reference: the same, never saying the color. That the reference shows: something else in that color.
shapes-edit: the source shows a thing, and the caption is an instruction ("make it blue").
What is held out of the last two are shapes in colors (shapes-edit: in new colors) that no training picture
shows; shapes-alone, for a base that reads text, shows them all.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from PIL import Image

from sfumato.data.sources.sample import HELD_OUT, TRAIN, Collection, Sample
from sfumato.data.sources.shapes import BACKGROUNDS, COLORS, PAIRS, SHAPES, SIZES, Scene, SceneObject, draw

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
    return Scene((SceneObject(*pair, size, x, y, radius),), str(chance.choice(list(BACKGROUNDS))), None)


def named(scene: Scene) -> str:
    """The caption that says all: "a small red circle on black"."""
    return f"{scene.things[0].words} on {scene.background}"


def uncolored(scene: Scene) -> str:
    """The caption that does not say the color: "a small circle on black"."""
    thing = scene.things[0]
    return f"a {thing.size} {thing.shape} on {scene.background}"


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
    """Things alone, of every shape in every color, their color named or not; see the module."""

    def sample(index: int, split: str) -> Sample:
        chance = np.random.default_rng([seed, index, split == HELD_OUT, 1])
        target = alone(PAIRS[chance.integers(len(PAIRS))], chance, RADII, free=False)
        name = f"shapes-alone/{seed}/{size}/{split}-{index:06d}"
        return _sample(name, (named(target), uncolored(target)), split, target, size)

    return _collected("shapes-alone", sample, count, held_out)


def reference(count: int = 3000, seed: int = 0, size: int = 64, held_out: int = 128) -> Collection:
    """Things in the color that a reference shows; see the module."""

    def sample(index: int, split: str) -> Sample:
        chance = np.random.default_rng([seed, index, split == HELD_OUT, 3])
        shape, color = _pair(split, chance)
        target = alone((shape, color), chance, RADII, free=False)
        other = alone((str(chance.choice(SHAPES)), color), chance, RADII)
        name = f"shapes-reference/{seed}/{size}/{split}-{index:06d}"
        return _sample(name, (uncolored(target),), split, target, size, reference=other)

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
