"""Numbers about pictures say what they claim to say."""

import math

import pytest
import torch

from sfumato.evaluation import Neighbors, is_right, kernel_distance, mean_with_error
from sfumato.evaluation.latent_kernel_distance import latent_features
from sfumato.evaluation.measure import proportion
from sfumato.theory import noise


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return noise.normal((3, 8, 8), seed, range(count), purpose="pictures").clamp(-1, 1)


def test_a_picture_is_its_own_nearest_neighbor_whatever_its_dtype():
    known = pictures(40)
    neighbors = Neighbors(known, [(f"thing {i}",) for i in range(40)])
    assert neighbors.nearest(known) == list(range(40))
    bytes_ = ((known + 1) * 127.5).round().to(torch.uint8)
    assert neighbors.nearest(bytes_) == list(range(40))


def test_a_prompt_and_a_picture_agree_by_caption_or_where_that_is_meant_by_last_word():
    assert is_right("red apple", ["green apple"], namesakes=True)
    assert not is_right("red apple", ["green apple"])
    assert is_right("Red Apple", ["red apple"])
    assert is_right("woman’s hat", ["hat", "woman’s sandal"], namesakes=True)
    assert not is_right("red apple", ["red heart"])
    assert not is_right("", ["red heart"])
    neighbors = Neighbors(pictures(3), [("a",), ("b",), ("c",)])
    assert neighbors.judge(pictures(3), ["a", "c", "c"]) == [True, False, True]
    assert not neighbors.can_tell


@pytest.mark.parametrize("end", ["", ", 3d toy"])
def test_noise_is_right_as_often_as_chance_says_whatever_the_captions_end_with(end):
    """Law: pictures that have nothing to do with their prompts are at chance, those learned by heart at 1."""
    texts = [(f"thing {index % 20}{end}", f"also {index}{end}") for index in range(60)]
    neighbors = Neighbors(pictures(60), texts)
    prompts = [text for text, _ in texts] * 20
    found = proportion(neighbors.judge(pictures(len(prompts), seed=1), prompts))
    assert neighbors.chance(prompts) == pytest.approx(3 / 60) and neighbors.can_tell
    assert found.error is not None and abs(found.value - 3 / 60) < 4 * found.error
    assert all(neighbors.judge(pictures(60), [text for text, _ in texts]))


def test_the_kernel_distance_of_equal_sets_is_zero_within_its_error():
    real = noise.normal((16,), 0, range(400), purpose="x")
    same = noise.normal((16,), 1, range(400), purpose="x")
    found = kernel_distance(real, same)
    assert found.error is not None and abs(found.value) < 4 * found.error + 5e-3


@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_the_kernel_distance_grows_with_the_difference(shift):
    real = noise.normal((16,), 0, range(200), purpose="x")
    other = noise.normal((16,), 1, range(200), purpose="x")
    near, far = kernel_distance(real, other + shift / 2), kernel_distance(real, other + shift)
    assert far.value > near.value > kernel_distance(real, other).value


def test_a_feature_that_hardly_varies_does_not_drown_the_others():
    real = noise.normal((16,), 0, range(200), purpose="x")
    real[:, 0] = 1e-9 * real[:, 0]
    drawn = noise.normal((16,), 1, range(200), purpose="x") * torch.tensor([0.01] + [1.0] * 15)
    assert abs(kernel_distance(real, drawn).value) < 0.1


def test_errors_shrink_with_the_root_of_repetitions():
    values = noise.normal((1,), 0, range(4000), purpose="x").flatten().tolist()
    few, many = mean_with_error(values[:400]), mean_with_error(values)
    assert few.error and many.error
    assert math.isclose(few.error / many.error, math.sqrt(10), rel_tol=0.15)
    assert mean_with_error([1.0]).error is None
    assert proportion([True] * 64).error and proportion([True] * 64).value == 1.0


def test_latent_features_have_one_length_whatever_the_size():
    assert latent_features(torch.zeros(2, 16, 8, 8)).shape == (2, 256)
    assert latent_features(torch.zeros(2, 16, 16, 8)).shape == (2, 256)
