"""Laws of devices: what is not there is refused in a sentence, and nothing takes every GPU for NVIDIA's."""

import os

import pytest
import torch

from sfumato.errors import Refused
from sfumato.training import device


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tpu", "not known"),
        ("cuda:first", "not known"),
        ("meta", "networks are not computed there"),
        ("hpu", "networks are not computed there"),
        ("cuda:7", "sees 2 devices"),
        ("xpu:2", "sees 0 devices"),
        ("mps", "sees 0 devices"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")
    )
    with pytest.raises(Refused, match=why):
        device.resolve(name)


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_other_makers_devices_are_taken_by_name(kind, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert device.resolve(kind) == torch.device(kind)
    with pytest.raises(Refused, match="sees 1 devices"):
        device.resolve(f"{kind}:1")


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for is_there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert device.resolve("auto").type == ("cuda" if is_there else "cpu")


@pytest.mark.parametrize("hip", [None, "7.1"])
@pytest.mark.parametrize("said", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocators_segments_may_grow_unless_the_user_says_how(hip, said, monkeypatch):
    for name in device.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if said:
        monkeypatch.setenv(said, "max_split_size_mb:128")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(device.sys, "platform", "linux")
    device.resolve("cuda")
    found = {name: os.environ[name] for name in device.ALLOCATOR_VARIABLES if name in os.environ}
    if said:
        assert found == {said: "max_split_size_mb:128"}
    else:
        assert found == ({} if hip else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
