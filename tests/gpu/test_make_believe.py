"""Laws of the make-believe GPU itself: its numbers are true, and it refuses what a GPU refuses."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from .make_believe import DeviceMismatch, DeviceTensor, Race, plain


def test_its_numbers_are_the_cpu_s(gpu):
    """Law: a step of autocast, attention and fused AdamW ends with the bits it has on the CPU."""
    ends = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)).to(device)
        x = torch.randn(2, 4, 8).to(device)
        step = torch.optim.AdamW(network.parameters(), 1e-2, fused=True)
        for _ in range(3):
            with torch.autocast(device, torch.bfloat16, enabled=False):
                out = network(x)
                out = F.scaled_dot_product_attention(out, out, out)
            (out * torch.tensor([1.0] * 8, device=device)).square().mean().backward()
            step.step()
            step.zero_grad()
        assert all(weight.device.type == device for weight in network.parameters())
        ends.append([plain(weight.detach()).clone() for weight in network.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert gpu.launches["_fused_adamw_"] == 3


def test_a_weight_stays_itself_when_it_moves(gpu):
    """Law: a module that moves keeps its parameters' identity, and what they are set to."""
    layer = nn.Linear(3, 3)
    weight, numbers = layer.weight, layer.weight.detach().clone()
    layer.to("cuda")
    assert layer.weight is weight and weight.is_cuda and isinstance(weight, nn.Parameter)
    weight.data = weight.data.bfloat16()
    assert weight.dtype == torch.bfloat16 and plain(weight.data).dtype == torch.bfloat16
    weight.data = numbers
    assert weight.device.type == "cpu" and torch.equal(plain(weight), numbers)
    weight.data = numbers.to("cuda")
    assert weight.is_cuda
    other = nn.Linear(3, 3)
    other.weight.data = numbers.to("cuda")
    assert other.weight.is_cuda


def test_devices_do_not_mix(gpu):
    """Law: a tensor of the host and one of the device in one operation raise; a number may be the host's."""
    x = torch.zeros(3, device="cuda")
    with pytest.raises(DeviceMismatch, match="add"):
        x + torch.ones(3)
    assert (x + torch.tensor(1.0)).is_cuda and (x + 1).is_cuda


def test_every_wait_is_counted_once(gpu):
    """Law: what makes the host wait is counted with its line; what does not, is not."""
    x = torch.arange(4.0, device="cuda")
    asks = [
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: torch.ones(4).to("cuda"),
        lambda: torch.ones(4).pin_memory().to("cuda"),
        lambda: torch.ones(4).to("cuda", non_blocking=True),
        lambda: torch.tensor([1.0, 2.0], device="cuda"),
        lambda: x[x > 1],
        lambda: torch.equal(x, x),
        torch.cuda.synchronize,
    ]
    for ask in asks:
        gpu.clear()
        ask()
        assert sum(gpu.syncs.values()) == 1, gpu.syncs
        assert "test_make_believe.py" in next(iter(gpu.syncs))
    gpu.clear()
    y = torch.ones(4).pin_memory().to("cuda", non_blocking=True) + x.view(2, 2).flatten()
    y.add_(1).to("cpu", non_blocking=True)
    assert not gpu.syncs and gpu.upload_bytes == 16 and gpu.launches["add"] == 1


def test_a_stream_waits_for_what_another_copies(gpu):
    """Law: using what a side stream copies without waiting for it raises."""
    side, home = torch.cuda.Stream(), torch.ones(3).pin_memory()
    with torch.cuda.stream(side):
        x = home.to("cuda", non_blocking=True)
        copied = side.record_event()
    with pytest.raises(Race, match="has not waited"):
        x + 1
    torch.cuda.current_stream().wait_event(copied)
    assert (x + 1).is_cuda and not gpu.syncs


def test_threads_see_the_device(gpu):
    """Law: a thread that is started within has the device too, and doubles are written down."""
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.zeros(3, device="cuda").double() + 1))
    thread.start()
    thread.join()
    assert isinstance(found[0], DeviceTensor) and sum(gpu.doubles.values()) == 2


def test_it_leaves_no_trace():
    """Law: outside, there is no GPU."""
    assert not torch.cuda.is_available() and not torch.accelerator.is_available()
