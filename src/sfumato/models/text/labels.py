"""The conditioner of class-conditional models: names of classes, or their numbers, become labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfumato.errors import Refused, nearest
from sfumato.models.condition import Condition
from sfumato.models.interface import Conditioner, registered


@registered
class LabelConditioner(Conditioner):
    """Class numbers, or the names of classes, → `labels` [B]; one number beyond the last says nothing."""

    kind = "labels"

    def __init__(self, names: Mapping[str, int], count: int):
        """names: of classes, in small letters; count: of classes."""
        super().__init__()
        self.names, self.count = dict(names), count
        self.register_buffer("place", torch.zeros(0), persistent=False)

    def config(self) -> dict[str, Any]:
        """Names and count."""
        return {"names": self.names, "count": self.count}

    def forward(
        self, prompt: Sequence[str], labels: Sequence[int] | None = None, **options: Any
    ) -> Condition:
        """The labels, else those that the prompts name (or write as numbers).

        Raises:
            Refused: for a class that does not exist.
        """
        if options:
            raise Refused(f'A class-conditional model takes no "{next(iter(options))}", only labels.')
        numbers = [self.number(word) for word in prompt] if labels is None else [int(one) for one in labels]
        for number in numbers:
            if not 0 <= number <= self.count:
                raise Refused(f"Class {number} does not exist; choose 0 to {self.count - 1}.")
        return Condition({"labels": torch.tensor(numbers, device=self.get_buffer("place").device)})

    def number(self, word: str) -> int:
        """The class that a prompt names; the empty prompt names none."""
        if not word:
            return self.count
        name = word.strip().lower()
        if name not in self.names and name.isdigit():
            return int(name)
        if name not in self.names:
            raise Refused(f'"{word}" is no class of this model.{nearest(name, self.names)}')
        return self.names[name]

    def encode_empty(self, count: int) -> Condition:
        """The label that says nothing."""
        return self([""] * count)
