"""A guide is a network beside a denoiser; a guided denoiser is its base with guides around it."""

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

    def put(self) -> torch.utils.hooks.RemovableHandle:
        """Let it act from now on."""
        if self.before:
            return self.place.register_forward_pre_hook(self.act, with_kwargs=True)
        return self.place.register_forward_hook(self.act)


@contextmanager
def hooks_applied(hooks: Sequence[Hook]) -> Iterator[None]:
    """While this lasts the hooks act."""
    handles = [hook.put() for hook in hooks]
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
    always = False
    """Whether it acts (to no effect) where its tensor is missing."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values from which the same guide is built around the same base."""

    @abstractmethod
    def encoder(self, model: Model) -> ImageConditionEncoder:
        """How its picture becomes its tensor."""

    @abstractmethod
    def hooks(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[Hook]:
        """What lets the tensor act, for one answer of the base."""

    def free(self, base: Denoiser) -> None:
        """Let its weights be trained."""
        self.requires_grad_(True)

    @contextmanager
    def aside(self, base: Denoiser) -> Iterator[None]:
        """While this lasts the base is as it would be without the guide, to be written down."""
        yield

    def acts(self, condition: Condition) -> bool:
        """Whether it has something to say here: its tensor, and a weight that is not 0."""
        return self.always or (self.name in condition and bool(weight_of(condition, self.name)))


class ControlledDenoiser(DenoiserWrapper):
    """A denoiser and its guides; all but what is said here is as the base has it.

    Args:
        base: the denoiser that is guided.
        guides: each reads a tensor of its own name.
    """

    kind = "guided"

    def __init__(self, base: Denoiser, guides: Sequence[ControlModule]) -> None:
        super().__init__()
        self.base, self.guides = base, nn.ModuleList(guides)
        self.free()

    def free(self) -> Self:
        """Let train what is to be trained: the guides, and the base where one of them asks for it."""
        self.base.requires_grad_(any(guide.trains_base for guide in self.listed))
        for guide in self.listed:
            guide.free(self.base)
        return self

    @property
    def listed(self) -> list[ControlModule]:
        """The guides, in order."""
        return list(self.guides)  # type: ignore[arg-type]  # only guides are put in

    def config(self) -> dict[str, Any]:
        """The base's config, and each guide's."""
        return {"base": self.base.config(), "guides": [guide.config() for guide in self.listed]}

    def encoders(self, model: Model) -> dict[str, ImageConditionEncoder]:
        """How each guide's picture becomes its tensor."""
        return {guide.name: guide.encoder(model) for guide in self.listed}

    def learned(self) -> dict[str, Tensor]:
        """The tensors that are trained, by the names of this denoiser's parameters."""
        return {name: weight for name, weight in self.named_parameters() if weight.requires_grad}

    def without(self, condition: Condition) -> Condition:
        """The condition as the base hears it: without what guides read."""
        own = {end for guide in self.listed for end in (guide.name, f"{guide.name}_weight")} | {WEAK}
        kept = {name: tensor for name, tensor in condition.items() if name not in own}
        return Condition(kept, size=condition.size, negative=condition.negative)

    def forward(self, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """The base's answer while the guides act on it, now and when a block is computed again."""
        active = [guide for guide in self.listed if guide.acts(condition)]
        hooks = [hook for guide in active for hook in guide.hooks(self.base, x, condition)]
        with hooks_applied(hooks), again_within(lambda: hooks_applied(hooks)):
            return self.base(x, clock, self.without(condition))

    # ---------------------------------------------------------------- what is not as the base has it

    supports_packing = False
    """Guides read pictures in batches of one shape."""

    def finalize_latents(self, x: Tensor, condition: Condition) -> Tensor:
        """As the base, which knows nothing of what guides read."""
        return self.base.finalize_latents(x, self.without(condition))

    def mask_error(self, error: Tensor, condition: Condition) -> Tensor:
        """As the base, which knows nothing of what guides read."""
        return self.base.mask_error(error, self.without(condition))

    def check_context_parallel(self, count: int) -> None:
        """Raises Refused: what guides read is not shared among processes."""
        raise Refused(
            "train.context_parallel shares the tokens of each sample among processes; pictures that guide "
            "are not shared. Leave train.context_parallel at 1."
        )

    def enable_context_parallel(self, mesh: Any) -> None:
        """Nothing to end; to begin is refused."""
        if mesh is not None:
            self.check_context_parallel(mesh.size())
