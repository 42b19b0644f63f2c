"""The optimizers there are: a short recipe of how each treats matrices and the rest, and a table of facts.

A recipe takes the weights by name and the settings, and gives the list of optimizers that together step
all of them. PyTorch's own where it has one, else pytorch-optimizer's, bitsandbytes' for states of 8 bits
and states that move to host memory. The table is all that memory and processes ask of an optimizer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sfumato.errors import Refused, one_of
from sfumato.training.optim.lion import Lion
from sfumato.training.optim.param_groups import param_groups
from sfumato.training.settings import TrainSettings
from sfumato.user_code import is_user_code, load_user_object

Named = Mapping[str, torch.Tensor]
Optimizers = list[torch.optim.Optimizer]
BETAS = (0.9, 0.99)


def adamw(named: Named, settings: TrainSettings) -> Optimizers:
    """AdamW in one fused kernel (arXiv:1711.05101)."""
    return [
        torch.optim.AdamW(param_groups(named, settings), lr=settings.learning_rate, betas=BETAS, fused=True)
    ]


def adafactor(named: Named, settings: TrainSettings) -> Optimizers:
    """Adafactor: the second moment of a matrix as a row and a column (arXiv:1804.04235)."""
    return [torch.optim.Adafactor(param_groups(named, settings), lr=settings.learning_rate)]


def lion(named: Named, settings: TrainSettings) -> Optimizers:
    """Lion; it wants a learning rate three to ten times below AdamW's."""
    return [Lion(param_groups(named, settings), lr=settings.learning_rate)]


def muon(named: Named, settings: TrainSettings) -> Optimizers:
    """Muon for matrices, scaled to AdamW's learning rates (arXiv:2502.16982); AdamW for the rest."""
    parts: Optimizers = []
    matrices = {name: weight for name, weight in named.items() if weight.ndim == 2}
    others = {name: weight for name, weight in named.items() if weight.ndim != 2}
    if matrices:
        groups = param_groups(matrices, settings)
        parts.append(torch.optim.Muon(groups, lr=settings.learning_rate, adjust_lr_fn="match_rms_adamw"))
    if others:
        parts += adamw(others, settings)
    return parts


def prodigy(named: Named, settings: TrainSettings) -> Optimizers:
    """Prodigy finds its own step size (arXiv:2306.06101); say learning_rate = 1."""
    made = _imported("pytorch_optimizer", "Prodigy")
    decay = settings.weight_decay
    return [made(param_groups(named, settings), lr=settings.learning_rate, weight_decay=decay)]


def schedule_free(named: Named, settings: TrainSettings) -> Optimizers:
    """AdamW that averages as it goes instead of decaying (arXiv:2405.15682); its average is drawn with."""
    made = _imported("pytorch_optimizer", "ScheduleFreeAdamW")
    return [made(param_groups(named, settings), lr=settings.learning_rate, betas=BETAS)]


def came(named: Named, settings: TrainSettings) -> Optimizers:
    """CAME: Adafactor's memory with a confidence for each step (arXiv:2307.02047)."""
    return [_imported("pytorch_optimizer", "CAME")(param_groups(named, settings), lr=settings.learning_rate)]


def ademamix(named: Named, settings: TrainSettings) -> Optimizers:
    """AdEMAMix: AdamW with a second, slow momentum (arXiv:2409.03137)."""
    return [
        _imported("pytorch_optimizer", "AdEMAMix")(param_groups(named, settings), lr=settings.learning_rate)
    ]


def _bits_and_bytes(kind: str) -> Callable[[Named, TrainSettings], Optimizers]:
    """A recipe for one of bitsandbytes' optimizers (arXiv:2110.02861)."""

    def recipe(named: Named, settings: TrainSettings) -> Optimizers:
        device = next(iter(named.values())).device
        if kind.startswith("Paged") and device.type != "cuda":
            raise Refused(
                f"A paged optimizer moves its state between GPU and host memory; this run is on {device}. "
                "Choose train.optimizer = adamw or adamw-8bit, or a machine with a GPU."
            )
        made = _imported("bitsandbytes.optim", kind)
        groups = param_groups(named, settings)
        if kind.startswith("Lion"):
            return [made(groups, lr=settings.learning_rate, betas=BETAS)]
        return [made(groups, lr=settings.learning_rate, betas=BETAS, eps=1e-8)]

    return recipe


def _imported(module: str, name: str) -> Callable[..., torch.optim.Optimizer]:
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


@dataclass(frozen=True)
class OptimizerSpec:
    """All that is known of an optimizer outside of it.

    Args:
        build: the optimizers that together step the weights given by name.
        states: float32 numbers it keeps for each weight.
        temporary: those it needs for each weight while it steps, when the activations are gone.
        is_elementwise: it moves each number by its own history alone, so that rows can be moved apart.
        is_paged: its numbers lie in host memory.
        keeps_average: it holds the average that is drawn with, and no other is kept beside it.
        needs_float32: it must see all weights at once, or keeps an average in them.
        package: where it comes from, if not from torch or from here.
    """

    build: Callable[[Named, TrainSettings], Optimizers]
    states: float = 2
    temporary: float = 0
    is_elementwise: bool = False
    is_paged: bool = False
    keeps_average: bool = False
    needs_float32: bool = False
    package: str = ""

    @property
    def states_on_device(self) -> float:
        """Of `states`, those that take the device's memory."""
        return 0 if self.is_paged else self.states

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a trained number in float32: the weight, its gradient, the states, and the average."""
        return 4 * (2 + self.states_on_device + (not self.keeps_average))


PYTORCH_OPTIMIZER, BITSANDBYTES = "pytorch_optimizer", "bitsandbytes"
OPTIMIZERS: dict[str, OptimizerSpec] = {
    "adamw": OptimizerSpec(adamw, is_elementwise=True),
    "adafactor": OptimizerSpec(adafactor, states=0.01),
    "lion": OptimizerSpec(lion, states=1, temporary=1, is_elementwise=True),
    "muon": OptimizerSpec(muon, states=1),
    "prodigy": OptimizerSpec(prodigy, states=4, needs_float32=True, package=PYTORCH_OPTIMIZER),
    "schedule-free": OptimizerSpec(
        schedule_free, is_elementwise=True, keeps_average=True, needs_float32=True, package=PYTORCH_OPTIMIZER
    ),
    "came": OptimizerSpec(came, states=1.01, package=PYTORCH_OPTIMIZER),
    "ademamix": OptimizerSpec(ademamix, states=3, is_elementwise=True, package=PYTORCH_OPTIMIZER),
    "adamw-8bit": OptimizerSpec(_bits_and_bytes("AdamW8bit"), states=0.52, package=BITSANDBYTES),
    "lion-8bit": OptimizerSpec(_bits_and_bytes("Lion8bit"), states=0.26, package=BITSANDBYTES),
    "adamw-paged": OptimizerSpec(_bits_and_bytes("PagedAdamW32bit"), is_paged=True, package=BITSANDBYTES),
    "adamw-8bit-paged": OptimizerSpec(
        _bits_and_bytes("PagedAdamW8bit"), states=0.52, is_paged=True, package=BITSANDBYTES
    ),
}


def spec_of(name: str) -> OptimizerSpec:
    """What is known of an optimizer; of `file.py:name` what most have in common.

    Raises:
        Refused: unknown.
    """
    if is_user_code(name):
        return OptimizerSpec(_user_optimizer, is_elementwise=True)
    return OPTIMIZERS[one_of("train.optimizer", name, OPTIMIZERS)]


def _user_optimizer(named: Named, settings: TrainSettings) -> Optimizers:
    """A user's own, which is called with (parameter groups, lr=…)."""
    return [load_user_object(settings.optimizer)(param_groups(named, settings), lr=settings.learning_rate)]


def new_optimizer(named: Named, settings: TrainSettings) -> Optimizers:
    """The optimizers the settings name.

    Raises:
        Refused: unknown, its package is missing, or the machine cannot.
    """
    return spec_of(settings.optimizer).build(named, settings)
