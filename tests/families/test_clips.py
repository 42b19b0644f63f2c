"""Laws of families of clips: they learn from clips by a recipe, go on from a clip, and draw long ones."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from commands.world import sfumato as command
from sfumato.run_folder import RunFolder

from . import clips  # noqa: F401 - puts them into the zoo
from .test_training import RECIPE, make_base

FAMILIES = {"wan-2.1": 9, "ltx-video": 9, "hunyuan-video": 9, "cogvideox-5b": 9, "mochi": 7}
"""Frames of the clips each is shown."""
SIDES = {"ltx-video": 64}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Each family's tiny pipeline in a folder of its own, made when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    def base(name):
        folder = root / name
        return folder if (folder / "base").is_dir() else make_base(name, folder).parent

    return base


def film(count, side, shade=0):
    """A square that moves right, uint8 [F, H, W, 3]."""
    frames = np.full((count, side, side, 3), 30 + shade, np.uint8)
    for index in range(count):
        frames[index, 8:20, index : index + 12] = (220, 60 + shade, 40)
    return frames


def write_recipe(folder, name, *model):
    """A recipe on clips of the family's length, and the clips."""
    side, frames = SIDES.get(name, 32), FAMILIES[name]
    place = folder / "pictures" / "a square"
    place.mkdir(parents=True, exist_ok=True)
    for index in range(2):
        images = [Image.fromarray(frame) for frame in film(frames + 2, side, 20 * index)]
        images[0].save(
            place / f"{index}.webp", save_all=True, append_images=images[1:], duration=100, lossless=True
        )
    known = {"captions": "folder", "prompts": '["a square"]', "model": "\n".join(model)}
    text = RECIPE.format(side=side, **known).replace(
        "held_out =", f"frames = {frames}\nrate = 10\nheld_out ="
    )
    (folder / "recipe.toml").write_text(text.replace("steps = 2\nbatch", "steps = 1\nbatch"))
    return folder / "recipe.toml"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_learns_from_clips_and_draws_a_film(name, bases):
    folder = bases(name)
    trained = command("train", write_recipe(folder, name, 'train = "lora"', "rank = 4"), "--json")
    assert trained.code == 0, trained.err
    drawn = command(
        "generate", folder / "run", "-p", "a square", "--frames", FAMILIES[name], "--steps", 2,
        "--guidance", 1, "--out", folder / "drawn", "--json",
    )  # fmt: skip
    assert drawn.code == 0, drawn.err
    with av.open(drawn.json()["pictures"][0]["file"]) as container:
        assert len(list(container.decode(video=0))) == FAMILIES[name]
        assert container.streams.video[0].average_rate == 10


@pytest.mark.parametrize(
    "name",
    ["wan-2.1", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "wan-2.1")],
)
def test_a_family_learns_whole_from_clips(name, bases):
    folder = bases(name)
    run = sfumato.train(write_recipe(folder, name), [f"output={folder / 'whole'}"])
    (step,) = [event for event in RunFolder.open(run.path).events() if event["kind"] == "step"]
    assert np.isfinite(step["loss"])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_clip_is_gone_on_from_at_any_strength(name, strength, bases, monkeypatch):
    """Law: a network that knows the clip gives back what the codec makes of it, from wherever it starts."""
    model = sfumato.load(bases(name) / "base")
    side, frames = SIDES.get(name, 32), FAMILIES[name]
    shape = model.latent_shape(side, side, frames)
    clip, noise = film(frames, side), torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    known = model.encode(pixels)

    def knows(x_t, t, condition):
        times = torch.as_tensor(t, dtype=torch.float64).expand(len(x_t))
        a, s = (one.view(-1, 1, 1, 1, 1) for one in model.theory.data(times))
        return model.theory.target(known, ((x_t - a * known) / s).to(x_t), times).to(x_t)

    monkeypatch.setattr(type(model), "predict", lambda self, x_t, t, condition: knows(x_t, t, condition))
    keys = {"width": side, "height": side, "frames": frames, "steps": 4, "guidance": 1, "latents": noise}
    mask = Image.new("L", (side, side), 255)
    (drawn,) = model.generate("a square", init=clip, strength=strength, mask=mask, **keys)
    wanted = ((model.decode(known)[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 3, 0).numpy()
    assert np.abs(drawn - wanted[:frames]).max() <= 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_long_clip_is_drawn_in_windows(name, bases):
    """Law: a window as long as the clip changes nothing; a shorter one gives a clip as long as asked for."""
    model, side, frames = sfumato.load(bases(name) / "base"), SIDES.get(name, 32), FAMILIES[name]
    keys = {"width": side, "height": side, "steps": 2, "guidance": 1}
    (whole,) = model.generate("a square", frames=frames, **keys)
    (same,) = model.generate("a square", frames=frames, window=frames, overlap=1, **keys)
    assert np.array_equal(whole, same)
    (long,) = model.generate("a square", frames=2 * frames - 1, window=frames, **keys)
    assert len(long) == 2 * frames - 1
