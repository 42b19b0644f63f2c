"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Optional

import typer

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


def out_option(default: str) -> typer.models.OptionInfo:
    """The option --out of a command that writes, with its default folder."""
    return typer.Option(metavar="DIR", help="The folder to write into.", show_default=default)
