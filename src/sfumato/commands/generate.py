"""The command that draws."""

import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.commands.console import is_rank_zero, progress, result, say
from sfumato.commands.early import check_model
from sfumato.commands.options import with_present_names
from sfumato.errors import Refused, one_of
from sfumato.run_folder import check_output
from sfumato.settings import parse_bytes
from sfumato.user_code import is_user_code

AS_TRAINED = ("width", "height", "frames", "window", "tile", "chunk")
"""Options that leave it to the model where they are 0."""
PICTURES = (
    "control", "control_weight", "control_start", "control_end", "reference", "reference_scale",
    "reference_start", "reference_end", "init", "strength", "mask",
)  # fmt: skip
"""Options about pictures that guide."""


SAID_OTHERWISE = ("lora", "prompt", "size", "seed")
"""Axes of a grid that a file's words have under other names."""


@dataclass(frozen=True)
class GenerateRequest:
    """What the command line asks for: with which model, what, how, and where it goes.

    labels: classes, of a model that knows classes instead of prompts; options: arguments of the model's own
    `generate`; formats: of file, default PNG, of clips MP4; fps: of clips, default as the model was trained.
    """

    folder: Path
    prompts: list[str]
    labels: list[str]
    count: int
    options: dict[str, Any]
    out: Path
    device: str
    formats: Sequence[str] = ()
    fps: float | None = None
    loras: list[tuple[str, float]] = field(default_factory=list)
    embeddings: list[str] = field(default_factory=list)
    control_modules: Sequence[Path] = ()
    control_from: str = ""
    image_encoder: Path | None = None
    context_parallel: int = 1
    dtype: str = "auto"
    memory: str = ""
    grid: str = ""
    lora_scale: float | None = None
    same_seeds: bool = False

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> "GenerateRequest":
        """From the arguments and options of `sfumato generate`, by their names.

        Raises:
            Refused: a file that cannot be read, or options that do not go together.
        """
        check_model(arguments["model"])
        known = {*arguments, "latents", "watch"}
        rest = with_present_names(arguments)
        rest.pop("json", None)
        own = {
            "folder": rest.pop("model"),
            "prompts": rest.pop("prompt") or [],
            "labels": rest.pop("label") or [],
            "formats": rest.pop("format") or (),
            "control_modules": rest.pop("control_module") or [],
            "image_encoder": rest.pop("image_encoder"),
            "context_parallel": rest.pop("context_parallel") or 1,
            "control_from": rest.pop("control_from"),
            "loras": [parse_lora(lora) for lora in rest.pop("lora") or []],
            "embeddings": rest.pop("embedding") or [],
            **{name: rest.pop(name) for name in ("count", "out", "device", "dtype", "memory", "fps")},
            **{name: rest.pop(name) for name in ("grid", "lora_scale", "same_seeds")},
        }
        rest["times"] = parse_times(rest["times"])
        regions = [parse_region(one) for one in rest.pop("region") or []]
        pictures = condition_arguments({name: rest.pop(name) for name in PICTURES}, own["control_from"])
        last = rest.pop("last_image")
        options = further_options(rest.pop("image") or [], rest.pop("option") or [], known)
        usual = {"negative": "", "solver": "", "literal_prompt": False, **dict.fromkeys(AS_TRAINED, 0)}
        usual_left_out = {name: value for name, value in rest.items() if value not in (None, usual.get(name))}
        options |= {"regions": regions} if regions else {}
        options |= {"last_image": str(last)} if last is not None else {}
        return cls(options=usual_left_out | options | pictures, **own)


def generate(request: GenerateRequest, as_json: bool) -> None:
    """Draw `count` pictures or clips of each prompt, or a grid, into `out`, with a page that shows them.

    Of processes that draw together (`context_parallel`) the first one writes.
    """
    from sfumato.training.distributed import context_parallel

    if is_rank_zero():
        check_output(request.out)
    axes = check_before_loading(request)
    with context_parallel.drawing_processes(request.context_parallel, request.device) as processes:
        model, drawings = run_generation(request, axes, processes)
    if processes.is_rank_zero:
        write(request, model, drawings, axes, as_json)


def check_before_loading(request: GenerateRequest) -> dict[str, list[Any]]:
    """Refuse, while nothing is loaded, what can be seen to be wrong; the axes of the grid, if there is one.

    Raises:
        Refused: no prompt, a file that is not there, a name that is not known, a grid that cannot be drawn.
    """
    from sfumato import hub, paths
    from sfumato.generation import files
    from sfumato.models.io.model import conditioner_kind, has_adapter
    from sfumato.models.lora.experts import split_expert
    from sfumato.models.pretrained.textual_inversion import parse_embedding
    from sfumato.theory.grids import grids
    from sfumato.theory.solvers import user_solver
    from sfumato.theory.solvers.solver import methods

    for file, _ in request.loras:
        path = split_expert(file)[0]
        if hub.parse(str(path)) is None or paths.is_meant_here(str(path)):
            must_exist("--lora", path)
    for one in request.embeddings:
        must_exist("--embedding", parse_embedding(one)[1])
    for kind in request.formats:
        one_of("--format", kind, dict.fromkeys((*files.PICTURE_KINDS, *files.CLIP_KINDS)))
    axes = grid_axes(request)
    for solver in axes.get("solver", [request.options.get("solver")]):
        if solver is not None and is_user_code(solver):
            user_solver.find(solver)
        elif solver is not None:
            one_of("Solver", solver, methods())
    for times in axes.get("times", [request.options.get("times")]):
        if isinstance(times, str):
            one_of("Grid", times.replace("_", "-"), grids())
    kind = conditioner_kind(request.folder)
    if request.labels and (request.prompts or kind not in ("labels", "")):
        raise Refused(
            "Give --label or --prompt, not both."
            if request.prompts
            else f"--label {request.labels[0]}: this model was not trained on classes. Use --prompt."
        )
    if not request.prompts and not request.labels and "prompt" not in axes and kind not in ("none", ""):
        if kind == "labels":
            raise Refused("Say which class to draw: --label NAME. Repeat --label for several pictures.")
        raise Refused('Say what to draw: --prompt "a red apple". Repeat --prompt for several pictures.')
    scales = "lora" in axes or request.lora_scale is not None
    if scales and not request.loras and has_adapter(request.folder) is False:
        raise Refused(
            f"{request.folder} has no LoRA of its own, so there is nothing to scale. Give --lora FILE, or "
            "the run of a LoRA."
        )
    return axes


def must_exist(option: str, place: Path | str) -> None:
    """Raises Refused for a file or folder that is not there."""
    if not Path(place).expanduser().exists():
        raise Refused(f"{option}: {place} does not exist. Give the path of a .safetensors file.")


def grid_axes(request: GenerateRequest) -> dict[str, list[Any]]:
    """The axes of the grid that is asked for; several prompts and a count are axes too.

    Raises:
        Refused: an axis that is also given beside the grid, or a checkpoint the run does not have.
    """
    from sfumato.generation.grid import check_count, checkpoint_name, checkpoints_of, parse_grid

    if not request.grid:
        return {}
    named = request.prompts or request.labels
    axes = parse_grid(request.grid, {"prompt": named})
    for name in axes:
        beside = {"lora": request.lora_scale, "prompt": None}.get(name, request.options.get(name))
        if name == "size" and ("width" in request.options or "height" in request.options):
            raise Refused("--grid says size, and so do --width and --height. Leave one out.")
        if beside is not None and name not in ("seed", "prompt"):
            raise Refused(f"--grid says {name}, and so does an option of its own. Leave one out.")
    if "prompt" in axes and named and axes["prompt"] != named:
        raise Refused(
            "--grid says prompt, and so does --prompt. Write prompt without values, or leave one out."
        )
    if len(named) > 1 and "prompt" not in axes:
        axes["prompt"] = list(named)
    if request.count > 1 and "seed" in axes:
        raise Refused("--grid says seed, and --count is a number of seeds. Leave one out.")
    if request.count > 1:
        seed = request.options["seed"]
        axes["seed"] = list(range(seed, seed + request.count))
    if "checkpoint" in axes:
        axes["checkpoint"] = [
            checkpoint_name(one) for one in checkpoints_of(request.folder, axes["checkpoint"])
        ]
        if request.control_modules or request.embeddings:
            raise Refused(
                "A grid over checkpoints takes no --control-module and no --embedding. Leave checkpoint out."
            )
    check_count(axes)
    return axes


def run_generation(
    request: GenerateRequest, axes: Mapping[str, Sequence[Any]], processes: Any
) -> tuple[Any, list[Any]]:
    """The model, and all that was drawn with it, in order."""
    from sfumato.generation import load
    from sfumato.models.pretrained import prompt_weights
    from sfumato.training.device import resolve
    from sfumato.training.distributed import context_parallel

    device = str(resolve(request.device))
    model = load_model(request, device, adjustable="lora" in axes or "checkpoint" in axes)
    check_formats(request, model)
    options = dict(request.options)
    prompts = list(axes.get("prompt", request.prompts))
    texts = [*prompts, *axes.get("negative", ()), *words_of(options)]
    for sentence in cut_off(model, texts, options):
        say(sentence)
    if not options.get("literal_prompt"):
        for sentence in prompt_weights.notes(model.conditioner, texts):
            say(sentence)
    if request.control_from:
        shape = model.latent_shape(options.get("width"), options.get("height"))
        size = model.codec.pixel_size(shape)
        options["control"] = [
            make_control(one, request.control_from, size["width"], size["height"])
            for one in options["control"]
        ]
    written = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    if "autoguidance_model" in options:
        options["autoguidance_model"] = load(options["autoguidance_model"], device=device)
    metadata = {**json_safe(written), "model": model_name(request.folder)}
    if request.loras:
        metadata["loras"] = [f"{Path(file).name}:{weight:g}" for file, weight in request.loras]
    with (
        progress() as bar,
        warnings.catch_warnings(),
        context_parallel.enabled(model.denoiser, request.context_parallel, processes),
    ):
        warnings.simplefilter("ignore", prompt_weights.LiteralPromptWarning)  # said above
        draw = draw_grid if axes else draw_list
        return model, draw(request, model, axes, options, metadata, bar)


def draw_list(
    request: GenerateRequest, model: Any, _: Any, options: dict[str, Any], metadata: dict[str, Any], bar: Any
) -> list[Any]:
    """Pictures one after the other, together in batches."""
    from sfumato.generation.effective import effective_settings
    from sfumato.workflow.drawings import Drawing

    prompts = [prompt for prompt in request.prompts or request.labels or [""] for _ in range(request.count)]
    first = options.pop("seed")
    seeds = [
        first + (index % request.count if request.same_seeds else index) for index in range(len(prompts))
    ]
    drawn = model.generate(
        prompt=prompts, seed=seeds, watch=lambda done, total: bar(done, total, "drawing"), **options
    )
    said = scaled(model, metadata)
    return [
        Drawing(one, prompt, seed, {**said, **effective_settings(model, options, one)})
        for one, prompt, seed in zip(drawn, prompts, seeds, strict=True)
    ]


def draw_grid(
    request: GenerateRequest,
    model: Any,
    axes: Mapping[str, Sequence[Any]],
    options: dict[str, Any],
    metadata: dict[str, Any],
    bar: Any,
) -> list[Any]:
    """The cells of a grid, in the order of its axes."""
    from sfumato.generation.effective import effective_settings
    from sfumato.workflow.drawings import Drawing

    fixed = {name: value for name, value in options.items() if name not in axes}
    if "prompt" not in axes and (named := request.prompts or request.labels):
        fixed["prompt"] = named[0]

    def tell(done: int, total: int) -> None:
        bar(done // 100, total // 100, "drawing cells")

    found = []
    for cell in model.grid(axes, watch=tell, **fixed):
        varied = {name: value for name, value in cell.values.items() if name not in SAID_OTHERWISE}
        said = scaled(model, metadata) | varied
        said |= effective_settings(model, cell.settings, cell.drawn)
        prompt, seed = cell.settings.get("prompt", ""), cell.settings["seed"]
        found.append(Drawing(cell.drawn, prompt, seed, said, cell.at, cell.values))
    return sorted(found, key=lambda one: one.at)


def scaled(model: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, with how strongly LoRAs act where there are any."""
    from sfumato.models.lora.adjustable import own_adapters

    has_lora = "loras" in metadata or bool(own_adapters(model))
    said = {name: value for name, value in metadata.items() if name != "seed"}
    return said | ({"lora_scale": model.lora_scale} if has_lora else {})


def model_name(folder: Path) -> str:
    """What the files call the model: the folder's name; of a checkpoint also its run's."""
    given = folder.absolute()
    if given.parent.name in ("checkpoints", "averages"):
        return f"{given.parent.parent.name}/{given.name}"
    return given.name


def words_of(options: Mapping[str, Any]) -> list[str]:
    """What else is read of the options: a negative, and the prompts of regions."""
    return [options.get("negative") or "", *(text for _, text in options.get("regions", ()))]


def cut_off(model: Any, texts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """A sentence for each text that is longer than the model's text encoders read."""
    from sfumato.data.sources.metadata import printable
    from sfumato.generation.requests import check_is_unicode
    from sfumato.models.pretrained import prompt_weights, token_count

    texts = [text for text in dict.fromkeys(texts) if text]
    for text in texts:
        check_is_unicode(text)
    if not options.get("literal_prompt"):
        texts = [prompt_weights.plain(model.conditioner, text) for text in texts]
    asked = options.get("max_sequence_length")
    reading = token_count.of_conditioner(model.conditioner, asked if isinstance(asked, int) else None)
    if reading is None or not texts:
        return []
    return [
        f'"{printable(text[:40])}…" has {length} tokens, but this model reads {reading.most}: what is beyond '
        "changes nothing. Write it shorter, the most important first."
        for text, length in zip(texts, reading.count(texts), strict=True)
        if length > reading.most
    ]


def write(
    request: GenerateRequest,
    model: Any,
    drawings: Sequence[Any],
    axes: Mapping[str, Sequence[Any]],
    as_json: bool,
) -> None:
    """Write what was drawn, a sheet and a page of it, and tell where."""
    from sfumato.generation.files import DEFAULT_FPS
    from sfumato.workflow.drawings import write_drawings

    fps = float(model.info.get("fps", DEFAULT_FPS)) if request.fps is None else request.fps
    found = write_drawings(request.out, drawings, f"By {request.folder}.", request.formats, fps, axes or None)
    names = [*(file for one in found["pictures"] for file in one["files"]), found["sheet"], found["page"]]
    result(found, "\n".join(map(str, names)), as_json)


def load_model(request: GenerateRequest, device: str, adjustable: bool = False) -> Any:
    """The model with its LoRAs and control modules.

    Args:
        adjustable: the LoRAs' strength, or what they were added to, will be changed.
    Raises:
        Refused: one that does not fit, or a model of prompts without a prompt.
    """
    import torch

    from sfumato.generation import load
    from sfumato.generation.memory_limit import place_within
    from sfumato.models.control import attach
    from sfumato.models.pretrained.textual_inversion import parse_embedding

    dtype, on_gpu = drawing_dtype(request.dtype, device), device != "cpu"
    if request.memory and not on_gpu:
        raise Refused("--memory is for GPUs, and this model is drawn with on the CPU. Leave --memory out.")
    limit = parse_bytes(request.memory) if request.memory else None
    model = load(request.folder, dtype, "cpu" if on_gpu else device)
    scale = 1.0 if request.lora_scale is None else request.lora_scale
    for file, weight in request.loras:
        model.add_lora(file, weight if adjustable else weight * scale, keep_base=adjustable)
    if request.lora_scale is not None:
        scale_loras(model, scale, bool(request.loras) and not adjustable)
    for one in request.embeddings:
        word, file = parse_embedding(one)
        model.add_embedding(file, word)
    if request.image_encoder is not None and not any(place.is_file() for place in request.control_modules):
        raise Refused(
            "--image-encoder is for an IP-Adapter's file: give --control-module FILE too, or leave it out."
        )
    for place in request.control_modules:
        attach(model, place, request.image_encoder if place.is_file() else None)
    if request.labels and model.conditioner.kind != "labels":
        raise Refused(f"--label {request.labels[0]}: this model was not trained on classes. Use --prompt.")
    if not request.prompts and not request.labels and model.conditioner.kind == "labels":
        raise Refused("Say which class to draw: --label NAME. Repeat --label for several pictures.")
    if on_gpu:
        place_within(model, torch.device(device), limit, say)
    return model


def drawing_dtype(name: str, device: str) -> str:
    """The dtype a network is kept and computed in: "auto" is bfloat16 on GPUs that have it, else float32."""
    import torch

    from sfumato.training.precision import has_fast_bf16

    if name != "auto":
        return name
    return "bfloat16" if device != "cpu" and has_fast_bf16(torch.device(device)) else "float32"


def check_formats(request: GenerateRequest, model: Any) -> None:
    """Raises Refused for a kind of file, or a rate, that this model's drawings cannot be written with."""
    from sfumato.generation import files

    is_clip = "frames" in model.info
    count = request.options.get("frames") or model.info.get("frames", 1)
    known = files.PICTURE_KINDS if not is_clip else files.CLIP_KINDS
    known = (*known, "png") if is_clip and count == 1 and "frames" not in request.grid else known
    for kind in request.formats:
        one_of("--format", kind, known)
    if request.fps is not None:
        if not is_clip:
            raise Refused(f"--fps {request.fps:g}: this model draws pictures, not clips. Leave --fps out.")
        files.check_fps(request.fps)


def scale_loras(model: Any, scale: float, are_scaled: bool) -> None:
    """Scale the run's own LoRA; `are_scaled`: files were added with the scale already."""
    from sfumato.models.lora.adjustable import own_adapters

    if not are_scaled or own_adapters(model):
        model.set_lora_scale(scale)
    model.lora_scale = scale


def json_safe(options: dict[str, Any]) -> dict[str, Any]:
    """The options that can be written down: all but pictures."""
    from PIL.Image import Image

    def is_picture(value: Any) -> bool:
        return any(map(is_picture, value)) if isinstance(value, list | tuple) else isinstance(value, Image)

    return {name: value for name, value in options.items() if not is_picture(value)}


def condition_arguments(given: dict[str, Any], control_from: str) -> dict[str, Any]:
    """The pictures that guide and their numbers, as `generate` takes them.

    Raises:
        Refused: a file that cannot be read, or a kind of control without one.
    """
    from sfumato.data.condition_images import KINDS, kind_of
    from sfumato.models.pretrained.image_inputs import mask_picture

    known = {name: value for name, value in given.items() if value not in (None, [])}
    if "init" in known:
        known["init"] = still_or_clip(known["init"])
    if "mask" in known:
        known["mask"] = mask_picture(known["mask"])
    if "reference" in known:
        known["reference"] = [[still_or_clip(file) for file in known["reference"]]]
    if "control" in known:
        known["control"] = [still_or_clip(file) for file in known["control"]]
        if control_from and (clip := next((one for one in known["control"] if isinstance(one, str)), "")):
            raise Refused(
                f"--control-from makes a control of a picture, but {clip} is a clip. Give its control."
            )
        if control_from:
            one_of("Control", kind_of(control_from), KINDS)
    elif control_from:
        raise Refused("--control-from makes a control of a file: give --control FILE too, or leave it out.")
    for name in ("control_weight", "control_start", "control_end"):
        if name in known and len(known[name]) == 1:
            known[name] = known[name][0]
    return known


def still_or_clip(file: Any) -> Any:
    """The picture in a file; of a video or an animation its path, for models that draw clips."""
    from sfumato.models.pretrained.image_inputs import picture
    from sfumato.readers.clips import is_clip

    return str(file) if is_clip(str(file), Path(file)) else picture(file)


def make_control(one: Any, kind: str, width: int, height: int) -> Any:
    """A control picture of this kind, made of a picture as it is cut to what is drawn, as in training."""
    from sfumato.data.condition_images import control_image
    from sfumato.generation import to_images
    from sfumato.readers.media import center_crop_resize, to_pixels

    return to_images(control_image(to_pixels(center_crop_resize(one, width, height)[None]), kind))[0]


def further_options(images: list[Path], options: list[str], taken: Collection[str]) -> dict[str, Any]:
    """Arguments of `generate` that only some models take, from the command line.

    Raises:
        Refused: an option that is no NAME=VALUE, or whose name is `taken` by another of the command's.
    """
    known: dict[str, Any] = {"image": [[str(image) for image in images]]} if images else {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.strip():
            raise Refused(f'--option "{option}" must be NAME=VALUE, such as max_sequence_length=128.')
        if name.strip() in taken:
            raise Refused(
                f"--option {option}: {name.strip()} is said by an option of its own, or not at all."
            )
        try:
            known[name.strip()] = json.loads(value)
        except ValueError:
            known[name.strip()] = value
    return known


def parse_region(text: str) -> tuple[Any, str]:
    """MASK:TEXT, the mask as a picture.

    Raises:
        Refused: no such pair, or no such file.
    """
    from sfumato.models.pretrained.image_inputs import mask_picture

    drive = 2 if re.match(r"[A-Za-z]:[\\/]", text) else 0
    at = text.find(":", drive)
    file, prompt = text[: max(at, 0)], text[at + 1 :]
    if not file or not prompt.strip():
        raise Refused(
            f'--region "{text}" must be a mask\'s file and a prompt: --region "left.png:a red apple".'
        )
    return mask_picture(file), prompt.strip()


def parse_times(text: str) -> Any:
    """The name of a grid of times, or the times themselves, with commas between them.

    Raises:
        Refused: what stands between commas is no number.
    """
    if "," not in text:
        return text or None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise Refused(
            f'--times "{text}": give the name of a grid, or falling times with commas between: 1,0.5,0.'
        ) from None


def parse_lora(lora: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT.

    Raises:
        Refused: a weight that is no number.
    """
    from sfumato.models.lora import key_conversion

    return key_conversion.weighted(lora, "--lora")
