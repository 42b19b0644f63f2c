"""A control module is a network beside a denoiser; a controlled denoiser is a base with such modules."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.control.image_encoders import ImageConditionEncoder
from sfumato.models.interface import Denoiser, DenoiserWrapper, Model
from sfumato.models.networks.blocks import again_within


class Hook(NamedTuple):
    """What acts in a module: after it, act(module, args, answer) → answer; or before it, act(module, args,
    named) → (args, named).
    """

    place: nn.Module
    act: Callable[..., Any]
    before: bool = False

    def register(self) -> torch.utils.hooks.RemovableHandle:
        """Let it act from now on."""
        if self.before:
            return self.place.register_forward_pre_hook(self.act, with_kwargs=True)
        return self.place.register_forward_hook(self.act)


@contextmanager
def hooks_applied(hooks: Sequence[Hook]) -> Iterator[None]:
    """While this lasts the hooks act."""
    handles = [hook.register() for hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


WEAK = "is_weak"
"""Marks, [B] bool, the samples of a condition that guidance leans away from."""


def weight_of(condition: Condition, name: str) -> float:
    """How strongly the picture `name` guides: `<name>_weight` of the condition, 1 where it says nothing."""
    said = condition.get(f"{name}_weight")
    return 1.0 if said is None else float(said.flatten()[0])


class ControlModule(nn.Module, ABC):
    """A network that reads the tensor `name` of the condition, and acts on its base while that answers."""

    kind = ""
    trains_base = False
    """Whether the base learns along."""
    always_active = False
    """Whether it acts (to no effect) where its tensor is missing."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values from which the same control module is built around the same base."""

    @abstractmethod
    def encoder(self, model: Model) -> ImageConditionEncoder:
        """How its picture becomes its tensor."""

    @abstractmethod
    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Hook]:
        """What lets the tensor act, for one answer of the base."""

    def unfreeze(self, base: Denoiser) -> None:
        """Let its weights be trained."""
        self.requires_grad_(True)

    @contextmanager
    def removed(self, base: Denoiser) -> Iterator[None]:
        """While this lasts the base is as it would be without the control module, to be written down."""
        yield

    def is_active(self, condition: Condition) -> bool:
        """Whether it has something to say here: its tensor, and a weight that is not 0."""
        return self.always_active or (self.name in condition and bool(weight_of(condition, self.name)))


class ControlledDenoiser(DenoiserWrapper):
    """A denoiser and its control modules; all but what is said here is as the base has it.

    Args:
        base: the denoiser that they act on.
        modules: each reads a tensor of its own name.
    """

    kind = "guided"

    def __init__(self, base: Denoiser, modules: Sequence[ControlModule]) -> None:
        super().__init__()
        self.base, self.guides = base, nn.ModuleList(modules)  # `guides.` is what checkpoints call them
        self.unfreeze()

    def unfreeze(self) -> Self:
        """Let train what is to be trained: the control modules, and the base where one asks for it."""
        self.base.requires_grad_(any(module.trains_base for module in self.control_modules))
        for module in self.control_modules:
            module.unfreeze(self.base)
        return self

    @property
    def control_modules(self) -> list[ControlModule]:
        """The control modules, in order."""
        return list(self.guides)  # type: ignore[arg-type]  # only control modules are put in

    def config(self) -> dict[str, Any]:
        """The base's config, and each control module's."""
        return {"base": self.base.config(), "guides": [module.config() for module in self.control_modules]}

    def encoders(self, model: Model) -> dict[str, ImageConditionEncoder]:
        """How each control module's picture becomes its tensor."""
        return {module.name: module.encoder(model) for module in self.control_modules}

    def trained_weights(self) -> dict[str, Tensor]:
        """The tensors that are trained, by the names of this denoiser's parameters."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def base_condition(self, condition: Condition) -> Condition:
        """The condition as the base reads it: without what control modules read."""
        names = [module.name for module in self.control_modules]
        own = {*names, *(f"{name}_weight" for name in names), WEAK}
        kept = {name: tensor for name, tensor in condition.items() if name not in own}
        return Condition(kept, size=condition.size, negative=condition.negative)

    def forward(self, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """The base's answer while the control modules act on it, now and when a block is computed again."""
        active = [module for module in self.control_modules if module.is_active(condition)]
        hooks = [hook for module in active for hook in module.hooks(self.base, x, condition)]
        with hooks_applied(hooks), again_within(lambda: hooks_applied(hooks)):
            return self.base(x, clock, self.base_condition(condition))

    # ---------------------------------------------------------------- what is not as the base has it

    supports_packing = False
    """Guides read pictures in batches of one shape."""

    def finalize_latents(self, x: Tensor, condition: Condition) -> Tensor:
        """As the base, which knows nothing of what control modules read."""
        return self.base.finalize_latents(x, self.base_condition(condition))

    def mask_error(self, error: Tensor, condition: Condition) -> Tensor:
        """As the base, which knows nothing of what control modules read."""
        return self.base.mask_error(error, self.base_condition(condition))

    def check_context_parallel(self, count: int) -> None:
        """Raises Refused: what control modules read is not shared among processes."""
        raise Refused(
            "train.context_parallel shares the tokens of each sample among processes; pictures that guide "
            "are not shared. Leave train.context_parallel at 1."
        )

    def enable_context_parallel(self, mesh: Any) -> None:
        """Nothing to end; to begin is refused."""
        if mesh is not None:
            self.check_context_parallel(mesh.size())
