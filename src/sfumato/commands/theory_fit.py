"""The command that fits sampling times to a model."""

from pathlib import Path

from sfumato.commands.console import progress, result
from sfumato.errors import Refused


def fit(
    folder: Path,
    prompts: list[str],
    samples: int,
    steps: list[int],
    guidance: float | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Fit times to a model or run, keep them beside its weights if they help, and say what they are worth."""
    from sfumato.generation import load
    from sfumato.generation.fit_times import fit_times
    from sfumato.models.io.fitted_times import TIMES, home_of, write_times
    from sfumato.training.device import resolve

    home = home_of(folder)
    model = load(folder, device=str(resolve(device)))
    drawn_prompts = prompts or usual_prompts(folder)
    if not drawn_prompts and model.conditioner.kind != "none":
        raise Refused('Say what the pilot draws: --prompt "a red apple". Repeat --prompt for several.')
    budgets = sorted(set(steps)) or [5, 8, 16]
    with progress() as bars:
        found = fit_times(
            model,
            drawn_prompts or [""],
            samples,
            seed,
            guidance,
            budgets,
            watch=lambda done, total: bars(done, total, "fitting times"),
        )
    lines = [
        f"{n:>4} evaluations: error {before:.3g} at the default times, {after:.3g} at the fitted ones"
        for n, (before, after) in found.errors.items()
    ]
    file = write_times(home, found.pilot) if found.helps else None
    lines.append(
        f"Kept in {file}; generate uses them from now on. Delete the file to go back."
        if file
        else f"Not kept: on other noise the default times are no worse. {home / TIMES} is as it was."
    )
    value = {
        "file": file,
        "kept": found.helps,
        "errors": {str(n): {"default": a, "fitted": b} for n, (a, b) in found.errors.items()},
        "times": found.pilot.to_dict(),
    }
    result(value, "\n".join(lines), as_json)


def usual_prompts(folder: Path) -> list[str]:
    """The prompts a run draws while it trains, none where there are none."""
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    file = run / "effective.toml"
    if not file.is_file():
        return []
    from sfumato.recipe import Recipe

    return [str(prompt) for prompt in Recipe.read(run).sample.prompts]
