"""The optimizers by name: what torch has, Lion, and what the package pytorch-optimizer adds.

Each takes the network and the settings and gives the list of optimizers that together step all of it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Refused, one_of

from .average import trained
from .settings import TrainSettings

Groups = list[dict[str, Any]]
Optimizers = list[torch.optim.Optimizer]


def grouped(weights: Iterable[Tensor], weight_decay: float) -> Groups:
    """Two parameter groups: what decays (two axes or more) and what does not."""
    weights = list(weights)
    decaying = [weight for weight in weights if weight.ndim >= 2]
    others = [weight for weight in weights if weight.ndim < 2]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def groups_of(network: nn.Module, settings: TrainSettings) -> Groups:
    """The network's trained parameters, grouped by whether they decay."""
    return grouped(trained(network).values(), settings.weight_decay)


def adamw(network: nn.Module, settings: TrainSettings) -> Optimizers:
    """AdamW in one fused kernel (arXiv:1711.05101)."""
    groups = groups_of(network, settings)
    return [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)]


def adafactor(network: nn.Module, settings: TrainSettings) -> Optimizers:
    """Adafactor: the second moment of a matrix as a row and a column (arXiv:1804.04235)."""
    return [torch.optim.Adafactor(groups_of(network, settings), lr=settings.learning_rate)]


def lion(network: nn.Module, settings: TrainSettings) -> Optimizers:
    """Lion; it wants a learning rate three to ten times below AdamW's."""
    return [Lion(groups_of(network, settings), lr=settings.learning_rate)]


def muon(network: nn.Module, settings: TrainSettings) -> Optimizers:
    """Muon for matrices, scaled to AdamW's learning rates (arXiv:2502.16982); AdamW for the rest."""
    weights = list(trained(network).values())
    matrices = [weight for weight in weights if weight.ndim == 2]
    others = grouped((weight for weight in weights if weight.ndim != 2), settings.weight_decay)
    rate, decay = settings.learning_rate, settings.weight_decay
    parts: Optimizers = []
    if matrices:
        parts.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    if others:
        parts.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), fused=True))
    return parts


def prodigy(network: nn.Module, settings: TrainSettings) -> Optimizers:
    """Prodigy finds its own step size (arXiv:2306.06101); say learning_rate = 1."""
    made = _from_package("Prodigy")
    return [made(groups_of(network, settings), lr=settings.learning_rate, weight_decay=settings.weight_decay)]


def schedule_free(network: nn.Module, settings: TrainSettings) -> Optimizers:
    """AdamW that averages as it goes instead of decaying (arXiv:2405.15682); its average is drawn with."""
    made = _from_package("ScheduleFreeAdamW")
    return [made(groups_of(network, settings), lr=settings.learning_rate, betas=(0.9, 0.99))]


def _from_package(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:
        import pytorch_optimizer  # pyright: ignore[reportMissingImports]
    except ImportError as problem:
        raise Refused(
            f"{name} comes from the package pytorch-optimizer, which is not installed. "
            "Run `pip install pytorch-optimizer`, or choose train.optimizer = adamw, lion, muon or adafactor."
        ) from problem
    return getattr(pytorch_optimizer, name)


OPTIMIZERS: dict[str, Callable[[nn.Module, TrainSettings], Optimizers]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
    "prodigy": prodigy,
    "schedule-free": schedule_free,
}


def build(network: nn.Module, settings: TrainSettings) -> Optimizers:
    """The optimizers the settings name.

    Raises:
        Refused: unknown, or its package is missing.
    """
    return OPTIMIZERS[one_of("optimizer", settings.optimizer, OPTIMIZERS)](network, settings)


class Lion(torch.optim.Optimizer):
    """w ← (1 − η·decay)·w − η·sign(β₁·m + (1 − β₁)·g),  m ← β₂·m + (1 − β₂)·g.

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    def __init__(
        self, params: Groups, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move all weights that have a gradient."""
        for group in self.param_groups:
            moving = [weight for weight in group["params"] if weight.grad is not None]
            if not moving:
                continue
            gradients = [weight.grad for weight in moving]
            momenta = [
                self.state[weight].setdefault("momentum", torch.zeros_like(weight)) for weight in moving
            ]
            (now, later), rate = group["betas"], group["lr"]
            ways = torch._foreach_lerp(gradients, momenta, now)  # pyright: ignore
            torch._foreach_mul_(moving, 1 - rate * group["weight_decay"])  # pyright: ignore
            torch._foreach_add_(moving, torch._foreach_sign(ways), alpha=-rate)  # pyright: ignore
            torch._foreach_lerp_(momenta, gradients, 1 - later)  # pyright: ignore
