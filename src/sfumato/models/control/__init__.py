"""Control modules (ControlNet, IP-Adapter, …): networks beside a denoiser that let a picture guide it.

A control module reads tensors of the condition (`control`, `reference`, `edit_source`) and reaches into its
base by hooks, so the base's own code knows nothing of it. Where its tensor is missing, and before it has
learned anything, the answer is the base's own, bit for bit. Files of models and runs call them guides
(`guides.json`, `guides.safetensors`).
"""

from sfumato.models.control.base import WEAK, ControlledDenoiser, ControlModule, weight_of
from sfumato.models.control.control_plan import KINDS, ControlPlan, add_control_modules, plans_of
from sfumato.models.control.load import attach

__all__ = [
    "KINDS",
    "WEAK",
    "ControlModule",
    "ControlPlan",
    "ControlledDenoiser",
    "add_control_modules",
    "attach",
    "plans_of",
    "weight_of",
]
