"""How many samples are asked for at once: as many as memory has room for, found by trying.

What is asked of each sample alone (an encoding, a picture, a loss without its gradient) is the same however
many are asked with it, so that half as many at once may be asked for where memory is out.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from sfumato.errors import Failed

T = TypeVar("T")


class AtOnce:
    """Asks for samples in slices; where memory is out, for half as many at once from then on.

    Args:
        what: the samples, for sentences ("pictures to encode"). way_out: what to do where not even one fits.
        say: hears of it when fewer are asked for.
    """

    def __init__(self, what: str, way_out: str, say: Callable[[str], None] = lambda sentence: None) -> None:
        self.what, self.way_out, self.say = what, way_out, say
        self.most: int | None = None

    def __call__(self, ask: Callable[[slice], T], count: int) -> list[T]:
        """The answers of `ask` for slices of `count` samples, in their order.

        Raises:
            Failed: not even one sample fits.
        """
        found: list[T] = []
        first = 0
        while first < count:
            size = min(count - first, self.most or count)
            answer = self._tried(ask, slice(first, first + size))
            if answer is not None:
                found.append(answer[0])
                first += size
                continue
            if size == 1:
                raise Failed(f"Memory is used up by one of the {self.what} alone. {self.way_out}")
            self.most = size // 2
            self.say(f"Memory is used up by {size} {self.what} at once; {self.most} at once from now on.")
        return found

    @staticmethod
    def _tried(ask: Callable[[slice], T], some: slice) -> tuple[T] | None:
        """The answer; None where memory is out, when all that was computed is let go."""
        try:
            return (ask(some),)
        except torch.OutOfMemoryError:
            pass
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()
        return None
