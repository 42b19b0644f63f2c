"""The command line: thin commands that explain themselves; what is heavy is imported inside them.

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 the run failed, 2 the input was refused,
130 and 143 stopped by SIGINT and SIGTERM with the state saved.
"""

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from sfumato.commands import data_options, generate_options
from sfumato.commands.exits import with_exit_code, with_trust
from sfumato.commands.loras import loras
from sfumato.commands.options import Device, Guidance, Json, Overrides, RecipeFile, Steps, out_option
from sfumato.commands.theory import theories

app = typer.Typer(
    name="sfumato",
    help="Trains diffusion models for images and video, and draws with them.",
    epilog="First: sfumato demo. Then: sfumato new NAME --data DIR, and sfumato train NAME.toml.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _say_version(asked: bool) -> None:
    if asked:
        from sfumato import __version__
        from sfumato.errors import for_terminal

        print(for_terminal(f"sfumato {__version__}"))
        raise typer.Exit


@app.callback()
def with_version(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Trains diffusion models for images and video, and draws with them."""


@app.command(rich_help_panel=None)
@with_exit_code
def demo(
    task: Annotated[
        str, typer.Option(metavar="TASK", help="What is shown: text, controlnet, ip-adapter, edit, video.")
    ] = "text",
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SET", help="One of the task's sets.", show_default="the task's own"),
    ] = None,
    out: Annotated[Path, out_option("runs/demo")] = Path("runs/demo"),
    minutes: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="N", help="Train for about this long in all; longer is better."),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train on embedded pictures, and draw.

    The whole way on this machine: encode, train, draw, judge, and a page to look at.
    """
    from sfumato.commands import demo

    demo.demo(task, data, out, minutes, device, json)


@app.command()
@with_exit_code
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The recipe is written to NAME.toml.")],
    data: Annotated[str, typer.Option(metavar="DIR", help="A folder of captioned pictures or clips.")],
    base: Annotated[
        str,
        typer.Option(metavar="MODEL", help="scratch, or the folder, file or run of a model to go on from."),
    ] = "scratch",
    train: Annotated[str, typer.Option(metavar="HOW", help="What is trained: full, lora, …")] = "full",
    minutes: Annotated[
        float, typer.Option(metavar="M", help="How long training may take; 0: what a person waits for.")
    ] = 0.0,
    aim: Annotated[
        str, typer.Option("--for", metavar="AIM", help="speed, quality (larger, longer) or tiny.")
    ] = "speed",
) -> None:
    """Write a short commented recipe for this data, base and machine."""
    from sfumato.commands import recipes

    recipes.new(name, data, base, train, minutes, aim)


@app.command()
@with_exit_code
@with_trust
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    fit: Annotated[
        str, typer.Option(metavar="SIZE", help="Choose what makes a step fit into it, as 24GB, and say why.")
    ] = "",
    devices: Annotated[
        int, typer.Option(metavar="N", min=0, help="Plan for N processes, each with a device of its own.")
    ] = 0,
    everything: Annotated[
        bool, typer.Option("--all", help="Every key and where its value came from, every number.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what would run, and run nothing.

    What, how long, how much memory and disk, what is unusual, what is fetched.
    """
    from sfumato.commands import recipes

    recipes.plan(recipe, overrides or [], fit, devices, json, everything)


@app.command()
@with_exit_code
@with_trust
def encode(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cluster: Annotated[
        int, typer.Option(metavar="N", min=0, help="Let Ray start N workers (extra: cluster).")
    ] = 0,
    json: Json = False,
) -> None:
    """Encode pictures and captions, once."""
    from sfumato.commands import runs

    runs.encode(recipe, overrides or [], cluster, json)


@app.command()
@with_exit_code
@with_trust
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a trace and a table of a few steps into RUN/profile.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a recipe; the same command resumes."""
    from sfumato.commands import runs

    runs.train(recipe, overrides or [], profile, json)


@app.command()
@with_exit_code
@with_trust
def generate(
    model: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder or a model's.")],
    prompt: generate_options.Prompts = None,
    label: generate_options.Labels = None,
    region: generate_options.Regions = None,
    negative: generate_options.Negative = "",
    image: generate_options.Images = None,
    last_image: generate_options.LastImage = None,
    lora: generate_options.Loras = None,
    lora_scale: generate_options.LoraScale = None,
    embedding: generate_options.Embeddings = None,
    option: generate_options.Further = None,
    control_module: generate_options.ControlModules = None,
    guide: generate_options.Guides = None,
    image_encoder: generate_options.ImageEncoder = None,
    control: generate_options.Controls = None,
    control_from: generate_options.ControlFrom = "",
    control_weight: generate_options.ControlWeights = None,
    control_start: generate_options.ControlStarts = None,
    control_end: generate_options.ControlEnds = None,
    reference: generate_options.References = None,
    reference_scale: generate_options.ReferenceScale = None,
    reference_start: generate_options.ReferenceStart = None,
    reference_end: generate_options.ReferenceEnd = None,
    init: generate_options.Init = None,
    strength: generate_options.Strength = None,
    mask: generate_options.Mask = None,
    count: generate_options.Count = 1,
    seed: generate_options.Seed = 0,
    literal_prompt: generate_options.LiteralPrompt = False,
    same_seeds: generate_options.SameSeeds = False,
    grid: generate_options.Grid = "",
    steps: Steps = None,
    guidance: Guidance = None,
    guidance_form: generate_options.GuidanceForm = None,
    guidance_rescale: generate_options.GuidanceRescale = None,
    guidance_interval: generate_options.GuidanceInterval = None,
    pag_scale: generate_options.PagScale = None,
    autoguidance_model: generate_options.AutoguidanceModel = None,
    guidance_perturbed: generate_options.GuidancePerturbed = None,
    guidance_by: generate_options.GuidanceBy = None,
    solver: generate_options.Solver = "",
    times: generate_options.Times = "",
    width: generate_options.Width = 0,
    height: generate_options.Height = 0,
    frames: generate_options.Frames = 0,
    fps: generate_options.Fps = None,
    format: generate_options.Formats = None,
    context_parallel: generate_options.ContextParallel = None,
    context: generate_options.Context = None,
    window: generate_options.WindowFrames = 0,
    overlap: generate_options.Overlap = None,
    tile: generate_options.Tile = 0,
    chunk: generate_options.Chunk = 0,
    dtype: generate_options.Dtype = "auto",
    memory: generate_options.Memory = "",
    out: Annotated[Path, out_option("runs/generate")] = Path("runs/generate"),
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Draw pictures or clips of prompts.

    A picture depends on its own seed, not on the batch it is drawn in. Each file says what it shows.
    """
    arguments = dict(locals())
    from sfumato.commands import generate

    generate.generate(generate.GenerateRequest.from_arguments(arguments), json)


@app.command()
@with_exit_code
@with_trust
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a pretrained model's.")],
    to: Annotated[str, typer.Option(metavar="WHERE", help="diffusers, comfyui or kohya.")] = "diffusers",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="The folder to write into.", show_default="runs/export/RUN-WHERE"),
    ] = None,
    trigger: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="WORD", help="A word that calls what was learned, for the metadata; repeat it."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Of a LoRA: float32, bfloat16 or float16.")
    ] = "float32",
    push: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="A repository of the Hub; without --yes only a list.")
    ] = "",
    private: Annotated[bool, typer.Option("--private", help="With --push: only you see it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --push: send what is listed.")] = False,
    json: Json = False,
) -> None:
    """Write files that load elsewhere, verified."""
    from sfumato.commands import export as exporting

    exporting.export(run, to, out, trigger or [], dtype, json, exporting.Push(push, private, yes))


@app.command("eval")
@with_exit_code
@with_trust
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or a checkpoint or average in it.")],
    samples: Annotated[int, typer.Option(metavar="N", min=2, help="Pictures drawn for each seed.")] = 64,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Repetitions that give the error bars.")] = 3,
    steps: Steps = None,
    guidance: Guidance = None,
    out: Annotated[Path, out_option("runs/eval")] = Path("runs/eval"),
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure a run, with error bars.

    Held-out loss by noise level, nearest neighbors among the training pictures, kernel distance.
    """
    from sfumato.commands import eval as commands_eval

    commands_eval.evaluate(model, samples, seeds, steps, guidance, out, device, json)


@app.command()
@with_exit_code
@with_trust
def data(
    what: Annotated[
        str, typer.Argument(metavar="DIR", help="Pictures, an embedded set, a recipe (TOML), or a store.")
    ],
    overrides: Overrides = None,
    captions: data_options.Captions = None,
    resolution: data_options.Resolution = None,
    buckets: data_options.Buckets = None,
    frames: data_options.Frames = None,
    fps: data_options.Fps = None,
    rate: data_options.Rate = None,
    model: data_options.Model = None,
    collect: data_options.Collect = False,
    keep: data_options.Keep = None,
    days: data_options.Days = 30.0,
    out: Annotated[Path, out_option("runs/data")] = Path("runs/data"),
    json: Json = False,
) -> None:
    """Report on a data set, as a page.

    Counts, sizes, captions, and every file that was set aside with its reason. A recipe's data are planned
    for as it says. Of a store of encodings: what is in it, who needs it, and what --collect would free.
    """
    from sfumato.commands import data

    if data.is_store(what, collect or bool(keep)):
        from sfumato.commands import store

        return store.store(Path(what).expanduser(), keep or [], days, collect, json)
    plan = {
        "captions": captions,
        "resolution": resolution,
        "buckets": buckets,
        "frames": frames,
        "fps": fps,
        "rate": rate,
        "model": model,
    }
    given = {name: value for name, value in plan.items() if value is not None}
    data.data(what, overrides or [], given, out, json)


@app.command()
@with_exit_code
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
) -> None:
    """Write a run's page again."""
    from sfumato.commands import runs

    runs.report(run)


@app.command()
@with_exit_code
@with_trust
def ema(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    length: Annotated[
        float, typer.Option(metavar="X", help="Share of the run to average over: above 0, below 0.25.")
    ] = 0.1,
    step: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", min=1, help="Where the average ends; default: the last snapshot."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="The model's folder; default: RUN/averages/ema-LENGTH."),
    ] = None,
    json: Json = False,
) -> None:
    """Average a run over any length, afterwards.

    Writes a model that generate and eval take.
    """
    from sfumato.commands import runs

    runs.ema(run, length, step, out, json)


@app.command()
@with_exit_code
@with_trust
def doctor(
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="[RECIPE]", help="Also check that this recipe can run."),
    ] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Say what this machine has and lacks."""
    from sfumato.commands import doctor

    doctor.doctor(recipe, overrides or [], json)


app.add_typer(theories, name="theory")
app.add_typer(loras, name="lora")


def main() -> None:
    """Run the command line; also what `python -m sfumato` does."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # one kind of progress bar is enough
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # of a console that has no σ
    app(prog_name="sfumato")
