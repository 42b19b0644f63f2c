"""A theory of one's own: the noise turns in slowly, the network answers with the velocity."""

import math

import torch

from sfumato import Theory

mine = Theory(
    data=lambda t: (torch.cos(t), torch.sin(t)),
    model=lambda t: (-torch.sin(t), torch.cos(t)),
    t_noise=math.pi / 2,
    name="mine",
)
