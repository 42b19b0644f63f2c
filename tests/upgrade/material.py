"""What the upgrade fixtures are made of and judged by: no part of sfumato, so that no renaming reaches it.

A tiny pipeline whose weights are counted out of integers (the same bits on every machine, so it need not be
committed), small encoders, hashes and summaries of tensors, and the canary that says whether this machine
rounds as the one did that made the fixtures.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

PLACE = "/proc/self/cwd"
"""Where the fixtures were made: the current folder of the process, under the name Linux gives it anywhere."""
HOME = Path(__file__).parent / "0_1"

# ----------------------------------------------------------------------------- what is made of integers


def counted(name: str, shape: Iterable[int]) -> Tensor:
    """Numbers in [-0.5, 0.5), multiples of 2^-16, hashed from a name and their places: exact everywhere."""
    shape = tuple(shape)
    start = int(hashlib.sha256(name.encode()).hexdigest()[:12], 16)
    bits = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(start)
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(factor)
    whole = ((bits ^ (bits >> np.uint64(31))) >> np.uint64(48)).astype(np.int64)
    return torch.from_numpy((whole - 32768) / 65536).float().reshape(shape)


@torch.no_grad()
def filled(module: Any, key: str) -> Any:
    """The module with every parameter counted out, none at zero."""
    for name, weight in module.named_parameters():
        numbers = counted(f"{key}/{name}", weight.shape)
        if weight.ndim >= 2:
            numbers *= 2.0 ** round(math.log2(3.5 * weight[0].numel() ** -0.5))
        else:
            numbers = numbers / 4 + (1.0 if name.endswith("weight") else 0.0)
        weight.copy_(numbers)
    return module.eval()


def letters() -> list[str]:
    """The letters that stand for the 256 bytes in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def make_base(folder: Path) -> None:
    """A Stable Diffusion 1 pipeline of some ten thousand numbers."""
    import diffusers as D
    import transformers as T

    tokens = letters()
    tokens += [f"{letter}</w>" for letter in tokens] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    tokenizer = T.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    config = T.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=4, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=4, bos_token_id=512, eos_token_id=513, pad_token_id=513,
        max_position_embeddings=77,
    )  # fmt: skip
    network = D.UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(4, 4),
        norm_num_groups=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=4, attention_head_dim=2,
    )  # fmt: skip
    coder = D.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[4] * 4, layers_per_block=1,
        latent_channels=4, norm_num_groups=2, sample_size=32, scaling_factor=0.18215,
    )  # fmt: skip
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    D.StableDiffusionPipeline(
        unet=filled(network, "unet"), vae=filled(coder, "vae"), tokenizer=tokenizer,
        text_encoder=filled(T.CLIPTextModel(config), "text"),
        scheduler=D.DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


# ----------------------------------------------------------------------------- what is compared


def groups_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each safetensors file in a folder."""
    found: dict[str, dict[str, Tensor]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found[file.stem] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def bits(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, kinds, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def summary(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Of all tensors of a kind (`weight`, `bias`, …) together: their norm, and products with 8 directions."""
    found = {}
    for kind in sorted({name.rpartition(".")[2] for name in tensors}):
        alike = [name for name in sorted(tensors) if name.rpartition(".")[2] == kind]
        flat = torch.cat([tensors[name].double().flatten() for name in alike])
        there = (2 * counted(f"{kind}/{number}", [len(flat)]).double() for number in range(8))
        found[kind] = [float(f"{value:.7g}") for value in (flat.norm(), *(flat @ one for one in there))]
    return found


def far(now: Mapping[str, list[float]], then: Mapping[str, list[float]]) -> float:
    """How far tensors are apart, as a share of their norm, estimated from their summaries."""
    assert now.keys() == then.keys(), sorted(now.keys() ^ then.keys())[:3]
    most = 0.0
    for kind, (norm, *products) in then.items():
        apart = math.sqrt(sum((a - b) ** 2 for a, b in zip(now[kind][1:], products, strict=True)) * 3 / 8)
        most = max(most, apart / norm if norm else apart)
    return most


def canary() -> str:
    """A hash of what torch makes of fixed numbers, in the operations and about the sizes of the fixtures.

    Where it is the recorded one, this machine (processor, torch, its libraries, one thread) rounds as the one
    did that made the fixtures, and bits are compared; elsewhere numbers are, to a tolerance.
    """
    torch.manual_seed(0)
    seen: dict[str, Tensor] = {"randn": torch.randn(4, 8, 16, 16), "rand": torch.rand(1000)}
    for side in (8, 16, 24, 32, 96):
        x = counted("x", (4, 16, side)).requires_grad_()
        w, b = counted("w", (64, side)).requires_grad_(), counted("b", (64,)).requires_grad_()
        hidden = F.layer_norm(F.gelu(F.linear(x, w, b), approximate="tanh"), (64,))
        q, k, v = F.silu(hidden)[..., :48].unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).softmax(-1) @ q.transpose(-1, -2)
        (out.exp().sum() + F.gelu(hidden).square().mean()).backward()
        seen |= {f"{side} out": out, f"{side} x": x.grad, f"{side} w": w.grad, f"{side} b": b.grad}  # type: ignore[dict-item]
    for width, side in ((3, 32), (4, 16), (8, 4), (8, 16), (16, 8)):
        x = counted("p", (4, width, side, side)).requires_grad_()
        w = counted("k", (8, width, 3, 3)).requires_grad_()
        out = F.group_norm(F.silu(F.conv2d(x, w, padding=1)), 4)
        up = F.conv_transpose2d(x, counted("t", (width, 8, 2, 2)), stride=2)
        out = F.interpolate(out, scale_factor=2.0, mode="nearest") + up
        out.square().mean().sqrt().backward()
        seen |= {f"c{width} {side}": out, f"cx{width} {side}": x.grad, f"ck{width} {side}": w.grad}  # type: ignore[dict-item]
    clip = counted("clip", (2, 4, 5, 8, 8)).requires_grad_()
    made = F.conv3d(clip, counted("k3", (8, 4, 3, 3, 3)), padding=1)
    made.tanh().log_softmax(1).sum().backward()
    weights = [counted(f"a{n}", (n, 7)).requires_grad_() for n in (1, 16, 33)]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, foreach=True)
    for _ in range(3):
        optimizer.zero_grad()
        torch.stack([one.pow(3).sum().sin() for one in weights]).sum().backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
    t = torch.linspace(0.01, 0.99, 101, dtype=torch.float64)
    seen |= {"clip": made, "clip x": clip.grad, **{f"a{i}": one for i, one in enumerate(weights)}}  # type: ignore[dict-item]
    seen["times"] = torch.cat([t.cos(), t.log(), t.exp(), t.sqrt(), torch.erfinv(t), torch.atan2(t, 1 - t)])
    return bits({name: one.detach() for name, one in seen.items()})


def written(value: Any) -> str:
    """JSON, in short lines."""
    text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True)
    return re.sub(r"\[\s+([^\[\]{}]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"
