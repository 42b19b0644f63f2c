"""Clips that guide clips: control, reference and a source to be edited, by recipe and command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato as package
from sfumato.data import condition_images
from sfumato.models import Condition
from sfumato.models.control import ControlPlan, add_control_modules

from .test_clips import CLIPS
from .world import COLORS, one_sentence, sfumato

COLUMNS = {"controlnet": "control", "ip-adapter": "reference", "edit": "source"}
OPTIONS = {"controlnet": "--control", "ip-adapter": "--reference", "edit": "--image"}


def animation(file, color, count=6, step=2):
    """A square that moves right."""
    images = [Image.new("RGB", (16, 16), "black") for _ in range(count)]
    for frame, image in enumerate(images):
        image.paste(color, (step * frame, 4, step * frame + 5, 12))
    images[0].save(file, save_all=True, append_images=images[1:], duration=100)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Clips with a clip that is their outline, one to be edited, a picture for reference; a base run."""
    folder = tmp_path_factory.mktemp("guides")
    (folder / "clips").mkdir()
    rows = []
    for index in range(5):
        for name, color in (
            (f"{index}.webp", list(COLORS.values())[index % 4]), (f"edge{index}.webp", "white"),
            (f"before{index}.webp", "yellow"),
        ):  # fmt: skip
            animation(folder / "clips" / name, color)
        Image.new("RGB", (16, 16), "red").save(folder / "clips" / f"look{index}.png")
        rows.append(
            {
                "file_name": f"{index}.webp", "caption": f"a square number {index}",
                "control": f"edge{index}.webp" if index else "look0.png",  # a still one stands
                "reference": f"look{index}.png", "edit_source": f"before{index}.webp",
            }
        )  # fmt: skip
    (folder / "clips" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CLIPS.replace("steps = 6", "steps = 2").replace("every = 3", "every = 2")
    (folder / "recipe.toml").write_text(text)
    trained = sfumato("train", folder / "recipe.toml", "--json")
    assert trained.code == 0, trained.err
    return folder


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_guide_is_trained_on_clips_and_draws(kind, world, tmp_path):
    base = [] if kind == "edit" else [f"model.base={world / 'run'}"]
    trained = sfumato(
        "train", world / "recipe.toml", f"model.train={kind}", f"output={tmp_path / 'guided'}", *base,
        *([] if kind == "controlnet" else [f"data.{COLUMNS[kind]}={'reference' if base else 'edit_source'}"]),
        "--json",
    )  # fmt: skip
    assert trained.code == 0, trained.err
    shown = world / "clips" / ("look1.png" if kind == "ip-adapter" else "edge1.webp")
    asked = ("generate", tmp_path / "guided", "-p", "a square", OPTIONS[kind], shown, "--steps", 2, "--json")
    drawn = sfumato(*asked, "--frames", 9, "--out", tmp_path / "drawn")
    assert drawn.code == 0, drawn.err


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_guide_of_clips_acts_once_it_has_learned(kind, world):
    """Law: new ones change nothing; changed ones hear their clip, frame by frame, and a still one stands."""
    model = package.load(world / "run")
    for weight in model.denoiser.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    guided = add_control_modules(model, [ControlPlan(kind)])
    (encoder,) = guided.encoders(model).values()
    name = guided.control_modules[0].name
    x, t = torch.randn(2, *model.latent_shape()), torch.full((2, 3), 0.5)
    words = model.condition(["a square"] * 2)
    clips = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    told = Condition({**words, name: encoder.encode(clips)})
    before = model.predict(x, t, words)
    assert torch.equal(model.predict(x, t, told), before)
    for weight in guided.guides.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    after = model.predict(x, t, told)
    assert (after - before).abs().max() > 1e-4
    still = Condition({**words, name: encoder.encode(clips[:, :, :1])})
    long = Condition({**words, name: encoder.encode(clips[:, :, :1].expand(-1, -1, 5, -1, -1))})
    torch.testing.assert_close(model.predict(x, t, still), model.predict(x, t, long), rtol=1e-3, atol=1e-3)


def test_a_clip_to_begin_with_is_read_from_its_file(world, tmp_path):
    edge = world / "clips" / "edge1.webp"
    asked = ("generate", world / "run", "-p", "a square", "--steps", 4, "--json", "--out", tmp_path)
    drawn = sfumato(*asked, "--init", edge, "--strength", 0.5)
    assert drawn.code == 0, drawn.err
    refused = sfumato(*asked, "--control", edge)
    one_sentence(refused, "control", "ControlNet")


def test_the_control_of_a_clip_is_that_of_its_frames():
    pytest.importorskip("skimage")
    clip = torch.rand(1, 3, 2, 16, 16) * 2 - 1
    whole = condition_images.control_image(clip, "sketch")
    assert np.allclose(whole[:, :, 1], condition_images.control_image(clip[:, :, 1], "sketch"))


@pytest.mark.parametrize("kind", ["full", "lora", "controlnet", "ip-adapter"])
@pytest.mark.parametrize("command", ["plan", "train"])
def test_clips_beside_a_base_of_clips_without_frames_are_refused(command, kind, world, tmp_path):
    free = ("frame_timesteps=shared", "first_frame_share=0", "last_frame_share=0")
    answer = sfumato(
        command, world / "recipe.toml", f"model.base={world / 'run'}", f"model.train={kind}", "data.frames=0",
        *(f"train.{one}" for one in free), f"output={tmp_path / 'guided'}",
        *(["data.control_image=canny"] if kind == "controlnet" else []),
        *(["data.reference_image=picture"] if kind == "ip-adapter" else []),
    )  # fmt: skip
    one_sentence(answer, ".webp is a clip", "data.frames = 5")


def test_a_picture_controls_a_base_of_clips_as_a_clip_of_one_frame(world):
    """Law: bytes of a picture and those of a clip of that one frame say the same."""
    model = package.load(world / "run")
    guided = add_control_modules(model, [ControlPlan("controlnet")])
    (encoder,) = guided.encoders(model).values()
    for weight in guided.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    x, t = torch.randn(2, *model.latent_shape(frames=1)), torch.full((2, 1), 0.5)
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    words = model.condition(["a square"] * 2)
    drawn = [
        model.predict(x, t, Condition({**words, "control": encoder.encode(one)}))
        for one in (picture, picture[:, :, None])
    ]
    assert torch.equal(*drawn) and (drawn[0] - model.predict(x, t, words)).abs().max() > 1e-4
