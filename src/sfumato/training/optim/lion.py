"""Lion: the sign of a momentum, of one size for every weight."""

import torch

from sfumato.training.optim.param_groups import ParamGroups


class Lion(torch.optim.Optimizer):
    """w ← (1 − η·decay)·w − η·sign(β₁·m + (1 − β₁)·g),  m ← β₂·m + (1 − β₂)·g.

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    def __init__(
        self,
        params: ParamGroups,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
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
            ways = torch._foreach_lerp(gradients, momenta, now)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_mul_(moving, 1 - rate * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_sign_(ways)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(moving, ways, alpha=-rate)  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_lerp_(momenta, gradients, 1 - later)  # pyright: ignore[reportPrivateImportUsage]
