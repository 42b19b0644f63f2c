"""The options of `sfumato data`, each declared once, with its help."""

from pathlib import Path
from typing import Annotated, Optional

import typer

# typer reads Optional[...] on every Python that is supported: hence no X | None in this file
# ruff: noqa: UP045

# Of a set of pictures or clips
Captions = Annotated[
    Optional[str],
    typer.Option(metavar="WHERE", help="files, folder (class names) or none.", show_default="files"),
]
Resolution = Annotated[
    Optional[int], typer.Option(metavar="N", min=16, help="Plan for N x N pixels.", show_default="256")
]
Buckets = Annotated[
    Optional[int], typer.Option(metavar="N", min=1, help="Shapes in the plan.", show_default="5")
]
Frames = Annotated[
    Optional[int], typer.Option(metavar="N", min=1, help="Frames a clip must have.", show_default="16")
]
Fps = Annotated[
    Optional[float], typer.Option(metavar="X", min=0.1, help="Frames a second.", show_default="8")
]
Rate = Annotated[Optional[float], typer.Option(min=0.1, hidden=True, help="The former name of --fps.")]
"""Read with a note: `options.RENAMED_OPTIONS`."""
Model = Annotated[
    Optional[str],
    typer.Option(
        metavar="MODEL",
        help="Whose tokenizer counts: minilm, none, a model's folder.",
        show_default="minilm, of a recipe its own",
    ),
]

# Of a store
Collect = Annotated[
    bool, typer.Option("--collect", help="Of a store: remove what nobody needs; without it, say what.")
]
Keep = Annotated[
    Optional[list[Path]],
    typer.Option(metavar="RECIPE", help="Of a store: also keep what this recipe needs; repeat it."),
]
Days = Annotated[
    float, typer.Option(metavar="N", min=0, help="Of a store: keep what is younger, whoever needs it.")
]
