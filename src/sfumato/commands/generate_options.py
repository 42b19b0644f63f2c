"""The options of `sfumato generate`, by what they are about; each is declared once, with its help."""

from pathlib import Path
from typing import Annotated, Optional

import typer

# typer reads Optional[...] on every Python that is supported: hence no X | None in this file
# ruff: noqa: UP045

# What is drawn
Prompts = Annotated[
    Optional[list[str]],
    typer.Option("--prompt", "-p", metavar="TEXT", help="What to draw; repeat it for a batch."),
]
Labels = Annotated[
    Optional[list[str]],
    typer.Option("--label", metavar="NAME", help="Of a model of classes: a class or its number; repeat it."),
]
Regions = Annotated[
    Optional[list[str]],
    typer.Option(
        "--region", metavar="MASK:TEXT", help="What is drawn where the mask's file is white; repeat it."
    ),
]
Negative = Annotated[str, typer.Option(metavar="TEXT", help="What to lean away from.")]
Count = Annotated[int, typer.Option(metavar="N", min=1, help="Pictures of each prompt.")]
Seed = Annotated[
    int, typer.Option(metavar="N", min=0, max=2**64 - 1, help="Picture i is drawn from seed + i.")
]
Width = Annotated[
    int, typer.Option(metavar="N", min=0, help="Pixels in a row; 0 is what the model was trained at.")
]
Height = Annotated[
    int, typer.Option(metavar="N", min=0, help="Rows of pixels; 0 is what the model was trained at.")
]
Formats = Annotated[
    Optional[list[str]],
    typer.Option(metavar="KIND", help="png, webp; of clips mp4, webp, frames; repeat it for several."),
]

SameSeeds = Annotated[
    bool, typer.Option("--same-seeds", help="Each prompt from the same seeds: seed to seed + count − 1.")
]
LiteralPrompt = Annotated[
    bool,
    typer.Option("--literal-prompt", help="Read brackets as they stand: (red:1.3), [word] are no weights."),
]
Grid = Annotated[
    str,
    typer.Option(
        metavar="AXES",
        help='Draw every combination: "lora=0,0.5,1 × seed=1..4"; × may be * or x with spaces around it.',
    ),
]

# What it is drawn with
LoraScale = Annotated[
    Optional[float],
    typer.Option(metavar="X", help="How strongly LoRAs act: the run's own, and × the weights of --lora."),
]
Loras = Annotated[
    Optional[list[str]],
    typer.Option(
        metavar="FILE[@EXPERT][:WEIGHT]",
        help="A LoRA to draw with (diffusers', ComfyUI's, kohya's); repeat it. Of two networks: @high, @low.",
    ),
]
Embeddings = Annotated[
    Optional[list[str]],
    typer.Option(
        metavar="[WORD=]FILE", help="A word that others learned (textual inversion) to draw with; repeat it."
    ),
]
ControlModules = Annotated[
    Optional[list[Path]],
    typer.Option(
        metavar="PATH",
        help="A trained ControlNet's folder (diffusers), an IP-Adapter's file, or a run of either, to add.",
    ),
]
ImageEncoder = Annotated[
    Optional[Path],
    typer.Option(
        metavar="DIR",
        help="What an added IP-Adapter sees through (CLIP, SigLIP); default: image_encoder beside its file.",
    ),
]
Solver = Annotated[
    str, typer.Option(metavar="NAME", help="As `sfumato theory list` names them, or FILE.py:NAME.")
]
Times = Annotated[
    str,
    typer.Option(metavar="NAME|T,T,…", help="The grid of times: its name (karras, log-snr, …) or the times."),
]
Further = Annotated[
    Optional[list[str]],
    typer.Option(metavar="NAME=VALUE", help="Further arguments by the pipeline's names: true_cfg_scale=4."),
]

# Pictures that guide
Images = Annotated[
    Optional[list[Path]],
    typer.Option(
        metavar="FILE",
        help="A picture that an editing or image-to-video model is shown; repeat it for several.",
    ),
]
LastImage = Annotated[
    Optional[Path],
    typer.Option(metavar="FILE", help="The picture a clip ends with, beside --image, which it begins with."),
]
Controls = Annotated[
    Optional[list[Path]],
    typer.Option(metavar="FILE", help="What a ControlNet reads; repeat it, one for each ControlNet."),
]
ControlFrom = Annotated[
    str, typer.Option(metavar="KIND", help="Make it of the file first: sketch, canny or soft-edge.")
]
ControlWeights = Annotated[
    Optional[list[float]],
    typer.Option(metavar="X", help="How strongly a control acts; default 1; repeat it, one for each."),
]
ControlStarts = Annotated[
    Optional[list[float]],
    typer.Option(
        metavar="X", help="Share of the steps before a control begins; default 0; repeat it, one for each."
    ),
]
ControlEnds = Annotated[
    Optional[list[float]],
    typer.Option(
        metavar="X", help="Share of the steps after which a control ends; default 1; repeat it, one for each."
    ),
]
References = Annotated[
    Optional[list[Path]],
    typer.Option("--reference", metavar="FILE", help="What an IP-Adapter looks at; repeat it for several."),
]
ReferenceScale = Annotated[
    Optional[float], typer.Option(metavar="X", help="How strongly the reference acts; default 1.")
]
ReferenceStart = Annotated[
    Optional[float],
    typer.Option(metavar="X", help="Share of the steps before the reference begins to act; default 0."),
]
ReferenceEnd = Annotated[
    Optional[float],
    typer.Option(metavar="X", help="Share of the steps after which the reference has acted; default 1."),
]
Init = Annotated[
    Optional[Path],
    typer.Option(metavar="FILE", help="The picture to start from; for models of clips also a clip."),
]
Strength = Annotated[
    Optional[float],
    typer.Option(metavar="X", help="How much of it may change, up to 1; default 0.6, with a mask 1."),
]
Mask = Annotated[
    Optional[Path],
    typer.Option(metavar="FILE", help="Where it is repainted: white. The rest stays, pixel for pixel."),
]

# How guidance leans
GuidanceForm = Annotated[Optional[str], typer.Option(metavar="NAME", help="cfg, cfg-zero-star or apg.")]
GuidanceRescale = Annotated[
    Optional[float],
    typer.Option(metavar="X", help="Share of the contrast guidance added that is taken back."),
]
GuidanceInterval = Annotated[
    Optional[tuple[float, float]],
    typer.Option(metavar="LOW HIGH", help="Guide only while noise/signal lies between these."),
]
PagScale = Annotated[
    Optional[float],
    typer.Option(metavar="X", help="Also lean away from the model with perturbed attention."),
]
AutoguidanceModel = Annotated[
    Optional[Path],
    typer.Option(metavar="RUN_OR_MODEL", help="Lean away from this weaker model."),
]

# Clips
Frames = Annotated[int, typer.Option(metavar="N", min=0, help="Of a clip; 0 is as it was trained.")]
Fps = Annotated[
    Optional[float],
    typer.Option(metavar="X", help="Frames a second of a clip's file; default: the model's own."),
]
WindowFrames = Annotated[
    int, typer.Option(metavar="N", min=0, help="Frames of a long clip the network sees at once.")
]
Overlap = Annotated[
    Optional[int],
    typer.Option(metavar="N", min=0, help="Frames that windows share; default: half a window."),
]
Tile = Annotated[int, typer.Option(metavar="N", min=0, help="Decode in tiles of N pixels.")]
Chunk = Annotated[int, typer.Option(metavar="N", min=0, help="Decode N frames of a clip at once.")]

# With how much memory
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Of network and text encoders: float32, bfloat16, float16; auto: bfloat16 on GPUs that have it.",
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="What may be taken of a GPU's memory, such as 8GB.",
        show_default="what is free there",
    ),
]

# Who draws
ContextParallel = Annotated[
    Optional[int],
    typer.Option(
        metavar="N", min=1, help="So many processes (torchrun) draw each picture or clip, sharing its tokens."
    ),
]

# Former names, read with a note: `options.RENAMED_OPTIONS` says of what
Guides = Annotated[
    Optional[list[Path]], typer.Option("--guide", hidden=True, help="The former name of --control-module.")
]
GuidancePerturbed = Annotated[
    Optional[float], typer.Option(hidden=True, help="The former name of --pag-scale.")
]
GuidanceBy = Annotated[
    Optional[Path], typer.Option(hidden=True, help="The former name of --autoguidance-model.")
]
Context = Annotated[
    Optional[int], typer.Option(min=1, hidden=True, help="The former name of --context-parallel.")
]
