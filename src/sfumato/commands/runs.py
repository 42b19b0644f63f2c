"""The commands that make and keep runs: encode, train, report."""

from pathlib import Path

from sfumato import paths
from sfumato.commands.console import progress, result, say
from sfumato.commands.early import checked_recipe
from sfumato.run_folder import RunFolder, check_output


def encode(recipe: Path, overrides: list[str], workers: int, as_json: bool) -> None:
    """Encode what the store lacks, and print counts; workers > 0 are started by Ray."""
    checked_recipe(recipe, overrides)
    from sfumato import workflow
    from sfumato.workflow.train_run import encode_on_cluster

    with progress() as bars:
        if workers:
            found = encode_on_cluster(recipe, overrides, workers, bars, say)
        else:
            found = workflow.encode(recipe, overrides, bars, say)
    counts = {"samples": len(found.train), "held_out": len(found.held_out), "set_aside": found.set_aside}
    store = str(found.train.store.root)
    text = f"{counts['samples']} samples and {counts['held_out']} held out are in {store}"
    result({**found.train.counts, **counts, "store": store}, text, as_json)


def train(recipe: Path, overrides: list[str], profile: bool, as_json: bool) -> None:
    """Train, and print the run's folder and page."""
    checked_recipe(recipe, overrides)
    from sfumato import workflow

    with progress() as bars:
        run = workflow.train(recipe, overrides, bars, say, profile)
    value = {"run": run.path, "step": run.step, "report": run.report}
    result(value, f"{run.path}\n{run.report}", as_json)


def report(run: Path) -> None:
    """Write the run's page, and print its path."""
    from sfumato.report import run_page as pages

    page = pages.write(run)
    result({"page": page}, str(page), False)


def ema(run: Path, length: float, step: int | None, out: Path | None, as_json: bool) -> None:
    """Write the model averaged over `length` of the run, and print its folder."""
    RunFolder.open(run)
    if out is not None:
        check_output(out)
    from sfumato.workflow.averaging import average

    made = average(run, length, step, out)
    text = f"Averaged over {length:g} of the run, as it was at step {made.step:,}"
    say(f"{text}; the profile is missed by {made.missed:.2%}. Draw: {paths.command('generate', made.folder)}")
    value = {"model": made.folder, "length": length, "step": made.step, "missed": made.missed}
    result(value, str(made.folder), as_json)
