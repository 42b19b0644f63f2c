"""Stages that users wrote under the member names of 0.1 serve as before."""

import pytest
import torch
from torch import nn

from sfumato.models.interface import RENAMED_MEMBERS, Conditioner, Denoiser, TrainableCodec

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
