"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from sfumato.errors import Refused

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML), or a run's folder.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads older annotations too
    typer.Argument(metavar="[KEY=VALUE]...", help="Values that go before the recipe's: train.steps=100."),
]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout.")]
Steps = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(metavar="N", min=1, help="Network evaluations a picture; default: the model's own."),
]
Guidance = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(metavar="X", help="Lean towards the prompt, 1 is not at all; default: the model's own."),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")]

RENAMED_OPTIONS = {
    "guide": "control_module",
    "guidance_perturbed": "pag_scale",
    "guidance_by": "autoguidance_model",
    "context": "context_parallel",
    "rate": "fps",
}
"""Options of 0.1 and what they are called now, as recipes call them; the former are hidden in the help."""


def with_present_names(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names that options have now, with a note for each former one.

    Raises:
        Refused: an option that is given by both its names.
    """
    from sfumato.commands.console import say

    arguments = dict(arguments)
    for old, new in RENAMED_OPTIONS.items():
        value = arguments.pop(old, None)
        if value is None or value == []:
            continue
        former, present = (f"--{name.replace('_', '-')}" for name in (old, new))
        if arguments.get(new) not in (None, []):
            raise Refused(f"{former} is the former name of {present}. Give {present} alone.")
        say(f"{former} is called {present} now.")
        arguments[new] = value
    return arguments


def out_option(default: str) -> typer.models.OptionInfo:
    """The option --out of a command that writes, with its default folder."""
    return typer.Option(metavar="DIR", help="The folder to write into.", show_default=default)
