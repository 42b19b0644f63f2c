"""Laws of many processes: they are one run, in exact mode bit for bit."""

import pytest
import torch
from safetensors.torch import load_file
from training_processes import run_on
from training_world import make

from closeness import APART, apart
from sfumato.errors import Refused
from sfumato.run_folder import RunFolder
from sfumato.training.distributed import gradient_buckets
from sfumato.training.distributed.processes import BatchSplit, Gradients, Processes
from sfumato.training.settings import TrainSettings

EXACT = {"exact_elastic": True, "batch": 6, "elastic_max_ranks": 4}


@pytest.mark.precisions("fp32", "bf16")
def test_exact_mode_ends_with_the_same_bits_on_1_2_and_4_processes(tmp_path):
    changes = {**EXACT, "steps": 4, "validate_every": 0}
    assert len({run_on(count, tmp_path / str(count), **changes) for count in (1, 2, 4)}) == 1


@pytest.mark.slow
@pytest.mark.precisions("fp32", "bf16")
def test_a_run_that_moves_between_numbers_of_processes_ends_with_the_same_bits(tmp_path):
    through = run_on(1, tmp_path / "through", **EXACT)
    for count, steps in ((1, 3), (4, 5), (2, 8), (1, 10), (4, 12)):
        moved = run_on(count, tmp_path / "moved", steps=steps, **EXACT)
    assert moved == through


@pytest.mark.precisions("fp32", "bf16", "fp16")
def test_fast_mode_equals_one_process_up_to_rounding(precision, tmp_path):
    run_on(1, tmp_path / "one", steps=3, gradient_accumulation=2, validate_every=0)
    run_on(2, tmp_path / "two", steps=3, validate_every=0)
    one, two = (
        load_file(RunFolder.open(tmp_path / name).checkpoint_folders()[-1] / "model.safetensors")
        for name in ("one", "two")
    )
    assert apart(two, one, make()[1].state_dict()) <= APART[precision]


def test_gradients_are_added_in_one_tree_whoever_holds_which_part():
    weight = torch.nn.Parameter(torch.zeros(1000))
    parts = (
        torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 8)[:, None]
    )
    gradients = Gradients([weight], Processes(), exact=True)
    for part in parts:
        weight.grad = part.clone()
        gradients.add(torch.ones(()))
    loss, _ = gradients.total(False)
    expected = list(parts)
    while len(expected) > 1:
        expected = [left + right for left, right in zip(expected[::2], expected[1::2], strict=True)]
    assert weight.grad is not None and torch.equal(weight.grad, expected[0])
    assert float(loss) == 8


def test_gradients_are_sent_while_the_rest_of_them_is_computed(monkeypatch):
    """Law: in order, the last layers' first, while the pass goes on; 0 for what the loss does not hear of."""
    network = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(6)))
    idle = torch.nn.Parameter(torch.ones(3))
    happened = []

    class Work:
        def __init__(self, tensor):
            self.tensor = tensor

        def wait(self):
            self.tensor *= 2  # two processes that have the same

    def all_reduce(tensor, async_op=False):
        happened.append(tensor.numel())
        return Work(tensor) if async_op else tensor.mul_(2)

    monkeypatch.setattr(gradient_buckets.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(gradient_buckets, "NUMBERS_OF_A_BUCKET", 32)
    weights = [idle, *network.parameters()]
    network[0].weight.register_hook(lambda gradient: happened.append("the first layer"))
    sums = gradient_buckets.gradients_of(weights, Processes(0, 2), exact=False)
    for _ in range(2):  # and again in the next step
        happened.clear()
        expected = [torch.zeros_like(one) for one in weights]
        for part in range(3):
            sums.begin(part == 2)
            loss = network(torch.randn(2, 4)).square().sum()
            for mine, own in zip(
                expected[1:], torch.autograd.grad(loss, weights[1:], retain_graph=True), strict=True
            ):
                mine += own
            happened.clear()
            loss.backward()
            sums.add(loss.detach())
            assert happened[:2] == ([32, 32] if part == 2 else ["the first layer"])
        _, stops = sums.total(True)
        assert happened == [32, 32, "the first layer", 32, 3, 2] and float(stops) == 2
        for weight, own in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.grad, 2 * own)
        sums.clear()


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_parts_do_not_depend_on_the_number_of_processes(count: int):
    settings = TrainSettings(exact_elastic=True, elastic_max_ranks=8, gradient_accumulation=3)
    divisions = [BatchSplit.of(settings, Processes(rank, count)) for rank in range(count)]
    assert {division.parts for division in divisions} == {8}
    assert [part for division in divisions for part in division.mine] == list(range(8))


def test_a_division_that_cannot_be_is_refused():
    with pytest.raises(Refused, match="power of two"):
        BatchSplit.of(TrainSettings(exact_elastic=True), Processes(0, 3))
    with pytest.raises(Refused, match=r"train\.batch"):
        BatchSplit.of(TrainSettings(batch=2, gradient_accumulation=2), Processes(0, 2))
