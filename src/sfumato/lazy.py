"""Names that load on first use: a package lists where each lives, and pays only for those that are asked.

A type checker never sees this: beside it each package imports the same names under `TYPE_CHECKING`, so that
they keep their types and a misspelt one is an error.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def names_from(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Args:
        package: its `__name__`.
        homes: public name → the module that holds it, relative to the package (".interface").
    Raises (when called):
        AttributeError: for a name that is not listed.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(homes[name], package), name)

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, listed
