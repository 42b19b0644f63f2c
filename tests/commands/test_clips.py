"""Clips through the commands: what a model of clips draws is a file that plays."""

import av
import pytest
from PIL import Image

from families import clips  # noqa: F401 - puts them into the zoo
from families.zoo import ZOO
from sfumato import load
from sfumato.generation import files

from .world import one_sentence, sfumato

SMALL = ("--width", 48, "--height", 32, "--frames", 6, "--steps", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A tiny Wan in its own folder."""
    folder = tmp_path_factory.mktemp("models") / "wan"
    ZOO["wan-2.1"].make("wan-2.1").save_pretrained(folder)
    return folder


def test_generate_writes_clips_in_every_kind(wan, tmp_path):
    kinds = [word for kind in files.CLIP_KINDS for word in ("--format", kind)]
    asked = ("generate", wan, "-p", "a cat", "--seed", 5, *SMALL, *kinds, "--out", "out", "--json")
    answer = sfumato(*asked)
    assert answer.code == 0, answer.err
    (listed,) = answer.json()["pictures"]
    assert listed["file"].endswith("000-a-cat-5.mp4") and len(listed["files"]) == 2 + 6
    with av.open(listed["file"]) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 6 and frames[0].shape == (32, 48, 3)
        assert container.streams.video[0].average_rate == 16  # Wan's own
    said = files.told(listed["file"])
    assert said["prompt"] == "a cat" and said["seed"] == 5 and said["frames"] == 6
    assert Image.open(tmp_path / "out" / "sheet.png").width > 100
    assert "data:image/webp" in (tmp_path / "out" / "index.html").read_text()


def test_generate_gives_as_many_frames_as_were_asked_for(wan):
    (clip,) = load(wan).generate("a cat", frames=7, width=48, height=32, steps=1, guidance=1)
    assert clip.shape == (7, 32, 48, 3) and clip.dtype == "uint8"


@pytest.mark.parametrize("words", [("--format", "png"), ("--fps", 0)])
def test_a_file_that_cannot_be_is_refused(wan, words):
    answer = sfumato("generate", wan, "-p", "a cat", *SMALL, *words)
    assert answer.code == 2
    one_sentence(answer, "fps" if "--fps" in words else "mp4")
