"""Laws of context parallel through diffusers' hooks: processes that share a sample are one with all of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from sfumato.errors import Refused
from sfumato.models.networks import blocks
from sfumato.models.pretrained import context_parallel
from sfumato.models.pretrained.families.ltx_video import LTXVideo
from sfumato.training.distributed.processes import current_processes
from workers import run_processes


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def wan() -> tuple[nn.Module, dict[str, Any]]:
    net = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return net, {"hidden_states": noise(1, 4, 2, 8, 8), "encoder_hidden_states": noise(1, 7, 16)}


def flux() -> tuple[nn.Module, dict[str, Any]]:
    net = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return net, {
        "hidden_states": noise(1, 16, 4), "encoder_hidden_states": noise(1, 8, 32),
        "pooled_projections": noise(1, 32), "img_ids": noise(16, 3), "txt_ids": torch.zeros(8, 3),
    }  # fmt: skip


def qwen(words: int = 7) -> tuple[nn.Module, dict[str, Any]]:
    """Seven words, which two processes can only share with an eighth that nobody heeds."""
    net = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return net, {
        "hidden_states": noise(1, 16, 16), "encoder_hidden_states": noise(1, words, 16),
        "encoder_hidden_states_mask": None, "img_shapes": [[(1, 4, 4)]],
    }  # fmt: skip


NETWORKS = {"wan": wan, "flux": flux, "qwen": qwen}


def made(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small network whose weights say something, its second block computed again, and what it is asked."""
    torch.manual_seed(0)
    net, asked = NETWORKS[kind]()
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.1)
    blocks.recompute(net, 1)
    return net, asked | {"timestep": torch.tensor([0.5]), "return_dict": False}


def answered(net: nn.Module, asked: dict[str, Any]) -> dict[str, Tensor]:
    """The answer, and the gradients of its mean square."""
    answer = net(**asked)[0]
    answer.square().mean().backward()
    found = {name: w.grad for name, w in net.named_parameters() if w.grad is not None}
    return {"answer": answer.detach().clone()} | found


def _keep(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ring", "ulysses"))
    for kind in NETWORKS:
        net, asked = made(kind)
        context_parallel.share(net, mesh)
        found = answered(net, asked)
        for name, tensor in found.items():
            if name != "answer":
                dist.all_reduce(tensor)
        context_parallel.unshare(net)
        with torch.no_grad():
            found["alone again"] = net(**asked)[0]
        if current_processes().is_rank_zero:
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / kind)


def test_two_processes_that_share_a_sample_answer_and_learn_as_one(tmp_path):
    run_processes(2, _keep, tmp_path)
    for kind in NETWORKS:
        found, alone = load_file(tmp_path / kind), answered(*made(kind))
        assert torch.equal(found.pop("alone again"), alone["answer"])
        assert found.keys() == alone.keys()
        for name, wanted in alone.items():
            assert (found[name] - wanted).norm() <= 1e-5 * wanted.norm() + 1e-8, (kind, name)


def test_networks_that_cannot_be_shared_are_named_with_the_reason():
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4}
    with pytest.raises(Refused, match=r"SD3Transformer2DModel.*no plan"):
        context_parallel.check(SD3Transformer2DModel(**small, sample_size=8, joint_attention_dim=8), 2)
    with pytest.raises(Refused, match=r"LTXVideoTransformer3DModel.*mask for all heads"):
        context_parallel.check(
            LTXVideoTransformer3DModel(**small, cross_attention_dim=16, caption_channels=8),
            2,
            LTXVideo.no_context_parallel,
        )
    with pytest.raises(Refused, match=r"has 2\. Choose a divisor of 2"):
        context_parallel.check(wan()[0], 3)
