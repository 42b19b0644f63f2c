"""What a picture was drawn with, defaults included: what its file and its page say."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sfumato.generation import files
from sfumato.generation.pipeline import DEFAULT_GUIDANCE, DEFAULT_STEPS, Pipeline


def effective_settings(model: Pipeline, options: Mapping[str, Any], drawn: Any) -> dict[str, Any]:
    """The steps, guidance, solver and size that `generate` drew one picture or clip with.

    Args:
        options: the arguments of `generate`; what they leave out was as the model has it.
        drawn: the picture, or the clip [F, H, W, 3].
    """
    steps = options.get("steps")
    guidance = options.get("guidance")
    size = {name: options.get(name) for name in ("width", "height", "frames")}
    schedule = model.schedule(model.latent_shape(**size), steps, options.get("times"), options.get("solver"))
    solver = schedule.solver or "auto"
    if schedule.uses_own_scheduler and model.sampling is not None:
        solver = type(model.sampling.scheduler).__name__
    found = {
        "steps": int(model.info.get("steps", DEFAULT_STEPS)) if steps is None else steps,
        "guidance": float(model.info.get("guidance", DEFAULT_GUIDANCE)) if guidance is None else guidance,
        "solver": solver,
    }
    if options.get("times") is not None and not isinstance(options["times"], str):
        found["steps"] = len(np.asarray(options["times"])) - 1
    if files.is_clip(drawn):
        return {**found, "width": drawn.shape[2], "height": drawn.shape[1], "frames": drawn.shape[0]}
    return {**found, "width": drawn.width, "height": drawn.height}
