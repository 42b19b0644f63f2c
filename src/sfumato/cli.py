"""The command line: thin commands that explain themselves; what is heavy is imported inside them.

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 the run failed, 2 the input was refused,
130 and 143 stopped by SIGINT and SIGTERM with the state saved.
"""

import logging
import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from .commands.exits import answers
from .commands.options import Device, Guidance, Json, Numbers, Overrides, RecipeFile, Steps, out_option
from .commands.theories import theories

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


@app.command(rich_help_panel=None)
@answers
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
    from .commands import demonstrate

    demonstrate.demo(task, data, out, minutes, device, json)


@app.command()
@answers
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The recipe is written to NAME.toml.")],
    data: Annotated[str, typer.Option(metavar="DIR", help="A folder of captioned pictures.")],
    base: Annotated[
        str, typer.Option(metavar="MODEL", help="scratch, or the folder of a model to go on from.")
    ] = "scratch",
    train: Annotated[str, typer.Option(metavar="HOW", help="What is trained: full, lora, …")] = "full",
) -> None:
    """Write a short commented recipe."""
    from .commands import recipes

    recipes.new(name, data, base, train)


@app.command()
@answers
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    fit: Annotated[
        str, typer.Option(metavar="SIZE", help="Choose what makes a step fit into it, as 24GB, and say why.")
    ] = "",
    json: Json = False,
) -> None:
    """Say what would run, and run nothing.

    Every value and where it came from, counts, memory, disk.
    """
    from .commands import recipes

    recipes.plan(recipe, overrides or [], fit, json)


@app.command()
@answers
def encode(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cluster: Annotated[
        int, typer.Option(metavar="N", min=0, help="Let Ray start N workers (extra: cluster).")
    ] = 0,
    json: Json = False,
) -> None:
    """Encode pictures and captions, once."""
    from .commands import runs

    runs.encode(recipe, overrides or [], cluster, json)


@app.command()
@answers
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a trace and a table of a few steps into RUN/profile.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a recipe; the same command resumes."""
    from .commands import runs

    runs.train(recipe, overrides or [], profile, json)


@app.command()
@answers
def generate(
    model: Annotated[Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder or a model's.")],
    prompt: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--prompt", "-p", metavar="TEXT", help="What to draw; repeat it for a batch."),
    ] = None,
    negative: Annotated[str, typer.Option(metavar="TEXT", help="What to lean away from.")] = "",
    image: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="A picture that an editing or image-to-video model is shown; repeat it for several.",
        ),
    ] = None,
    lora: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="FILE[:WEIGHT]", help="A LoRA to draw with (diffusers', ComfyUI's, kohya's); repeat it."
        ),
    ] = None,
    option: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="NAME=VALUE", help="Further arguments by the pipeline's names: true_cfg_scale=4."
        ),
    ] = None,
    guide: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(
            metavar="PATH",
            help="A trained guide to add: a ControlNet's folder (diffusers), an IP-Adapter's file.",
        ),
    ] = None,
    control: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(metavar="FILE", help="What a ControlNet reads; repeat it, one for each ControlNet."),
    ] = None,
    control_from: Annotated[
        str, typer.Option(metavar="KIND", help="Make it of the file first: sketch, canny or soft-edge.")
    ] = "",
    control_weight: Numbers = None,
    control_start: Numbers = None,
    control_end: Numbers = None,
    reference: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="What an IP-Adapter looks at."),
    ] = None,
    reference_scale: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="X", help="How strongly the reference acts; default 1."),
    ] = None,
    init: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="The picture to start from."),
    ] = None,
    strength: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="X", help="How much of it may change, up to 1; default 0.6, with a mask 1."),
    ] = None,
    mask: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Where it is repainted: white. The rest stays, pixel for pixel."),
    ] = None,
    count: Annotated[int, typer.Option(metavar="N", min=1, help="Pictures of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(metavar="N", help="Picture i is drawn from seed + i.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    guidance_form: Annotated[str, typer.Option(metavar="NAME", help="cfg, cfg-zero-star or apg.")] = "cfg",
    guidance_rescale: Annotated[
        float, typer.Option(metavar="X", help="Share of the contrast guidance added that is taken back.")
    ] = 0.0,
    guidance_interval: Annotated[
        Optional[tuple[float, float]],  # noqa: UP045
        typer.Option(metavar="LOW HIGH", help="Guide only while noise/signal lies between these."),
    ] = None,
    guidance_perturbed: Annotated[
        float, typer.Option(metavar="X", help="Also lean away from the model with disturbed attention.")
    ] = 0.0,
    guidance_by: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="RUN_OR_MODEL", help="Lean away from this weaker model (autoguidance)."),
    ] = None,
    solver: Annotated[str, typer.Option(metavar="NAME", help="As `sfumato theory list` names them.")] = "",
    width: Annotated[int, typer.Option(metavar="N", min=0, help="Pixels; 0 is what it was trained at.")] = 0,
    height: Annotated[int, typer.Option(metavar="N", min=0, help="Pixels; 0 is what it was trained at.")] = 0,
    frames: Annotated[int, typer.Option(metavar="N", min=0, help="Of a clip; 0 is as it was trained.")] = 0,
    fps: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="X", help="Frames a second of a clip's file; default: the model's own."),
    ] = None,
    format: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="KIND", help="png, webp; of clips mp4, webp, frames; repeat it for several."),
    ] = None,
    window: Annotated[
        int, typer.Option(metavar="N", min=0, help="Frames of a long clip the network sees at once.")
    ] = 0,
    overlap: Annotated[int, typer.Option(metavar="N", min=0, help="Frames that windows share.")] = 0,
    tile: Annotated[int, typer.Option(metavar="N", min=0, help="Decode in tiles of N pixels.")] = 0,
    chunk: Annotated[int, typer.Option(metavar="N", min=0, help="Decode N frames of a clip at once.")] = 0,
    out: Annotated[Path, out_option("runs/generate")] = Path("runs/generate"),
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Draw pictures or clips of prompts.

    A picture depends on its own seed, not on the batch it is drawn in. Each file says what it shows.
    """
    from .commands import draw

    size = {"width": width, "height": height}
    wanted = {
        "negative": negative,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "guidance_form": "" if guidance_form == "cfg" else guidance_form,
        "guidance_rescale": guidance_rescale,
        "guidance_interval": guidance_interval,
        "guidance_perturbed": guidance_perturbed,
        "guidance_by": guidance_by,
        "solver": solver,
        "frames": frames,
        "window": window,
        "overlap": overlap,
        "tile": tile,
        "chunk": chunk,
        **size,
    }
    wanted |= draw.further(image or [], option or [], lora or [])
    shown = {
        "control": control,
        "control_weight": control_weight,
        "control_start": control_start,
        "control_end": control_end,
        "reference": reference,
        "reference_scale": reference_scale,
        "init": init,
        "strength": strength,
        "mask": mask,
    }
    wanted |= draw.shown(shown, control_from)
    draw.generate(model, prompt or [], count, wanted, out, device, json, format or (), fps, guide or [])


@app.command()
@answers
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a pretrained model's.")],
    to: Annotated[str, typer.Option(metavar="WHERE", help="diffusers, comfyui or kohya.")],
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
    json: Json = False,
) -> None:
    """Write files that load elsewhere, verified."""
    from .commands import export as exporting

    exporting.export(run, to, out, trigger or [], dtype, json)


@app.command("eval")
@answers
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

    Held-out loss by noise level, nearest neighbours among the training pictures, KID.
    """
    from .commands import measure

    measure.evaluate(model, samples, seeds, steps, guidance, out, device, json)


@app.command()
@answers
def data(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder of pictures, or an embedded set.")],
    captions: Annotated[
        str, typer.Option(metavar="WHERE", help="files, folder (class names) or none.")
    ] = "files",
    resolution: Annotated[int, typer.Option(metavar="N", min=16, help="Plan for N x N pixels.")] = 256,
    buckets: Annotated[int, typer.Option(metavar="N", min=1, help="Shapes in the plan.")] = 5,
    frames: Annotated[int, typer.Option(metavar="N", min=1, help="Frames a clip must have.")] = 16,
    rate: Annotated[float, typer.Option(metavar="X", min=0.1, help="Frames a second.")] = 8.0,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Whose tokenizer counts: minilm, none, a model's folder.")
    ] = "minilm",
    out: Annotated[Path, out_option("runs/data")] = Path("runs/data"),
    json: Json = False,
) -> None:
    """Report on a data set, as a page.

    Counts, sizes, captions, and every file that was set aside with its reason.
    """
    from .commands import dataset

    asked = dataset.Asked(resolution // 16 * 16, buckets, frames, rate, model)
    dataset.data(folder, captions, asked, out, json)


@app.command()
@answers
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
) -> None:
    """Write a run's page again."""
    from .commands import runs

    runs.report(run)


@app.command()
@answers
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
    from .commands import runs

    runs.ema(run, length, step, out, json)


@app.command()
@answers
def doctor(
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="[RECIPE]", help="Also check that this recipe can run."),
    ] = None,
    json: Json = False,
) -> None:
    """Say what this machine has and lacks."""
    from .commands import health

    health.doctor(recipe, json)


app.add_typer(theories, name="theory")


def main() -> None:
    """Run the command line; also what `python -m sfumato` does."""
    for name in ("torchao", "torch.utils._pytree"):  # what these say of themselves while they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")  # one kind of progress bar is enough
    app(prog_name="sfumato")
