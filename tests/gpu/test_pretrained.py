"""Laws of pretrained networks on a GPU: adapters, narrow and lent bases; nobody waits for them either."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sfumato
from families.test_training import make_base
from sfumato.models.lora import adapter
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.networks import blocks, quantized
from sfumato.theory import noise
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.settings import TrainSettings

from .make_believe import ours, plain
from .small_world import SETTINGS, Batch, Order, Training

CASES = {
    "stable-diffusion-1.5": {"slow": True},
    "flux-dev": {"slow": True},
    "flux-dev, nf4": {"form": "nf4", "slow": True},
    "flux-dev, bfloat16": {"form": "bfloat16", "slow": True},
    "flux-dev, lent": {"lent": True, "slow": True},
    "flux-dev, int8, lent": {"form": "int8", "lent": True},
    "pixart-sigma, lent": {"lent": True, "slow": True},
    "stable-diffusion-3.5": {"slow": True},
    "stable-diffusion-xl": {"slow": True},
    "qwen-image": {"slow": True},
}


class Known:
    """Samples of a base: random latents, and captions that its own encoders read."""

    def __init__(self, model: Any) -> None:
        self.ids = list(range(8))
        self.names = [f"{i}.png" for i in self.ids]
        shape = model.codec.latent_shape(64, 64, 1)
        self.latents = noise.normal(shape, 1, self.ids, purpose="latents")
        condition = model.condition([f"a picture of {i} cats" for i in self.ids])
        self.told = [{name: one.detach() for name, one in row.items()} for row in condition.rows()]
        self.null = model.condition([""]).row(0)
        self.time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 8)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, indices: Any, seed: int, epoch: int) -> Batch:
        some = list(indices)
        found = Batch([self.ids[i] for i in some], self.latents[some], [self.told[i] for i in some], [""] * 4)
        found.time_ids = self.time_ids[some]  # pyright: ignore[reportAttributeAccessIssue]
        return found


def lora_training(folder: Path, case: str, device: str) -> tuple[Training, Any]:
    """A LoRA of a tiny base, in training on a device."""
    how = CASES[case]
    torch.manual_seed(0)
    model = sfumato.load(make_base(case.split(",")[0], folder / "base"))
    encoded = Known(model)
    model.denoiser.requires_grad_(False)
    network = adapter.peft_target(model.denoiser)
    adapter.attach(network, AdapterPlan(rank=2), model.denoiser.lora_targets)
    with torch.no_grad():
        for index, (_, layer) in enumerate(adapter.adapted(network)):
            weight = layer.lora_B["default"].weight
            weight.copy_(0.1 * noise.normal(tuple(weight.shape), 3, [index])[0])
    model.denoiser.compute_dtype = quantized.quantize_frozen(network, how.get("form", "float32"))
    model.denoiser.to(device)
    if how.get("lent"):
        if device != "cpu":
            blocks.offload_blocks(network, torch.device(device))
        blocks.recompute(network, 1)
    settings = TrainSettings(**{**SETTINGS, "ema_snapshot_every": 0, "batch": 4})
    objective = DiffusionObjective(model, encoded, Order(), settings, 0)
    return Training(folder / device, objective, model.denoiser, settings), model


def weights(found: Training) -> dict[str, Tensor]:
    return {
        name: plain(one.detach()).clone()
        for name, one in found.network.named_parameters()
        if one.requires_grad
    }


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=[pytest.mark.slow] if CASES[name].get("slow") else []) for name in CASES],
)
def test_an_adapter_is_trained_as_on_the_cpu_and_nobody_waits(case, gpu, tmp_path):
    """Law: the adapter of a base, stored wide or in few bits, there or lent, moves as it does on the CPU;
    between two figures the host waits for nothing."""
    here, _ = lora_training(tmp_path / "cpu", case, "cpu")
    there, _ = lora_training(tmp_path / "gpu", case, "cuda")
    here.steps(2)
    there.steps(2)
    gpu.clear()
    here.steps(1)
    there.steps(1)
    assert not ours(gpu.syncs) and not ours(gpu.doubles), (gpu.syncs, gpu.doubles)
    theirs = 1 if case == "qwen-image" else 0  # diffusers moves its table of angles
    assert sum(gpu.syncs.values()) <= theirs, gpu.syncs
    sums = [float(plain(one.loop.loss_sum)) for one in (there, here)]
    assert sums[0] == pytest.approx(sums[1], rel=2e-2 if "bfloat16" in case else 1e-3)
    torch.testing.assert_close(weights(there), weights(here), atol=5e-3, rtol=0)  # of steps of 1e-3
