"""Pictures are drawn in the shapes their captions were learned in."""

import torch
from PIL import Image

from sfumato.workflow.draw_sizes import draw_in_sizes, squeeze_to_square


class Drawer:
    """Draws nothing but its own size; counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def generate(self, prompts, seed, width, height, watch):
        self.calls += 1
        watch(5 * len(prompts), 5 * len(prompts))
        return [Image.new("RGB", (width or 8, height or 8), (one, 0, 0)) for one in seed]


def test_each_prompt_is_drawn_at_its_size_with_its_seed_in_its_place():
    sizes = [(16, 8), None, (8, 16), (16, 8)]
    drawer, heard = Drawer(), []
    drawn = draw_in_sizes(drawer, list("abcd"), [1, 2, 3, 4], sizes, lambda *told: heard.append(told))
    assert [picture.size for picture in drawn] == [(16, 8), (8, 8), (8, 16), (16, 8)]
    assert [picture.getpixel((0, 0))[0] for picture in drawn] == [1, 2, 3, 4]
    assert drawer.calls == 3 and heard == [(10, 20), (15, 20), (20, 20)]


def test_a_square_picture_is_compared_as_it_is_and_a_wide_one_squeezed():
    even = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    assert squeeze_to_square(even, 8) is even
    wide = torch.zeros(3, 8, 16, dtype=torch.uint8)
    wide[:, :, 8:] = 200
    assert squeeze_to_square(wide, 8).shape == (3, 8, 8)
    assert squeeze_to_square(wide, 8)[0, 0, 0] == 0 and squeeze_to_square(wide, 8)[0, 0, -1] == 200
