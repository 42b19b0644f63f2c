"""The command that draws."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.commands.console import is_rank_zero, progress, result, say
from sfumato.commands.early import check_model
from sfumato.commands.options import with_present_names
from sfumato.errors import Failed, Refused, one_of
from sfumato.report.page import Picture, document, embedded, gallery, section
from sfumato.run_folder import check_output, write_atomic
from sfumato.settings import parse_bytes

AS_TRAINED = ("width", "height", "frames", "window", "tile", "chunk")
"""Options that leave it to the model where they are 0."""
PICTURES = (
    "control", "control_weight", "control_start", "control_end", "reference", "reference_scale",
    "reference_start", "reference_end", "init", "strength", "mask",
)  # fmt: skip
"""Options about pictures that guide."""


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
        }
        regions = [parse_region(one) for one in rest.pop("region") or []]
        pictures = condition_arguments({name: rest.pop(name) for name in PICTURES}, own["control_from"])
        last = rest.pop("last_image")
        options = further_options(rest.pop("image") or [], rest.pop("option") or [], known)
        usual = {"negative": "", "solver": "", **dict.fromkeys(AS_TRAINED, 0)}
        usual_left_out = {name: value for name, value in rest.items() if value not in (None, usual.get(name))}
        options |= {"regions": regions} if regions else {}
        options |= {"last_image": str(last)} if last is not None else {}
        return cls(options=usual_left_out | options | pictures, **own)


def generate(request: GenerateRequest, as_json: bool) -> None:
    """Draw `count` pictures or clips of each prompt into `out`, with a page that shows them.

    Of processes that draw together (`context_parallel`) the first one writes.
    """
    from sfumato.training.distributed import context_parallel

    if is_rank_zero():
        check_output(request.out)
    with context_parallel.drawing_processes(request.context_parallel, request.device) as processes:
        found = run_generation(request, processes)
    if processes.is_rank_zero:
        write(request, *found, as_json)


def run_generation(
    request: GenerateRequest, processes: Any
) -> tuple[Any, list[str], list[Any], dict[str, Any]]:
    """The model, each picture's prompt, the pictures or clips, and the metadata of all of them."""
    from sfumato.generation import load
    from sfumato.training.device import resolve
    from sfumato.training.distributed import context_parallel

    device = str(resolve(request.device))
    model = load_model(request, device)
    output_formats(request, model)
    prompts = [prompt for prompt in request.prompts or request.labels or [""] for _ in range(request.count)]
    options = dict(request.options)
    for sentence in cut_off(model, [*request.prompts, *words_of(options)], options):
        say(sentence)
    if request.control_from:
        shape = model.latent_shape(options.get("width"), options.get("height"))
        size = model.codec.pixel_size(shape)
        options["control"] = [
            make_control(one, request.control_from, size["width"], size["height"])
            for one in options["control"]
        ]
    metadata = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    if "autoguidance_model" in options:
        options["autoguidance_model"] = load(options["autoguidance_model"], device=device)
    with (
        progress() as bar,
        context_parallel.enabled(model.denoiser, request.context_parallel, processes),
    ):
        drawn = model.generate(
            prompt=prompts, watch=lambda done, total: bar(done, total, "drawing"), **options
        )
    metadata = {**json_safe(metadata), "model": request.folder.name}
    if request.loras:
        metadata["loras"] = [f"{Path(file).name}:{weight:g}" for file, weight in request.loras]
    return model, prompts, drawn, metadata


def words_of(options: Mapping[str, Any]) -> list[str]:
    """What else is read of the options: a negative, and the prompts of regions."""
    return [options.get("negative") or "", *(text for _, text in options.get("regions", ()))]


def cut_off(model: Any, texts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """A sentence for each text that is longer than the model's text encoders read."""
    from sfumato.data.sources.metadata import printable
    from sfumato.generation.pipeline import check_is_unicode
    from sfumato.models.pretrained import token_count

    texts = [text for text in dict.fromkeys(texts) if text]
    for text in texts:
        check_is_unicode(text)
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
    prompts: list[str],
    drawn: list[Any],
    metadata: dict[str, Any],
    as_json: bool,
) -> None:
    """Write what was drawn, a sheet and a page of it, and tell where.

    Nothing that is there is replaced: where a name is taken, all that this call writes is numbered.
    """
    kinds, fps = output_formats(request, model)
    if not request.formats and drawn and all(map(is_still, drawn)):
        drawn, kinds = [as_picture(one) for one in drawn], ["png"]
    seeds = [request.options["seed"] + index for index in range(len(drawn))]
    names = [
        f"{index:03d}-{slug(prompt)}-{seed}"
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    number = free_number(request.out, names, [ending_of(one, kind) for one in drawn for kind in kinds])
    listed = []
    for name, prompt, seed, one in zip(names, prompts, seeds, drawn, strict=True):
        place = request.out / f"{name}{number}"
        kept = save_output(one, place, kinds, {"prompt": prompt, **metadata, "seed": seed}, fps)
        listed.append({**kept, "prompt": prompt, "seed": seed})
    sheet, page = overview(request, drawn, listed, fps, number)
    result(
        {"pictures": listed, "sheet": sheet, "page": page},
        "\n".join([*(file for one in listed for file in one["files"]), str(sheet), str(page)]),
        as_json,
    )


def is_still(drawn: Any) -> bool:
    """Whether a drawing of a model of clips is a clip of one frame."""
    from sfumato.generation import files

    return files.is_clip(drawn) and len(drawn) == 1


def as_picture(drawn: Any) -> Any:
    """The one frame of a still."""
    from PIL import Image

    return Image.fromarray(drawn[0])


def ending_of(drawn: Any, kind: str) -> str:
    """What the name of a drawing's file, or of the folder of its frames, ends in."""
    return "" if kind == "frames" else f".{kind}"


def free_number(out: Path, names: Sequence[str], endings: Collection[str]) -> str:
    """What a call adds to the names of its files so that none is taken: nothing, "-2", "-3", …

    The page is made at once, so that another call at the same time takes the next number.
    """
    out.mkdir(parents=True, exist_ok=True)
    taken = {one.name for one in out.iterdir()}
    for number in ("", *(f"-{count}" for count in range(2, len(taken) + 3))):
        wanted = {f"{name}{number}{ending}" for name in names for ending in endings}
        wanted |= {f"sheet{number}.png", f"index{number}.html"}
        if wanted.isdisjoint(taken):
            try:
                (out / f"index{number}.html").touch(exist_ok=False)
            except FileExistsError:
                continue
            return number
    raise Failed(
        f"{out} is being filled by others faster than a free name can be found. Choose another --out."
    )


def load_model(request: GenerateRequest, device: str) -> Any:
    """The model with its LoRAs and control modules.

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
    for file, weight in request.loras:
        model.add_lora(file, weight)
    for one in request.embeddings:
        word, file = parse_embedding(one)
        model.add_embedding(file, word)
    if request.image_encoder is not None and not any(place.is_file() for place in request.control_modules):
        raise Refused(
            "--image-encoder is for an IP-Adapter's file: give --control-module FILE too, or leave it out."
        )
    for place in request.control_modules:
        attach(model, place, request.image_encoder if place.is_file() else None)
    if request.labels and (request.prompts or model.conditioner.kind != "labels"):
        raise Refused(
            "Give --label or --prompt, not both."
            if request.prompts
            else f"--label {request.labels[0]}: this model was not trained on classes. Use --prompt."
        )
    if not request.prompts and not request.labels and model.conditioner.kind != "none":
        if model.conditioner.kind == "labels":
            raise Refused("Say which class to draw: --label NAME. Repeat --label for several pictures.")
        raise Refused('Say what to draw: --prompt "a red apple". Repeat --prompt for several pictures.')
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


def output_formats(request: GenerateRequest, model: Any) -> tuple[list[str], float]:
    """The kinds of file to write, and the frames a second of clips.

    Raises:
        Refused: a kind this model's drawings cannot be written as.
    """
    from sfumato.generation import files

    is_clip = "frames" in model.info
    known = files.CLIP_KINDS if is_clip else files.PICTURE_KINDS
    kinds = [one_of("--format", kind, known) for kind in request.formats or known[:1]]
    if request.fps is None:
        return kinds, float(model.info.get("fps", files.DEFAULT_FPS))
    if not is_clip:
        raise Refused(f"--fps {request.fps:g}: this model draws pictures, not clips. Leave --fps out.")
    return kinds, files.check_fps(request.fps)


def overview(
    request: GenerateRequest, drawn: list[Any], listed: list[dict[str, Any]], fps: float, number: str
) -> tuple[Path, Path]:
    """Write a contact sheet and a page of what was drawn; where they are."""
    from sfumato.generation import files
    from sfumato.generation.contact_sheet import sheet_of

    sheet, page = request.out / f"sheet{number}.png", request.out / f"index{number}.html"
    write_atomic(sheet, files.png(sheet_of(drawn, [row["prompt"] for row in listed]), {}))
    there = [
        Picture(embedded(*preview_bytes(one, fps)), row["prompt"], f"seed {row['seed']}")
        for one, row in zip(drawn, listed, strict=True)
    ]
    title = "Clips" if files.is_clip(drawn[0]) else "Pictures"
    write_atomic(page, document(title, f"By {request.folder}.", [section("Drawn", gallery(there))]))
    return sheet, page


def save_output(
    drawn: Any, place: Path, kinds: Sequence[str], metadata: dict[str, Any], fps: float
) -> dict[str, Any]:
    """Write a picture or clip to `place` and an ending; where it is now, numbered frames as their folder."""
    from sfumato.generation import files

    written = []
    for kind in kinds:
        for ending, content in files.contents(drawn, kind, metadata, fps).items():
            file = Path(f"{place}{ending}")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, content)
            written.append(str(file))
    frames = next((i for i, kind in enumerate(kinds) if kind == "frames"), None)
    first = str(place) if frames == 0 else written[0]
    return {"file": first, "files": written}


def preview_bytes(drawn: Any, fps: float) -> tuple[bytes, str]:
    """What a page shows of a picture or clip: its bytes and what they are."""
    from PIL import Image

    from sfumato.generation import files

    if not files.is_clip(drawn):
        return files.png(drawn, {}), "image/png"
    return files.webp([Image.fromarray(frame) for frame in drawn], {}, fps), "image/webp"


def slug(text: str, most: int = 40) -> str:
    """A text as a part of a file's name."""
    kept = "".join(letter if letter.isalnum() else "-" for letter in text.lower())
    return "-".join(part for part in kept.split("-") if part)[:most] or "picture"


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


def parse_lora(lora: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT.

    Raises:
        Refused: a weight that is no number.
    """
    from sfumato.models.lora import key_conversion

    return key_conversion.weighted(lora, "--lora")
