"""Laws of a step on a GPU: nothing mixes devices, nobody waits, copies come from pinned memory."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from sfumato.models.condition import Condition
from sfumato.models.networks.dit import interpolate

from .make_believe import plain
from .small_world import SETTINGS, Encoded, Order, Training, dit, training, unet

USUAL = {"ema_snapshot_every": 0}
CASES = {
    "dit": (dit, {"precision": "bf16", "ema": 0.9}),
    "dit, in parts, computed again": (dit, {"gradient_accumulation": 2, "max_grad_norm": 0.1}),
    "dit, min-snr": (dit, {"weighting": "min-snr", "timestep_importance_sampling": True}),
    "dit, packed": (dit, {"sequence_packing": True}),
    "dit, ddpm": (dit, {"theory": "ddpm-velocity"}),
}


def steps_of(gpu, folder, name: str, count: int = 2):
    """A case after its first steps, with what `count` more of them did."""
    make, changes = CASES[name]
    changes = {**USUAL, **changes}
    encoded = Encoded()
    encoded.buckets = [tuple(one.shape) for one in encoded.latents]
    found = training(
        folder, make(), theory=changes.pop("theory", "flow-matching"), encoded=encoded, **changes
    )
    found.steps(2)
    gpu.clear()
    return found.steps(count)


@pytest.mark.parametrize("name", CASES)
def test_nobody_waits_in_a_step(name, gpu, tmp_path):
    """Law: between two figures the host waits for nothing; what it copies lies in pinned memory; and nothing
    is computed in float64, which a GPU does slowly."""
    steps_of(gpu, tmp_path, name)
    assert not gpu.syncs, gpu.syncs
    assert not gpu.downloads and not gpu.doubles, (gpu.downloads, gpu.doubles)
    assert 0 < sum(gpu.uploads.values()) <= 2 * 2 * 30


def test_a_step_on_the_device_is_that_of_the_cpu(gpu, tmp_path):
    """Law: the same samples, times and noise: the loss is the CPU's up to rounding."""
    ends = []
    for device in ("cpu", "cuda"):
        found = training(tmp_path / device, dit(), device, **USUAL).steps(3)
        ends.append((plain(found.loop.loss_sum), [plain(one.detach()).clone() for one in found.loop.weights]))
    torch.testing.assert_close(ends[1], ends[0], atol=2e-5, rtol=1e-4)


def test_the_figures_are_read_once(gpu, tmp_path):
    """Law: a log line costs one wait, however many numbers it has, and its seconds have that wait in them."""
    found = steps_of(gpu, tmp_path, "dit")
    gpu.clear()
    found.loop.read_figures()
    assert sum(gpu.syncs.values()) == 1
    gpu.clear()
    found.loop.log(1e-3)
    assert not gpu.syncs


def test_a_loss_that_is_not_finite_moves_nothing_and_is_found_at_the_next_figures(gpu, tmp_path):
    """Law: the device itself leaves the weights alone, and the run ends where the loss is read."""
    from sfumato.errors import Failed

    found = steps_of(gpu, tmp_path, "dit")
    kept = [plain(one.detach()).clone() for one in found.loop.weights]
    found.loop.objective.encoded.latents[:] = float("nan")
    found.steps(2)  # the first was read ahead
    kept = [plain(one.detach()).clone() for one in found.loop.weights]
    found.steps(1)
    assert all(torch.equal(one, plain(two)) for one, two in zip(kept, found.loop.weights, strict=True))
    found.loop.read_figures()
    with pytest.raises(Failed, match="not finite"):
        found.loop.log(1e-3)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (2, 3, 3, 4, 2)])
def test_the_canvas_is_spread_as_torch_spreads_it(shape):
    """Law: a matrix for each axis gives torch's linear interpolation, forwards and backwards."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    size = (5, 7) if len(shape) == 4 else (3, 6, 5)
    way = "bilinear" if len(shape) == 4 else "trilinear"
    expected = torch.nn.functional.interpolate(x, size, mode=way)
    seed = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * seed).sum(), x)
    found = interpolate(x, size)
    (got,) = torch.autograd.grad((found * seed).sum(), x)
    torch.testing.assert_close((found, got), (expected, wanted))


def test_no_mask_is_handed_to_attention_where_all_captions_are_equally_long(gpu, monkeypatch):
    """Law: on a GPU captions of one length go without a mask, which changes no bit; of several, with it."""
    import torch.nn.functional as F

    network, masks, attend = dit().to("cuda"), [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *given, attn_mask=None: (masks.append(attn_mask), attend(*given, attn_mask=attn_mask))[1],
    )
    x, clock = torch.randn(2, 4, 8, 8).to("cuda"), torch.tensor([3.0, 500.0]).to("cuda")
    answers = {}
    for lengths in ((3, 3), (3, 2)):
        rows = [{"tokens": torch.ones(n, 16), "pooled": torch.ones(16)} for n in lengths]
        condition = Condition.stack(rows).to("cuda")
        assert condition.is_unpadded == (lengths == (3, 3))
        answers[lengths] = network(x, clock, condition)
    assert [mask is None for mask in masks] == [True, True, False, False]
    told = Condition.stack([{"tokens": torch.ones(3, 16), "pooled": torch.ones(16)}] * 2).to("cuda")
    told.is_unpadded = False
    assert torch.equal(plain(network(x, clock, told)), plain(answers[3, 3]))


@pytest.mark.slow
def test_nobody_waits_in_a_step_of_a_unet(gpu, tmp_path):
    """Law: as above, of diffusers' UNet."""
    found = training(tmp_path, unet(), **USUAL).steps(2)
    gpu.clear()
    found.steps(2)
    assert not gpu.syncs and not gpu.doubles, (gpu.syncs, gpu.doubles)


def test_large_averages_lie_in_the_host_s_memory_and_no_step_waits_for_them(gpu, tmp_path, monkeypatch):
    """Law: those of a network too large for its GPU are the same, but for the steps between."""
    from sfumato.training.state import posthoc_ema

    ends = []
    for share in (1.0, 0.0):
        monkeypatch.setattr(posthoc_ema, "DEVICE_SHARE", share)
        monkeypatch.setattr(posthoc_ema, "LONGEST_INTERVAL", 1)
        found = training(tmp_path / str(share), dit(depth=1), ema_snapshot_every=20).steps(2)
        gpu.clear()
        found.steps(3)
        assert not gpu.syncs, gpu.syncs
        groups = found.loop.train_state.posthoc_ema.groups()
        ends.append({name: {k: plain(v).clone() for k, v in one.items()} for name, one in groups.items()})
        assert {one.device.type for one in groups["power-0.050"].values()} == {"cuda" if share else "cpu"}
    torch.testing.assert_close(ends[0], ends[1], atol=0, rtol=0)


def test_a_checkpoint_is_copied_behind_the_step_and_no_tensor_is_waited_for(gpu, tmp_path):
    """Law: what is written is what the weights were, though the next step has begun; the waits of a save do
    not grow with the number of tensors."""
    waits = []
    for depth in (1, 3):
        found = training(tmp_path / str(depth), dit(depth=depth), ema=0.9, **USUAL).steps(2)
        expected = {name: plain(one.detach()).clone() for name, one in found.loop.network.named_parameters()}
        gpu.clear()
        folder = found.loop.save()
        waits.append(sum(gpu.syncs.values()))
        found.steps(1)
        found.loop.checkpoint_writer.wait()
        kept = load_file(folder / "model.safetensors")
        assert kept.keys() >= expected.keys() and all(
            torch.equal(kept[one], expected[one]) for one in expected
        )
    assert waits[0] == waits[1] <= 3, (waits, gpu.syncs)


def test_copies_of_one_network_do_not_share_its_numbers(gpu):
    network = dit(depth=1).to("cuda")
    other = copy.deepcopy(network)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert bool(plain(next(network.parameters())).any())


def test_a_layer_of_few_bits_copies_nothing(gpu):
    """Law: once its table is there, a layer of nf4 asks the host for nothing, forwards or backwards, and
    under autocast makes its weights as narrow as its products."""
    from torch import nn

    from sfumato.models.networks.quantized import QuantizedLinear

    layer = nn.Linear(64, 32).requires_grad_(False)
    QuantizedLinear.of(layer, "nf4", torch.device("cuda"))
    layer.to("cuda")
    x = torch.randn(3, 64).to("cuda").requires_grad_()
    for _ in range(2):
        gpu.clear()
        with torch.autocast("cuda", torch.bfloat16):
            out = layer(x)
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad is not None
    assert not gpu.syncs and not gpu.uploads, gpu.syncs


def test_nobody_waits_in_a_step_of_a_codec(gpu, tmp_path):
    """Law: as above, of the codec that is trained first."""
    from sfumato.models.codecs.image import ResidualCodec
    from sfumato.training.objective.reconstruction import ReconstructionObjective
    from sfumato.training.settings import TrainSettings

    class Pictures:
        ids = tuple(range(8))
        names = tuple(map(str, ids))
        pixels = torch.arange(8 * 3 * 16 * 16).view(8, 3, 16, 16).remainder(255).to(torch.uint8)

        def read(self, indices):
            return self.pixels[list(indices)]

    torch.manual_seed(0)
    codec = ResidualCodec(latent_channels=4, width=8, stride=4).to("cuda")
    objective = ReconstructionObjective(codec, Pictures(), Order(), 0, flip=True)
    found = Training(tmp_path, objective, codec, TrainSettings(**{**SETTINGS, **USUAL})).steps(2)
    gpu.clear()
    found.steps(2)
    assert not gpu.syncs and not gpu.doubles, (gpu.syncs, gpu.doubles)
