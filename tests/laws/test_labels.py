"""Laws of models of classes: a label guides as a caption does, without a text encoder."""

import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.errors import Refused
from sfumato.models import Condition
from sfumato.models.networks.dit import DiT
from sfumato.models.networks.unet import UNet
from sfumato.models.text.labels import LabelConditioner
from sfumato.recipe import Recipe

NETWORKS = {
    "dit": lambda: DiT(3, width=16, depth=1, heads=2, patch=2, canvas=2, text_width=0, classes=3),
    "unet": lambda: UNet(3, width=16, depth=1, heads=2, text_width=0, classes=3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_class_is_answered_in_its_own_way(name):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for weight in network.parameters():
        weight.data.normal_(0, 0.3)
    x, clock = torch.randn(1, 3, 8, 8).expand(4, -1, -1, -1), torch.full((4,), 500.0)
    answers = network(x, clock, Condition({"labels": torch.arange(4)})).detach()
    assert all((answers[i] - answers[j]).abs().max() > 1e-3 for i in range(4) for j in range(i))
    again = type(network)(**network.config())
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(again(x, clock, Condition({"labels": torch.arange(4)})), answers)


def test_a_class_is_its_name_before_it_is_a_number():
    """Law: folders called 10, 2, … keep their names; a number that is no name is an index."""
    conditioner = LabelConditioner({"10": 0, "2": 1, "apple": 2}, 3)
    assert conditioner(["10", "2", "Apple", "1", ""])["labels"].tolist() == [0, 1, 2, 1, 3]
    assert conditioner([""] * 2, labels=[2, 0])["labels"].tolist() == [2, 0]
    with pytest.raises(Refused, match=r'"aple" is no class of this model\. Did you mean "?apple'):
        conditioner(["aple"])
    with pytest.raises(Refused, match="Class 7 does not exist"):
        conditioner(["7"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of three classes, trained a little on folders of pictures."""
    home = tmp_path_factory.mktemp("classes")
    chance = np.random.default_rng(0)
    for name, color in (("red", (250, 10, 10)), ("deep_blue", (10, 10, 250)), ("green", (10, 250, 10))):
        (home / "data" / name).mkdir(parents=True)
        for index in range(8):
            pixels = np.full((8, 8, 3), color, np.uint8) - chance.integers(0, 9, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(home / "data" / name / f"{index}.png")
    (home / "r.toml").write_text(
        f"""
        output = "run"
        [model]
        text_encoder = "labels"
        codec = "pixels"
        width = 32
        depth = 1
        heads = 2
        patch = 4
        [data]
        train = "data"
        captions = "folder"
        resolution = 8
        cache_dir = "{home / "store"}"
        [train]
        steps = 120
        batch = 8
        learning_rate = 5e-3
        ema = 0.9
        sanity = false
        validate_every = 0
        [sample]
        every = 1000
        """
    )
    return sfumato.train(home / "r.toml")


def test_a_model_of_classes_draws_them_by_name_and_by_number(run):
    """Law: train → load → generate with labels; the color of each class is the one that was asked for."""
    model = run.model()
    assert model.conditioner.kind == "labels" and not model.conditioner.state_dict()
    drawn = model.generate(["deep blue", "green", "red"], seed=3, steps=8, guidance=2.0)
    assert [int(np.asarray(one).mean((0, 1)).argmax()) for one in drawn] == [2, 1, 0]
    numbered = model.generate(labels=[0, 1, 2], seed=3, steps=8, guidance=2.0)
    assert [one.tobytes() for one in numbered] == [one.tobytes() for one in drawn]


def test_samples_without_a_class_are_refused(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text("a caption")
    recipe = Recipe.read(run.path, [f"data.train={tmp_path}", "data.captions=files", f"output={tmp_path}/r"])
    with pytest.raises(Refused, match=r'one\.png has no class, but model.text_encoder is "labels"'):
        sfumato.encode(recipe)
