"""Order is a function of the step: every sample once an epoch, batches of one bucket, no state."""

from collections import Counter
from itertools import product

import pytest

from sfumato.data.buckets import candidates, choose, crop_waste, token_budget
from sfumato.data.encoding.batch_sampler import BatchSampler, Curriculum, CurriculumStage, rank_slice
from sfumato.errors import Refused
from sfumato.readers import media

BUCKETS = {
    "one": [(4, 8, 8)] * 50,
    "several": [(4, 8, 8)] * 41 + [(4, 6, 10)] * 17 + [(4, 10, 6)] * 3,
    "tiny": [(4, 8, 8)] * 3,
}


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("name", BUCKETS)
def test_every_sample_is_seen_equally_often(name, batch):
    buckets = BUCKETS[name]
    order = BatchSampler(buckets, batch, seed=3)
    seen = Counter()
    for step in range(order.steps_before(batch)):
        indices, _ = order.at(step)
        assert len(indices) == batch
        assert len({buckets[index] for index in indices}) == 1
        seen.update(indices)
    assert set(seen.values()) == {batch}  # after `batch` epochs nothing is left over


@pytest.mark.parametrize("name", BUCKETS)
def test_a_step_is_the_same_whoever_asks_and_in_whatever_order(name):
    forward = [BatchSampler(BUCKETS[name], 4, seed=1).at(step) for step in range(60)]
    order = BatchSampler(BUCKETS[name], 4, seed=1)
    assert [order.at(step) for step in reversed(range(60))] == forward[::-1]
    assert [BatchSampler(BUCKETS[name], 4, seed=2).at(step) for step in range(60)] != forward


def test_epochs_never_fall_and_differ_in_order():
    order = BatchSampler(BUCKETS["several"], 4, seed=0)
    epochs = [order.at(step)[1] for step in range(100)]
    assert epochs == sorted(epochs) and epochs[0] == 0
    first = [order.at(step)[0] for step in range(order.steps_before(1))]
    second = [order.at(step)[0] for step in range(order.steps_before(1), order.steps_before(2))]
    assert first != second


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_same_global_batch(world):
    indices, _ = BatchSampler(BUCKETS["one"], 8, seed=0).at(5)
    assert [index for rank in range(world) for index in rank_slice(indices, rank, world)] == indices


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(Refused, match="multiple of 3"):
        rank_slice(list(range(8)), 0, 3)


def test_repeats_are_seen_so_much_more_often():
    order = BatchSampler([(1,)] * 4, 4, seed=0, repeats=[1, 1, 1, 5])
    seen = Counter(index for step in range(order.steps_before(1)) for index in order.at(step)[0])
    assert seen == {0: 1, 1: 1, 2: 1, 3: 5}


def test_nothing_to_train_on_is_refused():
    with pytest.raises(Refused, match="no sample"):
        BatchSampler([], 4, 0)


SIZES = [(100 + 13 * i % 90, 80 + 29 * i % 120) for i in range(200)]


@pytest.mark.parametrize("stride", [8, 16])
def test_more_buckets_cut_less_and_all_fit_the_stride(stride):
    wastes = [choose(SIZES, 128, stride, count).waste(SIZES) for count in range(1, 7)]
    assert wastes == sorted(wastes, reverse=True)
    for width, height in choose(SIZES, 128, stride, 6).shapes:
        assert width % stride == height % stride == 0
        assert abs(width * height / 128**2 - 1) < 0.2


def test_the_choice_is_the_best_there_is():
    from itertools import combinations

    shapes = candidates(64, 16)
    best = min(
        sum(min(crop_waste(size, shape) for shape in some) for size in SIZES)
        for some in combinations(shapes, 2)
    )
    chosen = choose(SIZES, 64, 16, 2)
    assert sum(crop_waste(size, chosen(size)) for size in SIZES) <= best * 1.01


def test_a_resolution_off_the_stride_is_refused_with_the_nearest():
    with pytest.raises(Refused, match=r"data.resolution = 96"):
        choose(SIZES, 100, 16, 1)


def test_a_token_budget_makes_batches_cost_alike():
    shapes = [(4, 8, 8)] * 10 + [(4, 16, 16)] * 10
    order = BatchSampler(shapes, token_budget(16, shapes), seed=0)
    costs = {len(order.at(step)[0]) * shapes[order.at(step)[0][0]][1] ** 2 for step in range(20)}
    assert max(costs) <= 1.1 * min(costs)


def test_a_weight_that_is_not_whole_is_exact_over_epochs():
    order = BatchSampler(["a"] * 10, 5, seed=1, repeats=[1.0] * 4 + [2.5] * 6)
    assert order.steps_before(4) == 4 * (4 + 12 + 3) // 5
    seen = Counter(index for step in range(order.steps_before(20)) for index in order.at(step)[0])
    assert all(abs(seen[i] - 20) <= 1 for i in range(4)) and all(abs(seen[i] - 50) <= 1 for i in range(4, 10))


def test_a_curriculum_shows_each_stage_its_own_samples():
    first, last = BatchSampler(["s"] * 6, 3), BatchSampler(["l"] * 6, 2)
    course = Curriculum([CurriculumStage(first, 4, 0), CurriculumStage(last, None, 6)])
    assert [course.at(step)[0] for step in range(4)] == [first.at(step)[0] for step in range(4)]
    assert course.at(7) == ([index + 6 for index in last.at(3)[0]], last.at(3)[1])


def test_a_token_budget_gives_shares_that_are_even():
    size = token_budget(16, [(4, 8, 8)] * 3 + [(4, 16, 16)], multiple=4)
    assert size((4, 8, 8)) % 4 == size((4, 16, 16)) % 4 == 0 and size((4, 8, 8)) > size((4, 16, 16)) >= 4


@pytest.mark.parametrize("shape", [(40, 96), (56, 72), (48, 88), (120, 32)])
def test_a_picture_of_nearly_the_shape_of_its_bucket_is_not_looked_at_past_its_sides(shape):
    """Of its very shape it is taken whole, however the numbers round."""
    for times in (1, 3, 7, 1 / 8, 5 / 8, 13 / 8):
        for width, height in product(
            *[[round(side * times) + more for more in (-1, 0, 1)] for side in shape]
        ):
            left, top, right, bottom = media.center_crop_box((width, height), *shape)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
