"""Moving shapes: every word of a caption can be read back from the frames."""

import numpy as np
import pytest

from sfumato.data.sources import moving_shapes
from sfumato.errors import Refused
from sfumato.readers import clips


def some(count=12, seed=4):
    return [
        moving_shapes.random_clip(np.random.default_rng([seed, i]), unseen=i % 3 == 0) for i in range(count)
    ]


def test_clean_clips_are_judged_right_in_every_word():
    for one in some():
        assert moving_shapes.judge(moving_shapes.clip(one, 32), one.caption) == dict.fromkeys(
            ("shape", "color", "direction", "all"), True
        )


def test_every_wrong_word_is_found():
    one = moving_shapes.MovingShape("circle", "red", "left", "black", 0.5, 0.5, 0.33)
    frames = moving_shapes.clip(one, 32)
    wrong = {"a red circle moving right": "direction", "a red cross moving left": "shape"}
    for caption, word in wrong.items():
        verdict = moving_shapes.judge(frames, caption)
        assert not verdict[word] and not verdict["all"]
        assert all(verdict[other] for other in ("shape", "color", "direction") if other != word)
    assert not moving_shapes.judge(frames, "a blue circle moving left")["color"]
    backwards = moving_shapes.judge(frames[::-1], one.caption)
    assert not backwards["direction"] and backwards["color"]
    assert not moving_shapes.judge(np.repeat(frames[:1], 9, 0), one.caption)["direction"]
    assert not moving_shapes.judge(np.where(np.arange(9)[:, None, None, None] < 4, 0, frames), one.caption)[
        "color"
    ]


def test_captions_say_what_they_are_parsed_as():
    for one in some():
        again = moving_shapes.parse(one.caption)
        parts = ("shape", "color", "way", "background")
        assert [getattr(again, part) for part in parts] == [getattr(one, part) for part in parts]
    with pytest.raises(Refused, match="moving left"):
        moving_shapes.parse("a red circle")


def test_held_out_are_combinations_whose_pairs_are_all_trained_on():
    unseen = [triple for triple in moving_shapes.TRIPLES if moving_shapes.is_unseen(*triple)]
    seen = [triple for triple in moving_shapes.TRIPLES if not moving_shapes.is_unseen(*triple)]
    assert len(unseen) == 20
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert {(one[a], one[b]) for one in unseen} <= {(one[a], one[b]) for one in seen}
    drawn = moving_shapes.collection(40, held_out=10)
    asked = {
        split: [moving_shapes.parse(sample.captions[0]) for sample in drawn.with_split(split)]
        for split in ("train", "held_out")
    }
    triples = {split: {(one.shape, one.color, one.way) for one in some} for split, some in asked.items()}
    assert triples["train"] <= set(seen) and triples["held_out"] <= set(unseen)


def test_a_sample_is_read_as_the_clip_that_was_drawn():
    sample = moving_shapes.collection(1, held_out=0).samples[0]
    piece = clips.ClipSpan(moving_shapes.FRAMES, moving_shapes.RATE)
    frames = clips.read_frames(sample.name, sample.source(), piece, 32, 32)
    assert frames.shape == (3, moving_shapes.FRAMES, 32, 32)
    shown = frames.permute(1, 2, 3, 0).numpy()
    assert moving_shapes.judge(shown, sample.captions[0])["all"]


def test_a_clip_is_written_into_the_store_keys_as_ever():
    """Law: what names an embedded clip in the store does not change with the names of classes."""
    clip = moving_shapes.parse("a red circle moving left")
    assert repr(clip) == (
        "Crossing(shape='circle', color='red', way='left', background='white', x=0.5, y=0.5, far=0.33, "
        "radius=0.26)"
    )
