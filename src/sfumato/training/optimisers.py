"""The optimizers there are, each a short recipe of how it treats matrices and the rest.

A recipe takes the weights by name and the settings, and gives the list of optimizers that together step
all of them. PyTorch's own where it has one, else pytorch-optimizer's, bitsandbytes' for states of 8 bits
and states that move to host memory.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sfumato.errors import Refused, one_of
from sfumato.own import is_own, load_own

from .groups import Groups, grouped
from .settings import TrainSettings

Named = Mapping[str, Tensor]
Optimizers = list[torch.optim.Optimizer]
BETAS = (0.9, 0.99)


def adamw(named: Named, settings: TrainSettings) -> Optimizers:
    """AdamW in one fused kernel (arXiv:1711.05101)."""
    return [torch.optim.AdamW(grouped(named, settings), lr=settings.learning_rate, betas=BETAS, fused=True)]


def adafactor(named: Named, settings: TrainSettings) -> Optimizers:
    """Adafactor: the second moment of a matrix as a row and a column (arXiv:1804.04235)."""
    return [torch.optim.Adafactor(grouped(named, settings), lr=settings.learning_rate)]


def lion(named: Named, settings: TrainSettings) -> Optimizers:
    """Lion; it wants a learning rate three to ten times below AdamW's."""
    return [Lion(grouped(named, settings), lr=settings.learning_rate)]


def muon(named: Named, settings: TrainSettings) -> Optimizers:
    """Muon for matrices, scaled to AdamW's learning rates (arXiv:2502.16982); AdamW for the rest."""
    parts: Optimizers = []
    matrices = {name: weight for name, weight in named.items() if weight.ndim == 2}
    others = {name: weight for name, weight in named.items() if weight.ndim != 2}
    if matrices:
        groups = grouped(matrices, settings)
        parts.append(torch.optim.Muon(groups, lr=settings.learning_rate, adjust_lr_fn="match_rms_adamw"))
    if others:
        parts += adamw(others, settings)
    return parts


def prodigy(named: Named, settings: TrainSettings) -> Optimizers:
    """Prodigy finds its own step size (arXiv:2306.06101); say learning_rate = 1."""
    made = _from("pytorch_optimizer", "Prodigy")
    decay = settings.weight_decay
    return [made(grouped(named, settings), lr=settings.learning_rate, weight_decay=decay)]


def schedule_free(named: Named, settings: TrainSettings) -> Optimizers:
    """AdamW that averages as it goes instead of decaying (arXiv:2405.15682); its average is drawn with."""
    made = _from("pytorch_optimizer", "ScheduleFreeAdamW")
    return [made(grouped(named, settings), lr=settings.learning_rate, betas=BETAS)]


def came(named: Named, settings: TrainSettings) -> Optimizers:
    """CAME: Adafactor's memory with a confidence for each step (arXiv:2307.02047)."""
    return [_from("pytorch_optimizer", "CAME")(grouped(named, settings), lr=settings.learning_rate)]


def ademamix(named: Named, settings: TrainSettings) -> Optimizers:
    """AdEMAMix: AdamW with a second, slow momentum (arXiv:2409.03137)."""
    return [_from("pytorch_optimizer", "AdEMAMix")(grouped(named, settings), lr=settings.learning_rate)]


def _bits_and_bytes(kind: str, paged: bool) -> Callable[[Named, TrainSettings], Optimizers]:
    """A recipe for one of bitsandbytes' optimizers (arXiv:2110.02861)."""

    def recipe(named: Named, settings: TrainSettings) -> Optimizers:
        device = next(iter(named.values())).device
        if paged and device.type != "cuda":
            raise Refused(
                f"A paged optimizer moves its state between GPU and host memory; this run is on {device}. "
                "Choose train.optimizer = adamw or adamw-8bit, or a machine with a GPU."
            )
        made = _from("bitsandbytes.optim", kind)
        groups = grouped(named, settings)
        if kind.startswith("Lion"):
            return [made(groups, lr=settings.learning_rate, betas=BETAS)]
        return [made(groups, lr=settings.learning_rate, betas=BETAS, eps=1e-8)]

    return recipe


def _from(module: str, name: str) -> Callable[..., torch.optim.Optimizer]:
    package = module.partition(".")[0]
    installed = package.replace("_", "-")
    try:
        made = __import__(module, fromlist=[name])
    except ImportError as problem:
        raise Refused(
            f"{name} comes from the package {installed}, which is not installed. "
            f"Run `pip install {installed}`, or choose train.optimizer = adamw, lion, muon or adafactor."
        ) from problem
    return getattr(made, name)


OPTIMIZERS: dict[str, Callable[[Named, TrainSettings], Optimizers]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
    "prodigy": prodigy,
    "schedule-free": schedule_free,
    "came": came,
    "ademamix": ademamix,
    "adamw-8bit": _bits_and_bytes("AdamW8bit", paged=False),
    "lion-8bit": _bits_and_bytes("Lion8bit", paged=False),
    "adamw-paged": _bits_and_bytes("PagedAdamW32bit", paged=True),
    "adamw-8bit-paged": _bits_and_bytes("PagedAdamW8bit", paged=True),
}


def build(named: Named, settings: TrainSettings) -> Optimizers:
    """The optimizers the settings name; `file.py:name` is called with (parameter groups, lr=…).

    Raises:
        Refused: unknown, its package is missing, or the machine cannot.
    """
    name = settings.optimizer
    if is_own(name):
        made = load_own(name)
        return [made(grouped(named, settings), lr=settings.learning_rate)]
    return OPTIMIZERS[one_of("optimizer", name, OPTIMIZERS)](named, settings)


class Lion(torch.optim.Optimizer):
    """w ← (1 − η·decay)·w − η·sign(β₁·m + (1 − β₁)·g),  m ← β₂·m + (1 − β₂)·g.

    Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    def __init__(
        self, params: Groups, lr: float, betas: tuple[float, float] = BETAS, weight_decay: float = 0.0
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
