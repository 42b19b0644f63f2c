"""Laws of the memorisation check: copies are found, new pictures are not."""

import pytest
import torch

from sfumato.evaluation import measure_memorization


def pictures(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.mark.parametrize("held_out", [None, pictures(60, 3)])
def test_copies_are_found_and_named_and_new_pictures_are_not(held_out):
    train = pictures(100, 1)
    copies = (train[[7, 70]].float() + 3).clamp(0, 255).byte()
    found = measure_memorization(torch.cat([pictures(18, 2), copies]), train, held_out)
    assert found.nearest[-2:] == [7, 70] and set(found.closest(2)) == {18, 19}
    assert 0.1 <= found.copied.value <= 0.3
    assert measure_memorization(pictures(40, 4), train, held_out).copied.value <= 0.15


def test_too_little_data_is_said():
    with pytest.raises(ValueError, match="three"):
        measure_memorization(pictures(2, 0), pictures(2, 1))
