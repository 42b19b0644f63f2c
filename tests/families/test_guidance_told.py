"""Laws of what a distilled network is told of guidance while it learns."""

import pytest

import sfumato
from sfumato.errors import Refused
from sfumato.models.pretrained.families.flux import Flux

from .test_training import losses, write_recipe

QUICK = ("train.steps=1", "train.sanity=false", "train.validate_every=0")


def test_a_network_that_hears_its_guidance_is_told_what_the_recipe_says(tmp_path, monkeypatch):
    """Law: by default its pipeline's own number, to the bit; pictures are drawn with theirs as before."""
    recipe = write_recipe("flux-dev", tmp_path, 'train = "lora"', "rank = 2")
    heard, ask = [], Flux.guidance_values

    def listened(self, x, condition):
        found = ask(self, x, condition)
        heard.extend(found.tolist())
        return found

    monkeypatch.setattr(Flux, "guidance_values", listened)
    found = {}
    for told in (0, 3.5, 1):
        heard.clear()
        run = sfumato.train(recipe, [f"output={tmp_path}/{told}", f"train.guidance_told={told}", *QUICK])
        found[told] = losses(run.path)
        assert set(heard) == {told or 3.5, 3.5}
    assert found[0] == found[3.5] != found[1]


def test_a_network_that_hears_none_is_not_told(tmp_path):
    recipe = write_recipe("pixart-sigma", tmp_path, 'train = "lora"', "rank = 2")
    with pytest.raises(Refused, match="does not hear its guidance"):
        sfumato.train(recipe, ["train.guidance_told=1", *QUICK])
