"""Every pretrained network we speak to, one file each; listed by reading this folder."""

import pkgutil
from functools import cache
from importlib import import_module

from sfumato.models.pretrained.family import Family


@cache
def families() -> dict[str, Family]:
    """Families by the name of their file."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        home = import_module(f"{__name__}.{module.name}")
        for value in vars(home).values():
            if isinstance(value, type) and issubclass(value, Family) and value.__module__ == home.__name__:
                found[module.name] = value()
    return found


def pipelines() -> dict[str, Family]:
    """Families by the diffusers pipelines they read."""
    return {pipeline: family for family in families().values() for pipeline in family.pipelines}
