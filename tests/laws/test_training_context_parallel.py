"""Laws of context parallel: processes that share each sample are one process with all of it."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_training_sequence_packing import Encoded, network
from torch import Tensor, nn

from closeness import APART, apart
from sfumato.data.encoding.batch_sampler import BatchSampler
from sfumato.errors import Refused
from sfumato.models import files
from sfumato.models.interface import Model
from sfumato.models.networks import blocks
from sfumato.run_folder import RunFolder
from sfumato.theory import get
from sfumato.training.distributed import context_parallel
from sfumato.training.distributed.gradient_buckets import gradients_of
from sfumato.training.distributed.processes import (
    BatchSplit,
    Processes,
    current_processes,
    run_folder_of_rank,
)
from sfumato.training.loop.loop import fit
from sfumato.training.loop.validation import ValidationLoss
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.settings import TrainSettings
from workers import run_processes

CLIP, PICTURE = (2, 3, 4, 4), (2, 4, 6)
WORLDS = {
    "clips": (CLIP, {"frames": 3, "direct": True}, {}),
    "factorised": (CLIP, {"frames": 3, "attention": "factorised"}, {}),
    "frames apart": (CLIP, {"frames": 3}, {"frame_timesteps": "independent", "first_frame_share": 0.5}),
    "as many frames": ((2, 4, 4, 4), {"frames": 4}, {"frame_timesteps": "independent"}),
    "pictures": (PICTURE, {}, {"weighting": "p2"}),
    "recomputed": (PICTURE, {}, {}),
}


def objective(kind: str, settings: TrainSettings) -> DiffusionObjective:
    """Six samples, two captions dropped, a DiT whose weights say something."""
    shape, how, _ = WORLDS[kind]
    model = Model(get("flow-matching"), nn.Identity(), nn.Identity(), network(**how))
    if kind == "recomputed":
        blocks.recompute(model.denoiser, 1)
    return DiffusionObjective(model, Encoded([shape] * 6), BatchSampler([0] * 6, 4, 1), settings, 3, 0.3)


def gradients(kind: str, within: int) -> dict[str, Tensor]:
    """The loss and gradients of one step, summed over the processes as the loop sums them."""
    settings = TrainSettings(batch=4, context_parallel=within, **WORLDS[kind][2])
    one, processes = objective(kind, settings), current_processes()
    named = dict(one.model.denoiser.named_parameters())
    sums, division = gradients_of(list(named.values()), processes, False), BatchSplit.of(settings, processes)
    with context_parallel.enabled_for_training(one.model.denoiser, settings, processes):
        for part in division.mine:
            sums.begin(part == division.mine[-1])
            losses = one.losses(1, part, division.parts)
            share = losses.per_sample.sum() / losses.of
            share.backward()
            sums.add(share.detach() / within)
        loss, _ = sums.total(False)
    return {"loss": loss.clone()} | {name: weight.grad for name, weight in named.items()}


def _keep(folder: Path, within: int) -> None:
    for kind in WORLDS:
        found = gradients(kind, within)
        if current_processes().is_rank_zero:
            save_file(found, folder / f"{kind}.safetensors")


@pytest.mark.parametrize("count", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(count, tmp_path):
    """Two processes that share each sample, alone and beside two others."""
    run_processes(count, _keep, tmp_path, 2)
    for kind in WORLDS:
        found = load_file(tmp_path / f"{kind}.safetensors")
        for name, wanted in gradients(kind, 1).items():
            assert (found[name] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-7, (kind, name)


def _train(folder: Path, within: int, steps: int, changes: dict[str, object]) -> None:
    settings = TrainSettings(
        steps=steps, batch=4, context_parallel=within, warmup_steps=1, save_every=100, ema=0.9,
        validate_every=4, learning_rate=1e-3, **changes,
    )  # fmt: skip
    one = objective("clips", settings)
    with current_processes().first():
        run = run_folder_of_rank(RunFolder.create(folder))
    measure = ValidationLoss(one, Encoded([CLIP] * 3), one.encoded, run, samples=3, levels=2, batch=2)
    fit(one, one.model.denoiser, settings, run, 3, held_out=measure, say=lambda _: None)


@pytest.mark.precisions("fp32", "bf16")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_run_that_moves_between_shared_and_whole_samples_is_one_run(way, precision, tmp_path):
    """1 → 2 that share → 4 in two groups → 1 → 2, which measure together."""
    changes = {"parallel": way, "timestep_importance_sampling": way == "ddp"}
    _train(tmp_path / "one", 1, 4, changes)
    _train(tmp_path / "moved", 1, 1, changes)
    run_processes(2, _train, tmp_path / "moved", 2, 2, changes)
    run_processes(4, _train, tmp_path / "moved", 2, 3, changes)
    _train(tmp_path / "moved", 1, 4, changes)
    _train(tmp_path / "one", 1, 5, changes)
    run_processes(2, _train, tmp_path / "moved", 2, 5, changes)
    one, moved = (RunFolder.open(tmp_path / name) for name in ("one", "moved"))
    wanted, found = (files.read(run.checkpoint_folders()[-1], "model") for run in (one, moved))
    start = objective("clips", TrainSettings(batch=4)).model.denoiser.state_dict()
    assert apart(found, wanted, start) <= APART[precision]
    losses, others = (
        [event["loss"] for event in run.events() if event["kind"] == "validation"][-4:]
        for run in (one, moved)
    )
    assert others == pytest.approx(losses, rel={"fp32": 1e-4, "bf16": 1e-2}[precision])


def test_what_cannot_share_samples_is_refused_with_the_way_out():
    pair = Processes(0, 2)
    for changes, said in (
        ({"exact_elastic": True}, "train.exact_elastic"),
        ({"sequence_packing": True}, "train.sequence_packing"),
        ({"compile": True}, "train.compile"),
    ):
        with pytest.raises(Refused, match=rf"{said}.*Leave one out"):
            context_parallel.check(TrainSettings(context_parallel=2, **changes), 2)
    with pytest.raises(Refused, match=r"1 process was started.*torchrun --nproc-per-node 2"):
        context_parallel.check(TrainSettings(context_parallel=2), 1)
    with pytest.raises(Refused, match="3 processes were started"):
        context_parallel.check(TrainSettings(context_parallel=2), 3)
    assert BatchSplit.of(
        TrainSettings(context_parallel=2, batch=4, gradient_accumulation=2), Processes(3, 4)
    ).mine == range(2, 4)
    assert Processes(3, 4, 2).indices_of_rank(5) == [1, 3] and not Processes(3, 4, 2).is_group_leader
    assert pair.groups == 2
