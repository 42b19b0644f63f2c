"""The command that writes files for elsewhere."""

from pathlib import Path

import torch

from sfumato.commands.console import result
from sfumato.errors import one_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(run: Path, to: str, out: Path | None, triggers: list[str], dtype: str, as_json: bool) -> None:
    """Write a run for diffusers, ComfyUI or kohya, and say how near the loaded file answers to the run."""
    from sfumato.workflow.export import export as write

    number = DTYPES[one_of("--dtype", dtype, DTYPES)]
    done = write(run, to, out or Path("runs/export") / f"{run.name}-{to}", triggers, number)
    lines = [str(file) for file in done.files]
    lines.append(f"loaded back: the largest difference is {done.difference:.1e} of the answer's deviation")
    if done.effect:
        lines.append(f"the adapter changes the answer by {done.effect:.1e} of its deviation")
    found = {
        "files": done.files,
        "difference": done.difference,
        "effect": done.effect,
        "metadata": dict(done.metadata),
    }
    result(found, "\n".join(lines), as_json)
