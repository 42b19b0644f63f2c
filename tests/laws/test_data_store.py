"""The store holds each answer once, finds every flipped bit, and is valid after any kill."""

import errno
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sfumato.data.encoding import encode
from sfumato.data.encoding.encoded_dataset import NO_LABEL
from sfumato.data.encoding.views import Companion, EncodingOptions
from sfumato.data.sources.sample import Sample
from sfumato.data.store import formats, shard
from sfumato.data.store.gc import collect
from sfumato.data.store.index import Index
from sfumato.data.store.store import Store, key
from sfumato.errors import Failed, Refused

HOW = EncodingOptions(pixels="codec-1", texts="text-1", batch=4, shard=8, threads=2)


def picture(number):
    chance = np.random.default_rng(number)
    return Image.fromarray(chance.integers(0, 255, (16, 16, 3), np.uint8))


def samples(count, text="picture"):
    return [
        Sample(
            f"{i:03d}",
            (f"{text} {i}",),
            picture=lambda i=i: picture(i),
            split="held_out" if i % 5 == 0 else "train",
        )
        for i in range(count)
    ]


class Encoder:
    """A frozen network of known answers that counts what it was asked."""

    def __init__(self):
        self.pixels, self.texts = 0, []

    def look(self, pixels):
        self.pixels += len(pixels)
        return torch.nn.functional.avg_pool2d(pixels, 4)

    def hear(self, captions):
        self.texts += captions
        words = [len(caption.split()) for caption in captions]
        return [
            {"tokens": torch.full((n, 6), float(len(caption))), "mask": torch.ones(n) > 0}
            for n, caption in zip(words, captions, strict=True)
        ]


def fill(root, count=20, how=HOW, encoder=None, given=None, bucket=(16, 16)):
    encoder = encoder or Encoder()
    return encode.encode_to_store(
        Store(root), given or samples(count), bucket, encoder.look, encoder.hear, how
    ), encoder


def hashes(root):
    return [Store(root).content_hash(kind) for kind in ("pixels", "text")]


def test_a_stored_latent_equals_a_fresh_one(tmp_path):
    encoded, encoder = fill(tmp_path)
    batch = encoded.read([3, 7, 1])
    fresh = encoder.look(
        torch.stack([torch.from_numpy(np.array(picture(i))) for i in (3, 7, 1)]).permute(0, 3, 1, 2) / 127.5
        - 1
    )
    torch.testing.assert_close(batch.latents, fresh)
    assert batch.captions == ["picture 3", "picture 7", "picture 1"]
    assert batch.conditions[1]["tokens"].shape == (2, 6) and batch.conditions[1]["mask"].all()
    assert batch.ids == [encoded.ids[i] for i in (3, 7, 1)]
    assert encoded.null["tokens"].shape == (0, 6)
    assert len(encoded.with_split("train")) == 16 and len(encoded.with_split("held_out")) == 4


def test_what_is_stored_is_never_encoded_again(tmp_path):
    fill(tmp_path)
    encoded, encoder = fill(tmp_path)
    assert (encoder.pixels, encoder.texts) == (0, []) and len(encoded) == 20


CHANGES = {
    "caption": (lambda: {"given": [*samples(19), replace(samples(20)[19], captions=("new",))]}, 0, 1),
    "encoder": (lambda: {"how": replace(HOW, pixels="codec-2")}, 20, 0),
    "text encoder": (lambda: {"how": replace(HOW, texts="text-2")}, 0, 21),
    "resolution": (lambda: {"bucket": (8, 8)}, 20, 0),
    "format": (lambda: {"how": replace(HOW, pixels_format="float16")}, 20, 0),
    "mirrored too": (lambda: {"how": replace(HOW, flip=True)}, 20, 0),
    "one more": (lambda: {"given": samples(21)}, 1, 1),
    "one renamed": (lambda: {"given": [*samples(19), replace(samples(20)[19], name="other")]}, 0, 0),
    "batch size": (lambda: {"how": replace(HOW, batch=5)}, 0, 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_encodes_exactly_what_it_changes(change, tmp_path):
    fill(tmp_path)
    changed, pictures, texts = CHANGES[change]
    _, encoder = fill(tmp_path, **changed())
    assert (encoder.pixels, len(encoder.texts)) == (pictures, texts)


def test_equal_pictures_are_encoded_once(tmp_path):
    twins = [replace(one, name=f"copy of {one.name}") for one in samples(6)]
    encoded, encoder = fill(tmp_path, given=samples(6) + twins)
    assert encoder.pixels == 6 and len(encoded) == 12


def test_broken_pictures_are_set_aside_and_the_rest_goes_on(tmp_path):
    def broken():
        return b"no picture"

    given = samples(10)
    given[4] = replace(given[4], picture=broken)
    given[6] = replace(given[6], picture=None, file=tmp_path / "gone.png")
    encoded, _ = fill(tmp_path / "store", given=given)
    assert len(encoded) == 8 and {one.file for one in encoded.set_aside} == {"004", "006"}
    assert encoded.counts["set_aside"] == 2
    with pytest.raises(Refused, match="No picture is left"):
        fill(tmp_path / "store", given=[replace(given[4])])


def test_an_answer_that_is_not_finite_is_set_aside(tmp_path):
    encoder = Encoder()
    encoder.look = lambda pixels: pixels.where(pixels[:, :1, :1, :1] < 0.5, float("nan"))
    encoded, _ = fill(tmp_path, encoder=encoder, count=30)
    assert encoded.set_aside and all("not finite" in one.reason for one in encoded.set_aside)
    assert torch.isfinite(encoded.read(range(len(encoded))).latents).all()


@pytest.mark.parametrize("kind", ["pixels", "text"])
@pytest.mark.parametrize("part", ["data", "header", "truncated", "gone", "empty"])
def test_damage_is_found_named_and_healed(kind, part, tmp_path):
    fill(tmp_path)
    before = hashes(tmp_path)
    file = min((tmp_path / kind).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    if part == "data":
        data[-3] ^= 4
    elif part == "header":
        data[40] ^= 1
    file.write_bytes({"truncated": data[:-20], "empty": b""}.get(part, data))
    if part == "gone":
        file.unlink()
    encoded, encoder = fill(tmp_path)
    assert len(encoded) == 20
    if part != "gone":
        assert any("damaged" in note and file.name in note for note in encoded.notes)
    again = encoder.pixels if kind == "pixels" else len(encoder.texts)
    assert again == (1 if part == "data" else again) and again >= 1
    assert hashes(tmp_path) == before
    assert fill(tmp_path)[0].notes == []


def test_the_damaged_sample_is_named(tmp_path):
    fill(tmp_path)
    file = min((tmp_path / "pixels").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (note,) = fill(tmp_path)[0].notes
    assert note.startswith("damaged: 0") and note.endswith("encoded again.")


def test_a_shard_is_an_ordinary_safetensors_file(tmp_path):
    fill(tmp_path)
    for file in (tmp_path / "text").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert all(opened.get_tensor(name) is not None for name in opened.keys())  # noqa: SIM118


def test_the_same_entries_make_the_same_file(tmp_path):
    tensors = {key(str(i), "", "", ""): {"a": torch.arange(i), "b": torch.ones(3) > 0} for i in range(5)}
    first = shard.write(tmp_path, tensors)
    data = first.read_bytes()
    assert shard.write(tmp_path, dict(reversed(tensors.items()))) == first and first.read_bytes() == data


def test_the_index_is_only_a_cache(tmp_path):
    store = Store(tmp_path)
    keys = [key(str(i), "", "", "") for i in range(100)]
    for one in keys:
        store.put("text", one, {"x": torch.tensor([float(len(one))])})
    merged = Index(tmp_path / "text")
    assert merged.file.exists() and len(merged) == 100
    for spoil in (
        lambda data: data[: len(data) // 2],
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    ):
        merged.file.write_bytes(spoil(merged.file.read_bytes()))
        assert Store(tmp_path).has("text", keys) == set(keys)
    assert Store(tmp_path).has("text", [key("other", "", "", "")]) == set()
    assert float(Store(tmp_path).get("text", keys[7])["x"]) == 32


def test_a_store_can_be_moved_and_swept(tmp_path):
    encoded, _ = fill(tmp_path / "here")
    before = encoded.read([5]).latents
    (tmp_path / "here").rename(tmp_path / "there")
    moved, encoder = fill(tmp_path / "there")
    assert encoder.pixels == 0
    assert torch.equal(moved.read([5]).latents, before)
    store = Store(tmp_path / "there")
    files = {place.path for item in moved.items for place in item.pictures}
    keys = set(sorted(one for file in files for one in shard.read_header(Path(file)))[:7])
    assert collect(store, {"pixels": keys}, days=0, remove=True).freed_bytes > 0
    assert store.has("pixels", keys) == keys
    _, encoder = fill(tmp_path / "there")
    assert encoder.pixels == 20 - len(keys)


def test_a_full_disk_is_one_sentence_and_the_store_stays_valid(tmp_path, monkeypatch):
    fill(tmp_path, 8)
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Failed, match="no space"):
        fill(tmp_path, 40)
    monkeypatch.setattr(os, "fsync", real)
    assert not list(tmp_path.rglob("*.part"))
    fill(tmp_path, 40)
    fill(tmp_path / "other", 8)
    fill(tmp_path / "other", 40)
    assert hashes(tmp_path) == hashes(tmp_path / "other")


@pytest.mark.parametrize(
    ("form", "worst"), [("float16", 1e-3), ("bfloat16", 1e-2), ("int8", 1e-2), ("float8", 4e-2)]
)
def test_a_smaller_format_has_a_small_error(form, worst, tmp_path):
    tensors = {"tokens": torch.randn(12, 64), "mask": torch.ones(12) > 0, "labels": torch.tensor(7)}
    assert formats.quantization_error(tensors, form) < worst
    stored = formats.quantize(tensors, form)
    assert stored["tokens"].element_size() == (2 if "16" in form else 1)
    back = formats.dequantize(stored)
    assert back["mask"].dtype == torch.bool and int(back["labels"]) == 7
    encoded, _ = fill(tmp_path, how=replace(HOW, pixels_format=form, texts_format=form))
    exact, _ = fill(tmp_path)
    assert encoded.buckets == exact.buckets
    torch.testing.assert_close(encoded.read([2]).latents, exact.read([2]).latents, atol=2 * worst, rtol=worst)


def test_a_posterior_is_drawn_anew_each_epoch_and_the_same_each_time(tmp_path):
    encoder = Encoder()
    plain = encoder.look
    encoder.look = lambda pixels: {"mean": plain(pixels), "std": torch.full_like(plain(pixels), 0.1)}
    encoded, _ = fill(tmp_path, encoder=encoder)
    first, again, other = (encoded.read([1, 2], seed=3, epoch=e).latents for e in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(encoded.read([2], seed=3, epoch=0).latents[0], first[1])
    assert 0.02 < float((first - other).std()) < 0.3


def test_mirrored_pictures_and_several_captions_take_turns(tmp_path):
    given = [replace(one, captions=("left", "right", "middle")) for one in samples(6)]
    encoded, encoder = fill(tmp_path, given=given, how=replace(HOW, flip=True))
    assert encoder.pixels == 12 and len(encoder.texts) == 4
    batches = [encoded.read([2], seed=0, epoch=epoch) for epoch in range(40)]
    assert {batch.captions[0] for batch in batches} == {"left", "right", "middle"}
    shown = list({json.dumps(batch.latents.tolist()): batch.latents for batch in batches}.values())
    assert len(shown) == 2
    torch.testing.assert_close(shown[0].flip(-1), shown[1])


def test_pictures_of_other_shapes_are_other_buckets(tmp_path):
    given = [
        replace(one, picture=lambda i=i: picture(i).resize((16, 16 + 16 * (i % 2))))
        for i, one in enumerate(samples(9))
    ]
    encoded, _ = fill(tmp_path, given=given, bucket=lambda size: size)
    assert sorted(set(encoded.buckets)) == [(3, 4, 4), (3, 8, 4)]
    with pytest.raises(ValueError, match="one bucket"):
        encoded.read([0, 1])


def test_a_sample_reads_the_same_alone_and_in_a_batch_and_may_be_written_into(tmp_path):
    """Also where its numbers lie off their boundaries: the entry before has an odd number of bytes."""

    class Odd(Encoder):
        def look(self, pixels):
            latents = super().look(pixels)
            return {"latents": latents, "mask": latents[:, 0, 0, :3] > 0}

    encoded, _ = fill(tmp_path, 6, encoder=Odd())
    whole = encoded._tensors([item.pictures[0] for item in encoded.items])
    for row, item in enumerate(encoded.items):
        alone = encoded._tensors([item.pictures[0]])
        assert all(torch.equal(alone[name][0], whole[name][row]) for name in ("latents", "mask"))
        alone["latents"] += 1
    plain, _ = fill(tmp_path / "plain", 6, how=replace(HOW, pixels_format="int8"))
    together = plain.read(range(6))
    for index in range(6):
        one = plain.read([index])
        assert torch.equal(one.latents[0], together.latents[index]) and one.ids == together.ids[index:][:1]
        assert one.captions == together.captions[index:][:1]
        assert torch.equal(one.conditions[0]["tokens"], together.conditions[index]["tokens"])
        assert torch.equal(one.time_ids[0], together.time_ids[index]) and one.labels.tolist() == [NO_LABEL]
    assert torch.equal(encoded._tensors([encoded.items[2].pictures[0]])["latents"][0], whole["latents"][2])


def test_a_batch_is_read_in_microseconds(tmp_path):
    encoded, _ = fill(tmp_path, 96)
    indices = list(range(64))
    encoded.read(indices)
    best = min(_timed(lambda: encoded.read(indices)) for _ in range(20))
    assert best / 64 < 100e-6  # about 10 on an idle core; the suite shares its cores


def _timed(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def test_without_a_text_encoder_there_are_no_conditions_but_labels(tmp_path):
    given = [replace(one, label=i % 3) for i, one in enumerate(samples(6))]
    plain = encode.encode_to_store(Store(tmp_path), samples(6), (16, 16), Encoder().look, None, HOW)
    assert plain.read([0, 1]).conditions == [{}, {}] and plain.null == {}
    classes = encode.encode_to_store(Store(tmp_path), given, (16, 16), Encoder().look, None, HOW)
    assert [int(one["labels"]) for one in classes.read([4, 5]).conditions] == [1, 2]


def test_a_batch_says_the_classes_beside_the_captions(tmp_path):
    given = [replace(one, label=None if i == 3 else i % 3) for i, one in enumerate(samples(6))]
    encoded, _ = fill(tmp_path, given=given)
    batch = encoded.read([3, 4, 5])
    assert batch.labels.tolist() == [NO_LABEL, 1, 2] and "labels" not in batch.conditions[0]
    encoded.labels = True
    assert [int(one["labels"]) for one in encoded.read([4, 5]).conditions] == [1, 2]
    assert "tokens" in encoded.read([4, 5]).conditions[0]


def test_how_a_picture_was_cut_is_told(tmp_path):
    wide = replace(samples(1)[0], picture=None, file=tmp_path / "wide.png")
    picture(0).resize((64, 32)).save(wide.file)
    encoded, _ = fill(tmp_path / "store", given=[wide], bucket=(16, 16))
    assert encoded.read([0]).time_ids.tolist() == [[32, 64, 0, 8, 16, 16]]
    whole, _ = fill(tmp_path / "store", given=[wide], bucket=lambda size: size)
    assert whole.read([0]).time_ids.tolist() == [[32, 64, 0, 0, 32, 64]]


def test_companions_are_cut_and_mirrored_with_their_pictures(tmp_path):
    given = []
    for index, one in enumerate(samples(6)):
        picture(index).save(tmp_path / f"{index}.png")
        if index < 5:
            given.append(replace(one, companions={"control": tmp_path / f"{index}.png"}))
        else:
            given.append(one)
    how = replace(HOW, flip=True)
    encoded = encode.encode_to_store(
        Store(tmp_path / "store"),
        given,
        (16, 16),
        Encoder().look,
        None,
        how,
        companions={"control": Companion(Encoder().look, "codec-1")},
    )
    assert [one.reason for one in encoded.set_aside] == ["it has no control"]
    for epoch in range(5):
        batch = encoded.read(range(5), 0, epoch)
        assert torch.equal(batch.companions["control"], batch.latents)
