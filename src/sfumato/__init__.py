"""sfumato: trains diffusion models for images and video, and draws with them.

The public names load on first use, so that `import sfumato` is instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load": "sfumato.generation",
    "encode": "sfumato.workflow",
    "train": "sfumato.workflow",
    "Theory": "sfumato.theory",
    "Refused": "sfumato.errors",
    "Failed": "sfumato.errors",
}

__all__ = ["Failed", "Refused", "Theory", "__version__", "encode", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sfumato' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
