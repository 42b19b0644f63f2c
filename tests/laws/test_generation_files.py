"""What is drawn becomes files that play anywhere and say what they show."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from sfumato.errors import Refused
from sfumato.generation import files
from sfumato.generation.contact_sheet import film_sheet, strip

SAID = {"prompt": "ein roter Kreis – 円", "seed": 3, "guidance": 2.0}


def moving(frames=9, height=34, width=48):
    """A green square that moves right over red."""
    clip = np.zeros((frames, height, width, 3), np.uint8)
    clip[:] = (200, 40, 90)
    for index in range(frames):
        clip[index, 8:20, 3 * index : 3 * index + 12] = (20, 180, 60)
    return clip


def written(clip, kind, folder, fps=8.0):
    paths = []
    for ending, content in files.contents(clip, kind, SAID, fps).items():
        paths.append(folder / f"clip{ending}")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(content)
    return paths


def seen(paths):
    """The frames of a written clip, by other readers than ours."""
    if paths[0].suffix == ".mp4":
        with av.open(str(paths[0])) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    if len(paths) > 1:
        return np.stack([np.asarray(Image.open(path)) for path in paths])
    image = Image.open(paths[0])
    frames = []
    for index in range(image.n_frames):
        image.seek(index)
        frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


@pytest.mark.parametrize("kind", files.CLIP_KINDS)
def test_a_clip_is_read_back_as_it_was_written(kind, tmp_path):
    clip = moving()
    paths = written(clip, kind, tmp_path)
    again = seen(paths)
    assert again.shape == clip.shape
    off = np.abs(again.astype(float) - clip)
    assert off.mean() < (0.01 if kind == "frames" else 4)
    assert all(files.read_metadata(path) == SAID for path in paths)


def test_an_mp4_is_h264_at_its_rate(tmp_path):
    (path,) = written(moving(), "mp4", tmp_path, fps=12.5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == 12.5
        assert container.metadata["title"] == SAID["prompt"]


def test_odd_sides_are_completed_for_h264(tmp_path):
    clip = moving(3, 33, 47)
    again = seen(written(clip, "mp4", tmp_path))
    assert again.shape == (3, 34, 48, 3)
    assert np.abs(again[:, :33, :47].astype(float) - clip).mean() < 4


@pytest.mark.parametrize("kind", files.PICTURE_KINDS)
def test_a_picture_says_what_it_shows(kind, tmp_path):
    ((ending, content),) = files.contents(Image.new("RGB", (8, 8), "red"), kind, SAID).items()
    (tmp_path / f"p{ending}").write_bytes(content)
    assert files.read_metadata(tmp_path / f"p{ending}") == SAID
    assert Image.open(io.BytesIO(content)).convert("RGB").getpixel((4, 4))[0] > 240


def test_a_kind_that_cannot_be_is_refused_with_the_nearest():
    with pytest.raises(Refused, match="mp4"):
        files.contents(moving(), "mp5", SAID)
    with pytest.raises(Refused, match="frames a second"):
        files.contents(moving(), "mp4", SAID, fps=0)


def test_a_strip_goes_from_the_first_frame_to_the_last():
    clip = np.stack([np.full((4, 4, 3), 10 * index, np.uint8) for index in range(20)])
    paper = np.asarray(strip(clip, frames=4, side=8))
    assert paper.shape == (8, 38, 3)
    assert [int(paper[4, 4 + 10 * index, 0]) for index in range(4)] == [0, 60, 130, 190]
    sheet = film_sheet([clip, clip], ["one", "two"], frames=4, side=8)
    assert sheet.height > 2 * 8
