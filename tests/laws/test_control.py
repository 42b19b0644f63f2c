"""Laws of control modules: new ones change nothing, trained ones act, and all come back from disk."""

import base64
import json

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.data import condition_images
from sfumato.data.sources import guided_shapes, shape_reader, shapes
from sfumato.data.sources.sample import HELD_OUT
from sfumato.errors import Refused
from sfumato.generation import Pipeline, load
from sfumato.models import Condition, new_theory
from sfumato.models.codecs.image import PixelCodec, ResidualCodec
from sfumato.models.control import ControlPlan, add_control_modules, attach
from sfumato.models.networks import blocks
from sfumato.models.networks.dit import DiT
from sfumato.models.networks.unet import UNet
from sfumato.models.text.encoder import NoConditioner
from sfumato.recipe import Recipe
from sfumato.run_folder import RunFolder
from sfumato.workflow.planning.plan import plan

KINDS = {"controlnet": "control", "ip-adapter": "reference", "edit": "edit_source", "control": "control"}


def square(size: int = 16) -> Image.Image:
    """A white square on black."""
    picture = Image.new("RGB", (size, size), "black")
    picture.paste((255, 255, 255), (3, 3, size - 5, size - 5))
    return picture


@pytest.fixture
def model() -> Pipeline:
    """A tiny unconditional DiT on pixels, none of its weights zero."""
    torch.manual_seed(0)
    dit = DiT(3, width=32, depth=2, heads=2, patch=2, text_width=0)
    for weight in dit.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return Pipeline(new_theory(""), PixelCodec(), NoConditioner(), dit, {"resolution": 16, "steps": 4})


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_guide_leaves_its_base_as_it_is(kind, model, tmp_path):
    """Law: bit for bit before training; afterwards the picture acts; saved, the guide returns."""
    x, t = torch.randn(2, 3, 16, 16), 0.5
    before = model.predict(x, t, Condition({}, size=2))
    guided = add_control_modules(model, [ControlPlan(kind)])
    encoder = guided.encoders(model)[KINDS[kind]]
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    shown = Condition({KINDS[kind]: encoder.encode(pictures)})
    assert torch.equal(model.predict(x, t, shown), before)
    assert guided.trained_weights() and all(
        weight.requires_grad for weight in guided.trained_weights().values()
    )
    with torch.no_grad():
        for weight in guided.guides.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    after = model.predict(x, t, shown)
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(model.predict(x, t, Condition({}, size=2)), before)
    silent = Condition({**shown, f"{KINDS[kind]}_weight": torch.zeros(2)})
    assert torch.equal(model.predict(x, t, silent), before)
    model.info["theory"] = "flow-matching"
    model.save(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").predict(x, t, shown), after)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_are_computed_again_give_the_same_gradients(kind):
    """Law: what a guide hooks into a block acts again when the block is computed again."""

    def gradients(every: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        dit = DiT(3, width=32, depth=3, heads=2, patch=2, canvas=2, text_width=8)
        painter = Pipeline(new_theory(""), PixelCodec(), NoConditioner(), dit, {"resolution": 16, "steps": 4})
        guided = add_control_modules(painter, [ControlPlan(kind)])
        for weight in guided.parameters():
            weight.data.normal_(0, 0.1)
        blocks.recompute(dit, every)
        text = {"tokens": torch.randn(2, 3, 8), "pooled": torch.randn(2, 8)}
        shown = guided.encoders(painter)[KINDS[kind]].encode(torch.rand(2, 3, 16, 16) * 2 - 1)
        out = guided(torch.randn(2, 3, 16, 16), torch.rand(2), Condition({**text, KINDS[kind]: shown}))
        out.square().sum().backward()
        return {name: one.grad for name, one in guided.named_parameters() if one.grad is not None}

    once, again = gradients(0), gradients(1)
    assert len(once) > 10 and once.keys() == again.keys()
    assert any(name.startswith("guides") and float(one.abs().max()) for name, one in once.items())
    for name, one in once.items():
        torch.testing.assert_close(again[name], one)


def test_a_unet_reads_a_control_itself():
    """Law: of our own networks the UNet too."""
    torch.manual_seed(0)
    unet = UNet(3, width=16, depth=1, heads=2, text_width=0)
    painter = Pipeline(new_theory(""), PixelCodec(), NoConditioner(), unet, {"resolution": 16, "steps": 2})
    guided = add_control_modules(painter, [ControlPlan("control")])
    assert any(name.startswith("base.") for name in guided.trained_weights())
    torch.nn.init.normal_(guided.control_modules[0].read[-1].weight)
    once, other = (painter.generate(control=one, seed=3)[0].tobytes() for one in (square(), square(12)))
    assert once != other


def test_a_unet_of_our_own_takes_a_controlnet_whatever_its_latents_stand_for():
    """Law: diffusers' ControlNet sees its picture in as many pixels a latent as the codec has."""
    torch.manual_seed(0)
    for codec in (PixelCodec(), ResidualCodec(4, 3, 8)):
        unet = UNet(3, width=16, depth=1, heads=2, text_width=0)
        info = {"resolution": 16, "steps": 2}
        painter = Pipeline(new_theory(""), codec, NoConditioner(), unet, info)
        before = painter.generate(seed=3)[0].tobytes()
        guided = add_control_modules(painter, [ControlPlan("controlnet")])
        assert painter.generate(control=square(), seed=3)[0].tobytes() == before
        for weight in guided.guides.parameters():
            weight.data.normal_(0, 0.1)
        assert painter.generate(control=square(), seed=3)[0].tobytes() != before


def test_two_controlnets_act_apart(model):
    """Law: each has its picture and weight."""
    guided = add_control_modules(model, [ControlPlan("controlnet"), ControlPlan("controlnet")])
    with torch.no_grad():
        for weight in guided.guides.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    one, other, none = (
        np.asarray(model.generate(control=pictures)[0])
        for pictures in ([square(), None], [None, square()], [None, None])
    )
    assert (one != none).any() and (other != none).any() and (one != other).any()
    with pytest.raises(Refused, match="2 ControlNets"):
        model.generate(control=square())


def test_a_runs_guide_joins_another_beside_the_same_base(model, tmp_path):
    """Law: added, it acts as where it was trained; beside another base it is refused."""
    model.info["theory"] = "flow-matching"
    model.save(tmp_path / "base")
    for number, kind in enumerate(("controlnet", "controlnet", "control")):
        own = load(tmp_path / "base")
        guided = add_control_modules(own, [ControlPlan(kind)])
        torch.manual_seed(number)
        for weight in guided.guides.parameters():
            weight.data.normal_(0, 0.1)
        own.save(tmp_path / str(number))
    once = load(tmp_path / "1").generate(control=square(), seed=3)[0].tobytes()
    both = load(tmp_path / "0")
    attach(both, tmp_path / "1")
    assert both.generate(control=[None, square()], seed=3)[0].tobytes() == once
    assert both.generate(control=[square(), square()], seed=3)[0].tobytes() != once
    with pytest.raises(Refused, match="its base learned along"):
        attach(load(tmp_path / "base"), tmp_path / "2")
    torch.nn.init.normal_(model.denoiser.enter.weight)
    with pytest.raises(Refused, match="another base"):
        attach(model, tmp_path / "1")


def test_several_references_are_looked_at_together(model):
    """Law: two references are neither of them alone; a window of steps lets them act only there."""
    guided = add_control_modules(model, [ControlPlan("ip-adapter")])
    with torch.no_grad():
        for weight in guided.guides.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    one, other = square(), square(12).resize((16, 16))

    def drawn(**said: object) -> bytes:
        return model.generate(**said)[0].tobytes()

    assert drawn(reference=[[one]]) == drawn(reference=one) != drawn(reference=[[one, other]])
    assert drawn(reference=[[one, one]]) == drawn(reference=[[one, one]], reference_end=1.0)
    early = drawn(reference=one, reference_end=0.5)
    assert early not in (drawn(reference=one), drawn())
    with pytest.raises(Refused, match=r"reference acts from 0\.8 to 0\.2"):
        drawn(reference=one, reference_start=0.8, reference_end=0.2)
    with pytest.raises(Refused, match="equally many references"):
        model.generate(seed=[0, 1], reference=[[one], [one, other]])
    with pytest.raises(Refused, match="reference_start acts on a picture"):
        drawn(reference_start=0.5)


def test_what_is_kept_of_a_picture_stays_pixel_for_pixel(model):
    """Law: inpainting changes what the mask shows white, and nothing else."""
    start, mask = square(), Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    drawn = np.asarray(model.generate(init=start, mask=mask, seed=3)[0])
    assert np.array_equal(drawn[:, 8:], np.asarray(start)[:, 8:])
    assert not np.array_equal(drawn[:, :8], np.asarray(start)[:, :8])
    assert model.generate(init=start, mask=mask.resize((32, 32)), seed=3)[0].size == (16, 16)
    with pytest.raises(Refused, match="The mask is 16×8, but the picture to start from is 16×16"):
        model.generate(init=start, mask=mask.resize((16, 8)))


def test_little_strength_stays_near_the_picture(model):
    """Law: the less strength, the nearer to the picture one starts from."""

    def far(strength: float) -> float:
        drawn = np.asarray(model.generate(init=square(), strength=strength, steps=20)[0], float)
        return float(np.abs(drawn - np.asarray(square(), float)).mean())

    assert far(0.1) < far(0.5) < far(1.0)
    whole = {"steps": 4, "seed": 2, "times": "cosine"}
    (all_of_it,), (unseen,) = model.generate(init=square(), strength=1.0, **whole), model.generate(**whole)
    assert all_of_it.tobytes() == unseen.tobytes()
    with pytest.raises(Refused, match="strength"):
        model.generate(init=square(), strength=1.5)


@pytest.mark.parametrize("word", ["control", "reference", "mask", "strength"])
def test_what_a_model_cannot_be_shown_is_refused(word, model):
    with pytest.raises(Refused, match=word):
        model.generate(**{word: 0.5 if word == "strength" else square()})


@pytest.mark.parametrize("kind", condition_images.KINDS)
def test_a_control_is_white_where_the_picture_has_edges(kind):
    """Law: black says nothing; a square's outline is drawn, its inside is not."""
    pytest.importorskip("skimage")
    pixels = torch.full((1, 3, 64, 64), -1.0)
    pixels[:, :, 16:48, 16:48] = 1
    drawn = condition_images.control_image(pixels, kind)[0, 0]
    assert drawn[28:36, 28:36].max() < -0.9 and drawn[:8].max() < -0.9
    assert drawn[24:40, 13:19].max() > 0.5


def test_held_out_things_are_never_trained_on():
    """Law: what is judged are shapes in colors that no training picture shows."""
    whole = guided_shapes.edit(count=60, held_out=20, size=32)
    asked = {sample.captions[0] for sample in whole.with_split(HELD_OUT)}
    assert asked and all(caption.startswith("make it ") for caption in asked)
    assert not set(guided_shapes.UNSEEN) & set(guided_shapes.SEEN)


def test_a_reference_says_what_the_words_leave_out():
    """Law: no caption beside a reference names its color; unseen shapes in colors are never trained on."""
    beside = guided_shapes.reference(count=60, held_out=20, size=32)
    for sample in beside.samples:
        draw = sample.companions["reference"]
        assert callable(draw) and not set(shapes.COLORS) & set(sample.captions[0].split())
        (target,), (other,) = shape_reader.read(sample.source()), shape_reader.read(draw())
        assert target.color == other.color and target.shape in sample.captions[0].split()
        pairs = guided_shapes.UNSEEN if sample.split == HELD_OUT else guided_shapes.SEEN
        assert (target.shape, target.color) in pairs
    said = {
        caption for sample in guided_shapes.lone(count=60, size=32).samples for caption in sample.captions
    }
    assert any(set(shapes.COLORS) & set(caption.split()) for caption in said)
    assert any(not set(shapes.COLORS) & set(caption.split()) for caption in said)


RECIPE = """output = "{name}"
[model]
{model}
[data]
train = "{data}"
resolution = 16
cache_dir = "store"
{more}
[train]
steps = 2
batch = 4
device = "cpu"
validate_every = 0
[sample]
every = 2
steps = 2
"""
SMALL = "width=32\ndepth=1\nheads=2\npatch=2\nstride=4\nlatent_channels=4\ncodec_width=8"
SMALL += "\ncodec_steps=2\ncodec_batch=4"


def test_an_edit_is_trained_from_a_recipe_and_drawn(tmp_path, monkeypatch):
    """Law: the whole way: sources stored, trained, drawn while training, loaded, and shown a picture."""
    monkeypatch.setattr(guided_shapes.edit, "__defaults__", (12, 0, 64, 4))
    file = tmp_path / "edit.toml"
    model = f'train = "edit"\ntext_encoder = "none"\n{SMALL}'
    file.write_text(RECIPE.format(name="edit", model=model, data="shapes-edit", more=""))
    run = sfumato.train(file)
    drawn = run.model().generate(image=square())
    assert drawn[0].size == (16, 16)
    described = json.loads((tmp_path / "edit" / "model" / "guides.json").read_text())
    assert described["guides"][0]["kind"] == "edit"
    assert list((tmp_path / "edit" / "samples").iterdir())


def test_a_model_from_scratch_reads_a_control_itself(tmp_path, monkeypatch):
    """Law: the whole way: edges made, stored, trained along, shown beside what is drawn, loaded."""
    monkeypatch.setattr(guided_shapes.edit, "__defaults__", (12, 0, 64, 4))
    file = tmp_path / "edges.toml"
    model = f'train = "full"\ntext_encoder = "none"\n{SMALL}'
    more = 'control_image = "canny"\nflip = true\ncondition_dropout = ["control=0.1"]'
    file.write_text(RECIPE.format(name="edges", model=model, data="shapes-edit", more=more))
    run = sfumato.train(file)
    assert run.model().info["guides"][0]["control"] == "canny"
    assert run.model().generate(control=square())[0].size == (16, 16)
    drawn = [event for event in RunFolder.open(run.path).events() if event["kind"] == "pictures"][-1]
    shown = [run.path / name for name in drawn["shown"]["control"]]
    assert len(shown) == len(drawn["files"]) and all(one.is_file() for one in shown)
    page = (run.path / "report.html").read_text()
    assert "control → drawn" in page and base64.b64encode(shown[0].read_bytes()).decode() in page


def test_a_guide_needs_a_base_and_its_own_keys(tmp_path):
    """Law: keys that could not act are refused."""
    file = tmp_path / "control.toml"
    for model, more, said in (
        ('train = "controlnet"', "", "model.base"),
        ('base = "runs/base"\ntrain = "lora"', 'control_image = "canny"', "data.control_image belongs to"),
        ('train = "full"', 'control_image = "cany"', 'Did you mean "canny"'),
    ):
        file.write_text(RECIPE.format(name="control", model=model, data="shapes", more=more))
        with pytest.raises(Refused, match=said):
            sfumato.train(file)


def test_a_plan_counts_what_a_guide_costs(tmp_path):
    """Law: memory and trained weights of the plan are those of base and guide together."""
    chance = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(chance.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / f"{index}.png")
    file = tmp_path / "base.toml"
    small = 'text_encoder = "none"\ncodec = "pixels"\nwidth = 32\ndepth = 2\nheads = 2\npatch = 4'
    file.write_text(RECIPE.format(name="base", model=small, data=".", more='captions = "none"'))
    run = sfumato.train(file)
    beside = tmp_path / "guide.toml"
    model = f'base = "{run.path}"\ntrain = "controlnet"'
    more = 'captions = "none"\ncontrol_image = "sketch"'
    beside.write_text(RECIPE.format(name="guide", model=model, data=".", more=more))
    with pytest.raises(Refused, match="control_layers = 9, but the base has 2 blocks"):
        sfumato.train(beside, ["model.control_layers=9"])
    assert sfumato.train(beside).step == 2, "what was refused before anything was made can be mended"
    base, guide_too = plan(Recipe.read(file)), plan(Recipe.read(beside))
    learned = sfumato.train(beside).model().denoiser.trained_weights()
    assert guide_too["trained_parameters"] == sum(one.numel() for one in learned.values())
    assert guide_too["parameters"] == base["parameters"] + guide_too["trained_parameters"]
    assert guide_too["memory"]["weights"] >= base["memory"]["weights"]
