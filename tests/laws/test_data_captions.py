"""Captions are worded before training; sets are joined with their weights; long captions are counted."""

import pytest
from PIL import Image

from sfumato.data import dataset_report
from sfumato.data.encoding.batch_sampler import BatchSampler
from sfumato.data.sources import captions, folder
from sfumato.data.sources.captions import CaptionOptions, expand_captions
from sfumato.data.sources.sample import Sample
from sfumato.errors import Refused
from sfumato.report import data_page

ONE = Sample("a", ("fox, red, small, night, in the snow",), extra={"artist": "Anna"})


def test_template_and_trigger_surround_the_caption():
    (sample,) = expand_captions([ONE], CaptionOptions(template="{caption}, by {artist}", trigger_words="sks"))
    assert sample.captions == ("sks fox, red, small, night, in the snow, by Anna",)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_shuffling_keeps_the_prefix_and_loses_no_tag(keep):
    (sample,) = expand_captions([ONE], CaptionOptions(tag_shuffles=6, keep_tags=keep))
    tags = ONE.captions[0].split(", ")
    assert 1 < len(sample.captions) <= 6
    for caption in sample.captions:
        assert caption.split(", ")[:keep] == tags[:keep]
        assert sorted(caption.split(", ")) == sorted(tags)
    assert expand_captions([ONE], CaptionOptions(tag_shuffles=6, keep_tags=keep))[0] == sample


@pytest.mark.parametrize("template", ["no place", "{caption} by {painter}", "{caption} {0}", "{caption"])
def test_a_template_that_cannot_be_filled_is_refused(template):
    with pytest.raises(Refused, match="template"):
        expand_captions([ONE], CaptionOptions(template=template))


def test_long_captions_are_found_by_the_given_tokenizer():
    found = captions.truncated(["one", "one two three"], lambda texts: [len(t.split()) for t in texts], 2)
    assert found == [("one two three", 3)]


@pytest.fixture
def two_sets(tmp_path):
    for name, count in (("photos", 4), ("drawings", 2)):
        (tmp_path / name).mkdir()
        for index in range(count):
            Image.new("RGB", (16, 16), (40 * index, 0, 0)).save(tmp_path / name / f"{index}.png")
            (tmp_path / name / f"{index}.txt").write_text(f"{name} {index}")
    return tmp_path


def test_sets_are_joined_with_their_weights(two_sets):
    sets = [
        (folder.open_collection(two_sets / name, held_out=0), times)
        for name, times in (("photos", 1), ("drawings", 3))
    ]
    whole = folder.concatenate(sets)
    assert len({sample.id for sample in whole.samples}) == 6
    repeats = [sample.repeat for sample in whole.samples]
    order = BatchSampler([(1,)] * 6, 5, seed=0, repeats=repeats)
    shown = [index for step in range(order.steps_before(1)) for index in order.at(step)[0]]
    assert sorted(shown) == sorted(i for i, times in enumerate(repeats) for _ in range(times))


def test_the_report_counts_truncated_captions_and_kinds_not_read(two_sets):
    (two_sets / "photos" / "x.heic").write_bytes(b"heic")
    told = dataset_report.report(
        folder.open_collection(two_sets / "photos"),
        tokens=lambda texts: [len(text) for text in texts],
        most_tokens=4,
    )
    assert len(told.summary["truncated"]) == 4 and "Longer than the model reads (4)" in data_page.render(
        told.summary, told.sheets, told.twins
    )
    assert [one["file"] for one in told.summary["set_aside"]] == ["x.heic"]
