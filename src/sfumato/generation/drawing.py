"""What is decided before a picture is begun: when the network is asked, and what guides its answers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .frames import Framed
from .guiding import Guiding
from .leaning import GuidanceOptions
from .regions import Regions


@dataclass(frozen=True)
class Course:
    """When the network is asked, and how its answers become steps.

    grid: of times, or None for `steps` evaluations of the solver's own choice; scale: of the first state;
    clip: the bound within which a pretrained pipeline keeps the clean sample; walks: whether its scheduler
    takes the steps itself.
    """

    grid: Any
    steps: int
    solver: str | None = None
    order: int | None = None
    scale: float = 1.0
    clip: float | None = None
    walks: bool = False


@dataclass(frozen=True)
class Drawing:
    """All that is decided before the first picture is begun; `options` are left for the conditioner."""

    shape: tuple[int, ...]
    guidance: float
    course: Course
    shows: Guiding
    framed: Framed
    how: GuidanceOptions
    regions: Regions
    extra_guidance: Mapping[str, Any]
    options: dict[str, Any]

    def part(self, rows: slice) -> "Drawing":
        """What is decided about some of the pictures."""
        return replace(self, shows=self.shows.part(rows), framed=self.framed.part(rows))
