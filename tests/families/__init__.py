"""Every family's tiny pipeline is in the zoo as soon as one test asks for it."""

from . import clips, pictures

__all__ = ["clips", "pictures"]
