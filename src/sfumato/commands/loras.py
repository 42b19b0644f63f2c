"""The commands that look into LoRA files and make others of them."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from sfumato.commands.exits import with_exit_code
from sfumato.commands.options import Json

# typer reads Optional[...] on every Python that is supported: hence no X | None in this file
# ruff: noqa: UP045

loras = typer.Typer(
    help="Look into LoRA files; convert, merge, resize and extract them.", no_args_is_help=True
)

File = Annotated[
    Path, typer.Argument(metavar="FILE", help="A LoRA (diffusers', ComfyUI's, kohya's, LyCORIS').")
]
Base = Annotated[
    Path, typer.Option(metavar="MODEL", help="The model it is for: a pipeline's folder, a file.")
]
To = Annotated[str, typer.Option(metavar="WHERE", help="diffusers, comfyui or kohya.")]
Rank = Annotated[Optional[int], typer.Option(metavar="N", help="The rank of each layer, at most.")]
Energy = Annotated[
    Optional[float],
    typer.Option(metavar="SHARE", help="As low a rank as keeps this share of each layer's change, as 0.95."),
]
Out = Annotated[
    Optional[Path],
    typer.Option(metavar="DIR", help="The folder to write into.", show_default="runs/lora/NAME-WHERE"),
]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="Of the tensors: float32, bfloat16 or float16.")]


@loras.command()
@with_exit_code
def info(
    file: File,
    base: Annotated[
        Optional[Path],
        typer.Option(metavar="MODEL", help="Also say how large the changes are beside this model's weights."),
    ] = None,
    json: Json = False,
) -> None:
    """Say what a file is: its kind, ranks, words, and where it changes how much."""
    from sfumato.commands.console import result
    from sfumato.workflow.lora_files import lora_info

    found = lora_info(file, base)
    result({**asdict(found), "file": found.file}, "\n".join(lines_of(found)), json)


@loras.command()
@with_exit_code
def convert(
    file: File,
    base: Base,
    to: To,
    out: Out = None,
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Write a file under the names that another program reads; what it does stays the same."""
    write([str(file)], base, to, out, None, None, dtype, json)


@loras.command()
@with_exit_code
def merge(
    files: Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="LoRAs of one base.")],
    base: Base,
    to: To = "comfyui",
    rank: Rank = None,
    energy: Energy = None,
    out: Out = None,
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Add several files up to one; exactly, unless --rank or --energy makes it smaller."""
    write(files, base, to, out, rank, energy, dtype, json)


@loras.command()
@with_exit_code
def resize(
    file: File,
    base: Base,
    to: To = "comfyui",
    rank: Rank = None,
    energy: Energy = None,
    out: Out = None,
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Write a file at a lower rank: the nearest there is. LoHa, LoKr and DoRA become LoRA so."""
    from sfumato.errors import Refused

    if rank is None and energy is None:
        raise Refused("Say how small: --rank 16 for each layer, or --energy 0.95 of each layer's change.")
    write([str(file)], base, to, out, rank, energy, dtype, json)


@loras.command()
@with_exit_code
def extract(
    tuned: Annotated[Path, typer.Argument(metavar="MODEL", help="A fine-tuned model or a run of the base.")],
    base: Base,
    rank: Annotated[int, typer.Option(metavar="N", help="The rank of each layer, at most.")] = 32,
    energy: Energy = None,
    to: To = "comfyui",
    out: Out = None,
    dtype: Dtype = "float32",
    json: Json = False,
) -> None:
    """Write what a fine-tuned model differs in from its base as a LoRA."""
    from sfumato.workflow.lora_files import extract

    place, number = destination(out, tuned, to, dtype)
    say_written(extract(tuned, base, to, place, rank, energy, number), json)


def write(
    files: list[str],
    base: Path,
    to: str,
    out: Path | None,
    rank: int | None,
    energy: float | None,
    dtype: str,
    as_json: bool,
) -> None:
    """Merge the files, of which there may be one, and say what came of it."""
    from sfumato.models.lora.key_conversion import weighted
    from sfumato.workflow.lora_files import merge

    given = [weighted(one, "FILE") for one in files]
    place, number = destination(out, Path(given[0][0]), to, dtype)
    say_written(merge(given, base, to, place, rank, energy, number), as_json)


def destination(out: Path | None, source: Path, to: str, dtype: str) -> tuple[Path, Any]:
    """(the folder to write into, which must be free or hold an earlier export; the dtype of the tensors)."""
    from sfumato.commands.export import check_replaceable
    from sfumato.errors import one_of
    from sfumato.models.io.model import DTYPES
    from sfumato.run_folder import check_output

    place = out or Path("runs/lora") / f"{source.absolute().name.removesuffix('.safetensors')}-{to}"
    check_output(place)
    check_replaceable(place)
    return place, DTYPES[one_of("--dtype", dtype, DTYPES)]


def say_written(done: Any, as_json: bool) -> None:
    """The files, their ranks, and how near they are to what they were made of."""
    from sfumato.commands.console import result

    ranks = ", ".join(f"{rank} ({count} layers)" for rank, count in done.ranks.items())
    lines = [str(file) for file in done.files]
    lines.append(f"ranks: {ranks}")
    lines.append(
        f"{done.kept:.2%} of the change is kept; loaded back, weights are at most {done.apart:.1e} apart"
    )
    result(asdict(done), "\n".join([*lines, *done.notes]), as_json)


def lines_of(found: Any) -> list[str]:
    """What a file is, in lines."""

    def counted(table: dict[Any, int]) -> str:
        return ", ".join(f"{name} ({count})" for name, count in table.items())

    size = f"{found.parameters:,} numbers in {found.dtype}"
    lines = [
        f"{found.file}: {counted(found.kinds)}; {size}",
        f"layers    {counted(found.networks)}",
        f"ranks     {counted(found.ranks)}",
        f"scales    {counted(found.scales)}",
    ]
    if found.words:
        lines.append(f"words     {', '.join(found.words)}")
    lines += [f"{name:<28} {value}" for name, value in found.told.items()]
    most = max(found.blocks.values(), default=0.0) or 1.0
    for block, norm in found.blocks.items():
        share = f"{found.relative[block]:9.2%} of the weights" if block in found.relative else ""
        lines.append(f"{block:<44} {norm:10.4g} {'#' * round(20 * norm / most):<20} {share}".rstrip())
    return lines
