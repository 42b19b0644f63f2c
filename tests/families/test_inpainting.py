"""Laws of inpainting checkpoints: UNets of nine channels that are shown the hole and what is kept."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.data import condition_images
from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.pretrained import inpainting

from .components import seeded
from .test_control import CLOSE, modal, opened, our_pixels, pipeline_pixels  # noqa: F401
from .test_control import called as called_as
from .zoo import PROMPT, ZOO

PIPELINES = {
    "stable-diffusion-1.5": "StableDiffusionInpaintPipeline",
    "stable-diffusion-xl": "StableDiffusionXLInpaintPipeline",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The zoo's checkpoints with a UNet of nine channels, made when first asked for."""
    home = tmp_path_factory.mktemp("inpainting")

    def folder(name: str) -> Any:
        if not (home / name).exists():
            torch.manual_seed(0)
            pipe = ZOO[name].make(name)
            config = {**pipe.unet.config, "in_channels": 9}
            network = seeded(diffusers.UNet2DConditionModel.from_config(config), name)
            parts = {**pipe.components, "unet": network}
            kind: Any = getattr(diffusers, PIPELINES[name])
            quiet = {"requires_safety_checker": False} if "safety_checker" in parts else {}
            kind(**parts, **quiet).save_pretrained(home / name)
        return home / name

    return folder


def photo() -> Image.Image:
    """A picture with structure."""
    chance = np.random.default_rng(0)
    return Image.fromarray(chance.integers(0, 255, (4, 6, 3), np.uint8)).resize((96, 64), 1)


def hole() -> Image.Image:
    """White where it is to be repainted."""
    mask = Image.new("L", (96, 64), 0)
    mask.paste(255, (20, 10, 61, 50))
    return mask


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_hole_is_painted_as_its_pipeline_paints_it(name, strength, folders, modal):  # noqa: F811
    """Law: the same noise, picture and mask give the pipeline's picture."""
    model = sfumato.load(folders(name))
    assert inpainting.repaints(model.denoiser)
    pipe = opened(folders(name), PIPELINES[name])
    shown = {"image": photo(), "mask_image": hole(), "strength": strength}
    expected = pipeline_pixels(pipe, **called_as(name), **shown)
    found = our_pixels(model, pipe, name, init=photo(), mask=hole(), strength=strength)
    assert (found - expected).abs().max() < CLOSE
    other = our_pixels(model, pipe, name, init=photo(), strength=strength)
    assert (other - expected).abs().max() > 10 * CLOSE


def test_what_the_mask_keeps_stays_pixel_for_pixel(folders):
    """Law: the picture's own pixels are pasted back; nothing said, everything is painted."""
    model = sfumato.load(folders("stable-diffusion-1.5"))
    size = {"steps": 2, "width": 96, "height": 64}
    drawn = np.asarray(model.generate([PROMPT], init=photo(), mask=hole(), **size)[0])
    kept = np.asarray(hole()) == 0
    assert np.array_equal(drawn[kept], np.asarray(photo())[kept])
    assert not np.array_equal(drawn, np.asarray(photo()))
    assert model.generate([PROMPT], **size)[0].size == (96, 64)


def test_an_inpainting_checkpoint_is_trained_on_a_column_of_masks(folders, tmp_path):
    """Law: the hole and what is kept are stored and reach the network; the run draws and repaints."""
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for index in range(4):
        photo().rotate(90 * (index % 2) * 2).save(data / f"{index}.png")
        hole().save(data / f"{index}-mask.png")
        rows.append(f'{{"file_name": "{index}.png", "text": "{PROMPT}", "mask": "{index}-mask.png"}}')
    (data / "metadata.jsonl").write_text("\n".join(rows))
    (tmp_path / "r.toml").write_text(
        f"""
        output = "run"
        [model]
        base = "{folders("stable-diffusion-1.5")}"
        train = "lora"
        rank = 2
        [data]
        train = "data"
        resolution = 64
        cache_dir = "store"
        held_out = 0.0
        [train]
        steps = 2
        batch = 2
        validate_every = 0
        sanity = false
        [sample]
        every = 100
        steps = 2
        """
    )
    ready = sfumato.encode(tmp_path / "r.toml")
    batch = ready.train.read([0])
    told = batch.conditions[0]
    white = np.asarray(hole().crop((16, 0, 80, 64)))[::8, ::8] > 127
    assert told["hole"].shape == (1, 8, 8) and set(told["hole"].unique().tolist()) == {0.0, 1.0}
    assert np.array_equal(told["hole"][0].numpy() == 1, white)
    assert told["kept"].shape == batch.latents[0].shape
    rows = [told]
    x, clock = batch.latents, torch.full((1,), 500.0)
    told_of = Condition.stack([{**row, "hole": torch.zeros_like(row["hole"])} for row in rows])
    denoiser = ready.model.denoiser
    assert not torch.equal(denoiser(x, clock, Condition.stack(rows)), denoiser(x, clock, told_of))
    run = sfumato.train(tmp_path / "r.toml")
    assert run.model().generate([PROMPT], init=photo(), mask=hole(), steps=2)[0].size == (64, 64)


def test_masks_are_drawn_where_there_is_no_column(folders, tmp_path):
    """Law: so many masks for each picture, the same every time; latents are stored once; all of the network
    learns; a model that is shown no mask refuses them."""
    data = tmp_path / "data"
    data.mkdir()
    for index in range(2):
        photo().rotate(180 * index).save(data / f"{index}.png")
        (data / f"{index}.txt").write_text(PROMPT)
    said = f"""
        output = "run"
        [model]
        base = "{folders("stable-diffusion-1.5")}"
        [data]
        train = "data"
        resolution = 64
        random_masks = 3
        cache_dir = "store"
        held_out = 0.0
        [train]
        steps = 1
        batch = 6
        validate_every = 0
        sanity = false
        [sample]
        every = 100
        steps = 2
        """
    (tmp_path / "r.toml").write_text(said)
    train = sfumato.encode(tmp_path / "r.toml").train
    assert len(train) == 6 and len({item.pictures for item in train.items}) == 2
    holes = {train.read([at]).conditions[0]["hole"].numpy().tobytes() for at in range(6)}
    assert len(holes) > 3
    again = sfumato.encode(tmp_path / "r.toml").train
    assert {again.read([at]).conditions[0]["hole"].numpy().tobytes() for at in range(6)} == holes
    run = sfumato.train(tmp_path / "r.toml")
    before, after = sfumato.load(folders("stable-diffusion-1.5")).denoiser, run.model().denoiser
    moved = zip(before.parameters(), after.parameters(), strict=True)
    assert sum(not torch.equal(one, other) for one, other in moved) > 100
    scratch = 'base = "scratch"\ntext = "none"\ncodec = "pixels"'
    (tmp_path / "r.toml").write_text(said.replace(f'base = "{folders("stable-diffusion-1.5")}"', scratch))
    with pytest.raises(Refused, match="shown no mask"):
        sfumato.train(tmp_path / "r.toml", [f"output={tmp_path}/other"])


def test_masks_repaint_some_of_a_picture():
    """Law: of a hundred masks most keep a part and repaint a part; a tenth repaints all."""
    shares = [
        np.asarray(condition_images.random_mask((48, 32), 0, "a.png", number)).mean() / 255
        for number in range(100)
    ]
    assert 80 <= sum(0.01 < share < 0.99 for share in shares) < 100
    assert (
        condition_images.random_mask((48, 32), 0, "a.png", 3).tobytes()
        == condition_images.random_mask((48, 32), 0, "a.png", 3).tobytes()
    )
