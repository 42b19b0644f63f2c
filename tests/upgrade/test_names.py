"""What users wrote under the names of 0.1 serves as before: stages' members, arguments, info of models."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sfumato.generation.guidance import GuidanceOptions
from sfumato.models.interface import RENAMED_MEMBERS, Conditioner, Denoiser, TrainableCodec
from sfumato.models.io.model import restore_info

INTERFACES = (TrainableCodec, Conditioner, Denoiser)


def interface_of(member: str) -> type:
    return next(one for one in INTERFACES if hasattr(one, RENAMED_MEMBERS[member]))


@pytest.mark.parametrize("old", RENAMED_MEMBERS)
def test_an_old_member_name_stands_for_a_member_there_is(old):
    assert interface_of(old)
    assert not any(hasattr(one, old) for one in INTERFACES)


@pytest.mark.parametrize("old", RENAMED_MEMBERS)
def test_a_member_defined_under_its_old_name_is_read_by_its_new_one(old):
    theirs = type("Theirs", (interface_of(old),), {old: "theirs"})
    assert getattr(theirs, RENAMED_MEMBERS[old]) == "theirs"


def test_a_value_set_under_its_old_name_is_read_by_its_new_one():
    class Net(Denoiser):
        kind = "theirs"

        def __init__(self):
            super().__init__()
            self.grain, self.null = 4, nn.Parameter(torch.zeros(2))

        def config(self):
            return {}

        def forward(self, x, clock, condition):
            return x

    net = Net()
    assert net.latent_multiple == net.grain == 4
    assert list(net.state_dict()) == ["null"], "a weight of such a name is no member"


def test_what_a_model_remembered_of_guidance_under_its_old_names_still_guides():
    model = restore_info(
        SimpleNamespace(conditioner=None), {"leaning": {"form": "apg", "perturbed": 1.0, "by": "runs/weak"}}
    )
    read = GuidanceOptions.pop_from({}, model.info["guidance_options"])
    assert read == GuidanceOptions("apg", pag_scale=1.0, autoguidance_model="runs/weak")


def test_the_old_arguments_of_guidance_are_read_and_the_new_ones_go_before_them():
    options = {"guidance_perturbed": 2.0, "guidance_by": "runs/weak", "pag_scale": 3.0}
    read = GuidanceOptions.pop_from(options)
    assert (read.pag_scale, read.autoguidance_model, options) == (3.0, "runs/weak", {})
