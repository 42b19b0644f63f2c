"""Laws of packed batches: samples of several shapes in one sequence are what they are apart."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from closeness import APART, apart
from sfumato.data.encoding.batch_sampler import BatchSampler, PackedSampler
from sfumato.errors import Refused
from sfumato.models import files
from sfumato.models.condition import Condition
from sfumato.models.interface import Denoiser, Model
from sfumato.models.networks import blocks
from sfumato.models.networks.dit import DiT
from sfumato.models.networks.packed_sequence import PackedSequence
from sfumato.run_folder import RunFolder
from sfumato.theory import get, noise
from sfumato.training.distributed.processes import current_processes, run_folder_of_rank
from sfumato.training.estimate import probe
from sfumato.training.estimate.memory import count_memory, saved_bytes
from sfumato.training.loop.loop import fit
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.objective.packed_batches import PackedObjective
from sfumato.training.settings import TrainSettings
from workers import run_processes

PICTURES = [(2, 4, 6), (2, 4, 6), (2, 6, 4), (2, 2, 8), (2, 4, 6), (2, 6, 4), (2, 4, 4)]
CLIPS = [(2, 3, 4, 4), (2, 1, 4, 6), (2, 2, 4, 4), (2, 3, 4, 4), (2, 1, 4, 6)]
WORLDS = {
    "pictures": (PICTURES, {}),
    "classes": (PICTURES, {"text_width": 0, "classes": 3}),
    "unconditional": (PICTURES, {"text_width": 0}),
    "clips": (CLIPS, {"frames": 3, "direct": True}),
    "factorised": (CLIPS, {"frames": 3, "attention": "factorised"}),
}


def network(**how: object) -> DiT:
    """Two blocks with weights that say something."""
    torch.manual_seed(0)
    found = DiT(2, **{"width": 16, "depth": 2, "heads": 2, "patch": 2, "text_width": 8, "canvas": 2} | how)
    for weight in found.parameters():
        nn.init.normal_(weight, std=0.2)
    return found


@dataclass
class Batch:
    ids: list[int]
    latents: Tensor
    conditions: list[dict[str, Tensor]]


class Encoded:
    """Samples of several shapes in memory, with captions of several lengths."""

    def __init__(self, shapes: list[tuple[int, ...]], said: str = "text") -> None:
        self.buckets, self.said = shapes, said
        self.ids = [100 + i for i in range(len(shapes))]
        self.names = [f"{one}.png" for one in self.ids]
        self.null = {"tokens": torch.zeros(1, 8), "pooled": torch.zeros(8)} if said == "text" else {}

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, index: int) -> dict[str, Tensor]:
        if self.said != "text":
            return {"labels": torch.tensor(index % 3)} if self.said == "classes" else {}
        words = noise.normal((4, 8), 5, [index], purpose="words")[0]
        return {"tokens": words[: 1 + index % 4], "pooled": words.mean(0)}

    def read(self, indices: list[int], seed: int, epoch: int) -> Batch:
        ids = [self.ids[i] for i in indices]
        assert len({self.buckets[i] for i in indices}) == 1
        latents = noise.normal(self.buckets[indices[0]], 5, ids, purpose="latents")
        return Batch(ids, latents, [self.row(i) for i in indices])


def objective(kind: str, packed: bool = True, **changes: object) -> DiffusionObjective:
    """A packed (or plain) objective on one of the worlds, in one batch of all samples."""
    shapes, how = WORLDS[kind]
    model = Model(get("flow-matching"), nn.Identity(), nn.Identity(), network(**how))
    said = {"classes": "classes", "unconditional": "none"}.get(kind, "text")
    settings = TrainSettings(batch=len(shapes), **changes)
    order = BatchSampler([0] * len(shapes), len(shapes), 1)
    make = PackedObjective if packed else DiffusionObjective
    return make(model, Encoded(shapes, said), order, settings, seed=3, caption_dropout=0.3)


def gradients(of: nn.Module) -> dict[str, Tensor]:
    found = {n: w.grad.clone() for n, w in of.named_parameters() if w.grad is not None}
    of.zero_grad()
    return found


def alone(kind: str, step: int, **changes: object) -> tuple[dict[int, Tensor], nn.Module]:
    """The losses of a step's samples, each computed by itself; their mean is differentiated."""
    plain, found = objective(kind, packed=False, **changes), {}
    indices, epoch = plain.order.at(step)
    told = plain.draw_times([plain.encoded.ids[index] for index in indices], step)
    for place, index in enumerate(indices):
        batch = plain.encoded.read([index], 3, epoch)
        drawn = plain.draw_noise(told.rows([place]), batch.ids, batch.latents, step)
        loss = plain.measure(batch.latents, drawn, plain.rows(batch))
        (loss.sum() / len(indices)).backward()
        found[batch.ids[0]] = loss.detach()[0]
    return found, plain.model.denoiser


@pytest.mark.parametrize("kind", WORLDS)
def test_a_packed_step_has_the_losses_and_gradients_of_its_samples_apart(kind):
    expected, network = alone(kind, 1)
    packed = objective(kind)
    losses = packed.losses(1, 0, 1)
    (losses.per_sample.sum() / losses.of).backward()
    torch.testing.assert_close(losses.per_sample, torch.stack([expected[i] for i in losses.ids]))
    wanted = gradients(network)
    for name, gradient in gradients(packed.model.denoiser).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()  # FlexAttention has no backward pass on CPUs
@pytest.mark.parametrize("kind", WORLDS)
def test_a_mask_of_documents_sees_what_shapes_apart_see(kind, monkeypatch):
    by_shape = objective(kind).losses(1, 0, 1).per_sample
    made = PackedSequence.__init__
    monkeypatch.setattr(PackedSequence, "__init__", lambda self, groups: made(self, groups, flex=True))
    torch.testing.assert_close(objective(kind).losses(1, 0, 1).per_sample, by_shape)


@pytest.mark.parametrize(
    "changes", [{"frame_timesteps": "independent"}, {"first_frame_share": 1.0}, {"weighting": "p2"}]
)
def test_frames_with_times_of_their_own_are_packed_too(changes):
    expected, _ = alone("clips", 2, **changes)
    losses = objective("clips", **changes).losses(2, 0, 1)
    torch.testing.assert_close(losses.per_sample, torch.stack([expected[i] for i in losses.ids]))


def test_the_parts_of_a_packed_batch_have_the_losses_of_the_whole():
    whole, divided = (objective("pictures") for _ in range(2))
    expected = whole.losses(0, 0, 1)
    known = dict(zip(expected.ids, expected.per_sample.tolist(), strict=True))
    found = [divided.losses(0, part, 3) for part in range(3)]
    assert sorted(one for some in found for one in some.ids) == sorted(known)
    for some in found:
        assert some.of == expected.of
        assert some.per_sample.tolist() == pytest.approx([known[one] for one in some.ids], rel=1e-5)
    assert divided.describe_part(0, 1, 3)["ids"] == list(found[1].ids)


def test_blocks_that_are_computed_again_and_another_theory_change_no_packed_gradient():
    plain, again = objective("pictures"), objective("pictures")
    assert blocks.recompute(again.model.denoiser, 1) == 2
    for one in (plain, again):
        one.model = one.model.with_theory(get("ddpm-velocity"))
        one.losses(0, 0, 1).per_sample.mean().backward()
    wanted = gradients(plain.model.denoiser)
    for name, gradient in gradients(again.model.denoiser).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6)


def train(folder: Path, steps: int, changes: dict[str, object]) -> None:
    """Go on with a packed run until so many steps."""
    one = objective("clips")
    settings = TrainSettings(steps=steps, batch=5, save_every=2, warmup_steps=1, ema=0.9, **changes)
    with current_processes().first():
        run = run_folder_of_rank(RunFolder.create(folder))
    fit(one, one.model.denoiser, settings, run, 3, say=lambda _: None)


def weights(folder: Path) -> Mapping[str, Tensor]:
    return files.read(RunFolder.open(folder).checkpoint_folders()[-1], "model")


@pytest.mark.precisions("fp32", "bf16")
def test_a_packed_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(tmp_path):
    train(tmp_path / "through", 5, {"gradient_accumulation": 2})
    for steps in (2, 3, 5):
        train(tmp_path / "stopped", steps, {"gradient_accumulation": 2})
    through, stopped = weights(tmp_path / "through"), weights(tmp_path / "stopped")
    assert all(torch.equal(through[name], stopped[name]) for name in through)


@pytest.mark.precisions("fp32", "bf16")  # in fp16 what overflows depends on the parts
@pytest.mark.parametrize("way", [{"exact_elastic": True}, {"parallel": "ddp"}, {"parallel": "fsdp"}])
def test_a_packed_run_of_two_processes_is_that_of_one(way, precision, tmp_path):
    """Bit for bit where that is asked, else up to rounding."""
    train(tmp_path / "one", 3, way)
    run_processes(2, train, tmp_path / "two", 3, way)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    if "exact_elastic" in way:
        assert all(torch.equal(two[name], weight) for name, weight in one.items())
    assert apart(two, one, objective("clips").model.denoiser.state_dict()) <= APART[precision]


def test_what_is_counted_for_a_packed_step_is_what_it_saves():
    dit = network()
    x = [torch.randn(2, 2, 4, 6), torch.randn(3, 2, 2, 4)]
    rows = [{"tokens": torch.randn(1 + i, 8), "pooled": torch.randn(8)} for i in range(3)]
    told = [Condition.stack(rows[: len(one)]) for one in x]
    inputs = (x, [torch.full((len(one),), 500.0) for one in x], told)
    counted = count_memory(dit, inputs)
    real = saved_bytes(lambda: dit(*inputs), dit)
    assert counted.kept == pytest.approx(real, rel=0.02)  # attention keeps a little less of its own
    assert probe.probe(dit, inputs, TrainSettings(batch=5)).seconds > 0


@pytest.mark.parametrize("repeats", [None, [1.5] * 40 + [1.0] * 57])
def test_batches_of_a_token_budget_show_every_sample_once_an_epoch_and_cost_alike(repeats):
    tokens = [int(16 + 48 * u) for u in noise.uniform(0, range(97))]
    order = PackedSampler(tokens, 12, seed=4, repeats=repeats)
    for epoch in range(2):
        steps = range(order.steps_before(epoch), order.steps_before(epoch + 1))
        batches = [order.at(step) for step in steps]
        assert {told for _, told in batches} == {epoch}
        shown = sorted(index for rows, _ in batches for index in rows)
        counts = [shown.count(index) for index in range(97)]
        assert counts == [1] * 97 if repeats is None else set(counts[:40]) == {1, 2}
        costs = [sum(tokens[index] for index in rows) for rows, _ in batches]
        assert max(costs) - min(costs) <= 2 * max(tokens)
        assert max(len(rows) for rows, _ in batches) <= order.largest
    assert order.at(3) == PackedSampler(tokens, 12, seed=4, repeats=repeats).at(3)
    with pytest.raises(Refused, match="fewer than 40 samples"):
        PackedSampler(tokens, 12, least=40)


def test_a_network_of_one_shape_at_a_time_is_refused():
    class Plain(Denoiser):
        kind = "plain"

        def config(self) -> dict[str, object]:
            return {}

        def forward(self, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
            return x

    model = Model(get("flow-matching"), nn.Identity(), nn.Identity(), Plain())
    with pytest.raises(Refused, match=r"Plain answers samples of one shape.*data\.token_budget"):
        PackedObjective(model, Encoded(PICTURES), BatchSampler([0] * 7, 7), TrainSettings(), 0)


def test_strata_are_dealt_out_over_the_whole_packed_batch():
    packed = objective("pictures", stratified_timesteps=True)
    for parts in (1, 2):
        groups = [one for part in range(parts) for one in packed.pack(4, part, parts).groups]
        strata = torch.cat([one.drawn.t for one in groups]) * 7
        assert sorted(strata.floor().int().tolist()) == list(range(7))
