"""A guide is a network beside a denoiser; a guided denoiser is its base with guides around it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from sfumato.stages.image import Encoder
from sfumato.stages.interface import Condition, Denoiser, Model

WEAK = "is_weak"
"""Marks, [B] bool, the samples of a condition that guidance leans away from."""


def weight_of(condition: Condition, name: str) -> float:
    """How strongly the picture `name` guides: `<name>_weight` of the condition, 1 where it says nothing."""
    said = condition.get(f"{name}_weight")
    return 1.0 if said is None else float(said.flatten()[0])


class Guide(nn.Module, ABC):
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
    def encoder(self, model: Model) -> Encoder:
        """How its picture becomes its tensor."""

    @abstractmethod
    def hooks(
        self, base: Denoiser, x: Tensor, condition: Condition
    ) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Hooks that let the tensor act, for one answer of the base."""

    def free(self, base: Denoiser) -> None:
        """Let its weights be trained."""
        self.requires_grad_(True)

    @contextmanager
    def aside(self, base: Denoiser) -> Iterator[None]:
        """While this lasts the base is as it would be without the guide, to be written down."""
        yield

    @contextmanager
    def around(self, base: Denoiser, x: Tensor, condition: Condition) -> Iterator[None]:
        """While this lasts the guide acts, if the condition holds its tensor and its weight is not 0."""
        handles = []
        try:
            if self.always or (self.name in condition and weight_of(condition, self.name)):
                handles += self.hooks(base, x, condition)
            yield
        finally:
            for handle in handles:
                handle.remove()


class GuidedDenoiser(Denoiser):
    """A denoiser and its guides.

    Args:
        base: the denoiser that is guided.
        guides: each reads a tensor of its own name.
    """

    kind = "guided"

    def __init__(self, base: Denoiser, guides: Sequence[Guide]) -> None:
        super().__init__()
        self.base, self.guides = base, nn.ModuleList(guides)
        for name in ("lora_targets", "framing", "grain", "own_name", "family", "knobs"):
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))
        self.free()

    def free(self) -> Self:
        """Let train what is to be trained: the guides, and the base where one of them asks for it."""
        self.base.requires_grad_(any(guide.trains_base for guide in self.listed))
        for guide in self.listed:
            guide.free(self.base)
        return self

    @property
    def listed(self) -> list[Guide]:
        """The guides, in order."""
        return list(self.guides)  # type: ignore[arg-type]  # only guides are put in

    @property
    def network(self) -> nn.Module:
        """The base's own network, for whoever looks inside."""
        return getattr(self.base, "network", self.base)

    def config(self) -> dict[str, Any]:
        """The base's config, and each guide's."""
        return {"base": self.base.config(), "guides": [guide.config() for guide in self.listed]}

    def encoders(self, model: Model) -> dict[str, Encoder]:
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
        """The base's answer while the guides act on it."""
        with ExitStack() as stack:
            for guide in self.listed:
                stack.enter_context(guide.around(self.base, x, condition))
            return self.base(x, clock, self.without(condition))

    def told(self, condition: Condition, guidance: float) -> Condition:
        """As the base."""
        return self.base.told(condition, guidance)

    def leans(self, guidance: float, asked: bool) -> bool:
        """As the base."""
        return self.base.leans(guidance, asked)

    def lean(self, strong: Tensor, weak: Tensor, guidance: float) -> Tensor:
        """As the base."""
        return self.base.lean(strong, weak, guidance)

    def scale(self, guidance: float, t: float, knobs: Mapping[str, Any]) -> float:
        """As the base."""
        ask = getattr(self.base, "scale", None)
        return guidance if ask is None else ask(guidance, t, knobs)

    def finish(self, x: Tensor, condition: Condition) -> Tensor:
        """As the base."""
        ask = getattr(self.base, "finish", None)
        return x if ask is None else ask(x, self.without(condition))
