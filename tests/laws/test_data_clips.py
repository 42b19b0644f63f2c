"""Clips are cut at a steady rate from any kind of video; what is no clip is set aside."""

from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data import dataset_report
from sfumato.data.encoding import encode
from sfumato.data.encoding.views import EncodingOptions
from sfumato.data.sources import folder
from sfumato.data.sources.sample import Sample
from sfumato.data.store.store import Store
from sfumato.readers import clips, media
from sfumato.readers.clips import ClipSpan
from sfumato.report import data_page

SIDE = 32
HOW = EncodingOptions(pixels="codec", batch=2, shard=4, frames=4, fps=4, threads=1)


def grey(level):
    return Image.new("RGB", (SIDE, SIDE), (level, level, level))


def levels(clip):
    return clip.float().mean((0, 2, 3))


def movie(path, moments, codec="mpeg4"):
    """A video whose frame at each moment (seconds) is as bright as 10 · moment · 10."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for moment in moments:
            frame = av.VideoFrame.from_image(grey(int(moment * 100)))
            frame.time_base, frame.pts = Fraction(1, 1000), int(moment * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def animation(path, count=20, each=100):
    images = [grey(int(index * each / 10)) for index in range(count)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=each, lossless=True)
    return path


KINDS = {
    "clip.mp4": lambda path: movie(path, [i / 25 for i in range(50)]),
    "slow.mkv": lambda path: movie(path, [i / 8 for i in range(16)]),
    "clip.gif": animation,
    "clip.webp": animation,
}


@pytest.mark.parametrize("name", KINDS)
def test_a_clip_is_resampled_by_time(name, tmp_path):
    file = KINDS[name](tmp_path / name)
    assert clips.is_clip(name, file)
    found = clips.video_info(name, file)
    assert found.size == (SIDE, SIDE) and abs(found.seconds - 2) < 0.13
    clip = clips.read_frames(name, file, ClipSpan(frames=4, fps=4), 16, 16)
    assert clip.shape == (3, 4, 16, 16)
    expected = torch.tensor([50, 75, 100, 125.0])  # the middle second of two
    assert (levels(clip) - expected).abs().max() <= 17


def test_a_variable_rate_is_no_special_case(tmp_path):
    moments = [0, 0.04, 0.08, 0.5, 0.54, 1.0, 1.5, 1.9, 1.95]
    file = movie(tmp_path / "uneven.mp4", moments)
    clip = clips.read_frames(file.name, file, ClipSpan(frames=4, fps=2), 16, 16)
    assert (levels(clip) - torch.tensor([0, 50, 100, 150.0])).abs().max() <= 6


def test_segments_are_spread_from_beginning_to_end(tmp_path):
    file = animation(tmp_path / "clip.webp")
    means = [
        float(levels(clips.read_frames(file.name, file, ClipSpan(4, 8, i, 3), 8, 8)).mean()) for i in range(3)
    ]
    assert means == sorted(means) and means[0] < 30 and means[2] > 150


def silent(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


BROKEN = {
    "short.mp4": lambda path: movie(path, [0, 0.1, 0.2]),
    "sound only.mp4": silent,
    "empty.mp4": lambda path: path.write_bytes(b""),
    "noise.webm": lambda path: path.write_bytes(b"\x1a\x45\xdf\xa3 and nothing more"),
    "cut.mp4": lambda path: path.write_bytes(movie(path, [i / 25 for i in range(50)]).read_bytes()[:900]),
    "gone.mp4": lambda path: None,
    "playlist.mp4": lambda path: path.write_bytes(b"ffconcat version 1.0\nfile 'short.mp4'\n"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_usable_clip_has_a_reason(name, tmp_path):
    BROKEN[name](tmp_path / name)
    with pytest.raises(media.Unreadable) as told:
        clips.read_frames(name, tmp_path / name, ClipSpan(frames=4, fps=4), 16, 16)
    assert 5 < len(str(told.value)) < 200


def fill(tmp_path, given, how=HOW, bucket=(16, 16)):
    def look(pixels):
        return pixels.mean(1, keepdim=True)

    return encode.encode_to_store(Store(tmp_path / "store"), given, bucket, look, None, how)


@pytest.fixture
def given(tmp_path):
    made = [Sample(f"{i}.webp", ("",), file=animation(tmp_path / f"{i}.webp", 20 + i)) for i in range(3)]
    grey(9).save(tmp_path / "still.png")
    movie(tmp_path / "short.mp4", [0, 0.1])
    more = [Sample(name, ("",), file=tmp_path / name) for name in ("still.png", "short.mp4")]
    return made + more


def test_clips_and_stills_are_stored_in_their_own_buckets(given, tmp_path):
    encoded = fill(tmp_path, given)
    assert encoded.buckets == [(1, 4, 16, 16)] * 3 + [(1, 1, 16, 16)]
    assert [one.file for one in encoded.set_aside] == ["short.mp4"]
    assert "need" in encoded.set_aside[0].reason
    by_size = fill(tmp_path, given, bucket=lambda size: size)
    assert by_size.buckets[0] == (1, 4, SIDE, SIDE)


def test_clips_too_short_are_taken_with_fewer_frames(given, tmp_path):
    """Law: each clip has the most frames of those allowed that it lasts for; one frame is a still."""
    movie(tmp_path / "half.mp4", [i / 25 for i in range(15)])
    given.append(Sample("half.mp4", ("",), file=tmp_path / "half.mp4"))
    encoded = fill(tmp_path, given, replace(HOW, short_clip_frames=(1, 2, 3)))
    assert not encoded.set_aside
    frames = dict(zip(encoded.names, (bucket[1] for bucket in encoded.buckets), strict=True))
    assert frames["0.webp"] == 4 and frames["half.mp4"] == 2
    assert frames["short.mp4"] == frames["still.png"] == 1


def test_mirrored_segments_are_so_many_views(given, tmp_path):
    encoded = fill(tmp_path, given[:1], replace(HOW, clips_per_video=2, flip=True))
    assert len(encoded.items[0].pictures) == 4
    shown = {tuple(np.round(levels(encoded.read([0], 0, e).latents[0]).tolist(), 4)) for e in range(40)}
    assert len(shown) == 2  # the frames are grey, so mirrored ones look the same


def test_a_model_of_pictures_sets_videos_aside_and_takes_first_frames_of_animations(given, tmp_path):
    encoded = fill(tmp_path, given, replace(HOW, frames=0))
    assert [one.file for one in encoded.set_aside] == ["short.mp4"]
    assert encoded.buckets == [(1, 16, 16)] * 4


def test_the_report_tells_how_long_clips_are(given, tmp_path):
    (tmp_path / "noise.mp4").write_bytes(b"no video")
    told = dataset_report.report(folder.open_collection(tmp_path, captions="none"))
    assert told.summary["clips"]["count"] == 4 and told.summary["samples"] == 5
    assert [one["file"] for one in told.summary["set_aside"]] == ["noise.mp4"]
    assert "4 of them move" in data_page.render(told.summary, told.sheets, told.twins)
