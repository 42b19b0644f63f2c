"""Wan 2.1 and 2.2: a rectified flow on clips that reads UMT5.

2.2 A14B holds two networks, one for much noise and one for little; 2.2 5B is told the time of every token.
Source: Wan Team 2025, arXiv:2503.20314.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sfumato.stages.family import Family
from sfumato.stages.interface import Condition


class Experts(nn.Module):
    """Two networks of one kind: `noisy` answers from `border` on (in thousandths), `clean` below."""

    def __init__(self, noisy: nn.Module, clean: nn.Module, border: float):
        super().__init__()
        self.noisy, self.clean, self.border = noisy, clean, border
        self.config: Any = noisy.config

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Each sample is answered by the network of its time."""
        loud = timestep >= self.border
        out = torch.empty_like(hidden_states)
        for network, rows in ((self.noisy, loud), (self.clean, ~loud)):
            if bool(rows.any()):
                given = hidden_states[rows], timestep[rows], encoder_hidden_states[rows]
                out[rows] = network(*given, return_dict=False)[0]
        return out


class Wan(Family):
    """Latents [B, 16, F, H, W]; tokens of a fixed length, zero after the words."""

    pipelines = ("WanPipeline",)
    clock = "thousandths"
    video, fps = True, 16.0

    def whole(self, pipe: Any) -> nn.Module:
        """Both networks where there are two; the one there is otherwise."""
        border = pipe.config.boundary_ratio
        if border is not None and pipe.transformer is not None and pipe.transformer_2 is not None:
            count = pipe.scheduler.config.num_train_timesteps
            return Experts(pipe.transformer, pipe.transformer_2, border * count)
        network: Any = pipe.transformer if pipe.transformer is not None else pipe.transformer_2
        network.register_to_config(expand_timesteps=bool(pipe.config.expand_timesteps))
        return network

    def put_back(self, pipe: Any, network: nn.Module) -> None:
        """One network, or both."""
        if isinstance(network, Experts):
            pipe.register_modules(transformer=network.noisy, transformer_2=network.clean)
        else:
            name = "transformer" if pipe.transformer is not None else "transformer_2"
            pipe.register_modules(**{name: network})

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x_T − x_0 [B, 16, F, H, W]."""
        if isinstance(network, Experts):
            return network(x, clock, condition["tokens"])
        if network.config.get("expand_timesteps"):
            frames, height, width = x.shape[-3:]
            clock = clock[:, None].expand(-1, frames * (height // 2) * (width // 2))
        tokens = condition["tokens"]
        return network(hidden_states=x, timestep=clock, encoder_hidden_states=tokens, return_dict=False)[0]
