"""Laws of control modules that a recipe trains on pretrained pipelines: drawn with and exported."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor

import sfumato
from sfumato.errors import Refused
from sfumato.generation import load
from sfumato.models.control import attach
from sfumato.workflow.export import export

from .test_control import CONTROLLED, LOOKING, folders, seer  # noqa: F401
from .zoo import PROMPT, ZOO

RECIPE = """output = "{name}"
[model]
base = "{base}"
train = "{kind}"
{model}
[data]
train = "data"
resolution = 64
cache_dir = "store"
held_out = 0.0
{data}
[train]
steps = 2
batch = 2
learning_rate = 0.01
validate_every = 0
sanity = false
gradient_checkpointing = 1
[sample]
every = 2
steps = 2
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A few captioned pictures with controls beside them."""
    home = tmp_path_factory.mktemp("guided")
    (home / "data").mkdir()
    rows, chance = [], np.random.default_rng(0)
    for index in range(4):
        picture = Image.fromarray(chance.integers(0, 255, (4, 4, 3), np.uint8)).resize((64, 64), 1)
        picture.save(home / "data" / f"{index}.png")
        picture.convert("L").point(lambda value: 255 * (value > 128)).save(home / "data" / f"{index}-c.png")
        rows.append(f'{{"file_name": "{index}.png", "text": "{PROMPT}", "control": "{index}-c.png"}}')
    (home / "data" / "metadata.jsonl").write_text("\n".join(rows))
    seer().save_pretrained(home / "clip")
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(home / "clip")
    return home


def trained(home: Path, base: Path, kind: str, name: str, **more: str) -> Any:
    """A run of two steps."""
    file = home / f"{kind}-{name}.toml"
    words = {"model": "", "data": "", **more}
    file.write_text(RECIPE.format(name=f"runs/{kind}-{name}", base=base, kind=kind, **words))
    return sfumato.train(file)


def quick(names: Any) -> list[Any]:
    """All of them; the largest are left to a longer run."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name.endswith(("xl", "3.5")))) for name in names]


@pytest.mark.parametrize("name", quick(CONTROLLED))
def test_a_controlnet_is_trained_by_a_recipe_and_goes_elsewhere(name, folders, home):  # noqa: F811
    """Law: the base stays as it is, what is exported diffusers loads, and draws the run's picture with."""
    run = trained(home, folders(name), "controlnet", name, data='condition_dropout = ["control=0.1"]')
    model = run.model()
    picture = Image.open(home / "data" / "0-c.png")
    options = {"steps": 2, "width": 64, "height": 64, "seed": 3, **ZOO[name].options}
    drawn = model.generate([PROMPT], control=picture, **options)[0]
    plain = model.generate([PROMPT], **options)[0]
    assert plain.tobytes() == load(folders(name)).generate([PROMPT], **options)[0].tobytes()
    done = export(run.path, "diffusers", home / "out" / name)
    assert done.difference < 1e-4 and done.effect > 0
    kind = getattr(diffusers, CONTROLLED[name])
    net = type(model.denoiser.control_modules[0].net).from_pretrained(home / "out" / name)
    kind.from_pretrained(folders(name), controlnet=net)
    again = load(folders(name))
    attach(again, home / "out" / name)
    there = np.asarray(again.generate([PROMPT], control=picture, **options)[0])
    assert np.abs(there.astype(int) - np.asarray(drawn)).max() <= 1  # where a weight lies in memory may round


@pytest.mark.parametrize("name", quick(LOOKING))
def test_an_ip_adapter_is_trained_by_a_recipe_and_goes_elsewhere(name, folders, home):  # noqa: F811
    """Law: an image encoder's answers are stored, the adapter learns, and diffusers' pipeline loads it."""
    run = trained(home, folders(name), "ip-adapter", name, model=f'image_encoder = "{home / "clip"}"')
    done = export(run.path, "diffusers", home / "adapters" / name)
    assert done.difference < 1e-4 and done.effect > 0
    assert [file.name for file in done.files] == ["ip-adapter.safetensors"]
    options = {"steps": 2, "width": 64, "height": 64, **ZOO[name].options}
    picture = Image.open(home / "data" / "0.png")
    drawn = run.model().generate([PROMPT], reference=picture, **options)[0]
    again = load(folders(name))
    plain = again.generate([PROMPT], **options)[0]
    assert (np.asarray(drawn) != np.asarray(plain)).any()


def test_other_programs_are_refused_control_modules(folders, home):  # noqa: F811
    run = home / "runs" / "controlnet-stable-diffusion-1.5"
    if not run.is_dir():
        trained(home, folders("stable-diffusion-1.5"), "controlnet", "stable-diffusion-1.5")
    with pytest.raises(Refused, match="kohya takes no control modules"):
        export(run, "kohya", home / "no")
