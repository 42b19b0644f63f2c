"""The commands below `sfumato theory`."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from sfumato.commands.exits import with_exit_code, with_trust
from sfumato.commands.options import Device, Guidance, Json, out_option

theories = typer.Typer(
    help="Theories: list, show, check, compare, fit.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@theories.command("list")
@with_exit_code
def list_theories(json: Json = False) -> None:
    """Name the theories and the solvers."""
    from sfumato.commands import theory_reports

    theory_reports.show_list(json)


TheoryName = Annotated[str, typer.Argument(metavar="THEORY", help="A name of the list, or FILE.py:NAME.")]


@theories.command("show")
@with_exit_code
def show_theory(
    name: TheoryName,
    out: Annotated[Path, out_option("runs/theory")] = Path("runs/theory"),
    json: Json = False,
) -> None:
    """Plot a theory, as a page.

    Its two definitions, and what follows from them.
    """
    from sfumato.commands import theory_reports

    theory_reports.show(name, out, json)


@theories.command("check")
@with_exit_code
def check_theory(
    name: TheoryName,
    out: Annotated[Path, out_option("runs/theory")] = Path("runs/theory"),
    json: Json = False,
) -> None:
    """Verify a theory.

    Against its own algebra and an exact oracle; exit code 1 if it fails.
    """
    from sfumato.commands import theory_reports

    theory_reports.check(name, out, json)


@theories.command("compare")
@with_exit_code
def compare_solvers(
    name: TheoryName,
    budget: Annotated[int, typer.Option(metavar="N", min=2, help="Network evaluations.")] = 20,
    out: Annotated[Path, out_option("runs/theory")] = Path("runs/theory"),
    json: Json = False,
) -> None:
    """Compare solvers and grids.

    On a problem whose exact answer is known, at one budget of network evaluations.
    """
    from sfumato.commands import theory_reports

    theory_reports.compare(name, budget, out, json)


@theories.command("fit")
@with_exit_code
@with_trust
def fit_times(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a model or of a run.")],
    prompt: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="TEXT", help="What the pilot draws; repeat it. Default: the run's own prompts."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=4, help="Pictures of the pilot.")] = 32,
    steps: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(metavar="N", min=3, help="Evaluations to fit to; repeat it. Default: 5, 8 and 16."),
    ] = None,
    guidance: Guidance = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the pilot's noise.")] = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Fit sampling times to a model.

    A pilot of a few dozen pictures places the times where this model needs them. They are kept beside its
    weights, for any number of steps, and generate uses them.
    """
    from sfumato.commands import theory_fit

    theory_fit.fit(model, prompt or [], samples, steps or [], guidance, seed, device, json)
