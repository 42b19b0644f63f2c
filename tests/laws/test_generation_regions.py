"""Laws of regions: in parts of a picture other prompts are drawn."""

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import Refused
from sfumato.generation import Pipeline
from sfumato.models import Condition, Denoiser
from sfumato.models.codecs.image import PixelCodec
from sfumato.models.text.labels import LabelConditioner
from sfumato.theory import get

COLORS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [0, 0, 0]])


class Flat(Denoiser):
    """Believes every picture to be all of its class's color; told the exact flow-matching answer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def config(self) -> dict[str, object]:
        return {}

    def forward(self, x: torch.Tensor, clock: torch.Tensor, condition: Condition) -> torch.Tensor:
        t = (clock / 1000).view(-1, 1, 1, 1)
        x_0 = COLORS[condition["labels"]].to(x)[:, :, None, None]
        return (x - x_0) / t


@pytest.fixture
def model():
    names = LabelConditioner({"red": 0, "green": 1, "blue": 2}, 3)
    return Pipeline(get("flow-matching"), PixelCodec(), names, Flat(), {"resolution": 16})


def half(left: bool) -> Image.Image:
    """White on one side."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255
    return Image.fromarray(pixels if left else pixels[:, ::-1].copy())


def colors(picture: Image.Image) -> list[int]:
    """Which color is strongest on the left and on the right."""
    pixels = np.asarray(picture).astype(float)
    return [int(pixels[:, part].mean((0, 1)).argmax()) for part in (slice(0, 8), slice(8, 16))]


def test_every_region_is_drawn_by_its_own_prompt(model):
    drawn = model.generate(["red"], regions=[(half(True), "green")], steps=4, guidance=2.0)[0]
    assert colors(drawn) == [1, 0]
    both = [(half(True), "green"), (half(False), "blue")]
    assert colors(model.generate(["red"], regions=both, steps=4)[0]) == [1, 2]


def test_a_region_of_the_same_prompt_changes_nothing(model):
    plain = model.generate(["red", "blue"], steps=4, guidance=1.0)
    other = model.generate(["red", "blue"], regions=[(half(True), "red")], steps=4, guidance=1.0)
    torch.testing.assert_close(
        torch.tensor(np.asarray(plain[0])), torch.tensor(np.asarray(other[0])), atol=1, rtol=0
    )
    assert colors(other[1]) == [0, 2]


def test_masks_that_overlap_share_and_black_ones_are_refused(model):
    whole = Image.new("RGB", (16, 16), "white")
    pixels = np.asarray(model.generate(["red"], regions=[(whole, "green"), (whole, "blue")], steps=4)[0])
    assert np.abs(pixels[..., 1].astype(int) - pixels[..., 2]).max() < 20 and pixels[..., 0].max() < 20
    with pytest.raises(Refused, match='"green" is black all over'):
        model.generate(["red"], regions=[(Image.new("RGB", (4, 4)), "green")])
    with pytest.raises(Refused, match="pairs of a mask and a prompt"):
        model.generate(["red"], regions=["left.png"])
