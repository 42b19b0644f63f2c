"""A diffusers pipeline's folder → a model: recognised by model_index.json, read from safetensors only."""

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import Failed, Refused, nearest
from sfumato.models import hub_files
from sfumato.models.codecs.image import PixelCodec
from sfumato.models.codecs.pretrained import PretrainedCodec
from sfumato.models.files import PICKLES, must_be_safetensors
from sfumato.models.interface import Codec, Conditioner, Denoiser, Model
from sfumato.models.load_network import load_network, quiet
from sfumato.models.pretrained import schedulers, single_file, train_text_encoders
from sfumato.models.pretrained.families import pipelines
from sfumato.models.pretrained.family import Family
from sfumato.models.pretrained.image_inputs import Pictures
from sfumato.models.pretrained.stages import PretrainedConditioner, PretrainedDenoiser
from sfumato.models.size_limits import check_scheduler_size
from sfumato.models.text.encoder import NoConditioner
from sfumato.models.text.labels import LabelConditioner
from sfumato.theory.types import Denoise

INDEX = "model_index.json"
VARIANT = re.compile(r"(?:diffusion_pytorch_)?model(?:-\d+-of-\d+)?\.([^.]+?)(?:-\d+-of-\d+)?\.safetensors")
"""Names of weights that are one of several kinds, in one file or in shards (of older or newer writers)."""


@dataclass
class PipelineSampling:
    """How the pipeline samples: its own times, and our solver that is nearest to its scheduler's."""

    family: Family
    pipe: Any

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler."""
        return self.pipe.scheduler

    @property
    def solver(self) -> str:
        """The name of our solver."""
        return schedulers.solver_of(self.scheduler)[0]

    @property
    def order(self) -> int | None:
        """Its order; None for its usual one."""
        return schedulers.solver_of(self.scheduler)[1]

    def init_noise_sigma(self, steps: int) -> float:
        """What unit noise is multiplied by to be the first state."""
        return schedulers.init_noise_sigma(self.scheduler, steps)

    @property
    def clip_sample_range(self) -> float | None:
        """How far from 0 the scheduler lets clean samples be; None for anywhere."""
        config = self.scheduler.config
        return float(config.get("clip_sample_range") or 1.0) if config.get("clip_sample") else None

    def output_size(self, pictures: Pictures) -> tuple[int, int] | None:
        """(height, width) of what is drawn beside these pictures, where that follows from them."""
        return self.family.output_size(self.pipe, pictures)

    def times(self, steps: int, shape: Sequence[int]) -> Tensor:
        """The pipeline's grid [steps + 1] for latents of this shape, in the theory's time."""
        return schedulers.times_of(self.family.prepared(self.scheduler, steps, shape))

    def uses_own_scheduler(self, steps: int) -> bool:
        """Whether its scheduler takes other steps than our solver would."""
        return not schedulers.steps_as_we_do(self.scheduler, steps)

    def states(self, denoise: Denoise, noise: Tensor, steps: int, shape: Sequence[int]) -> Iterator[Tensor]:
        """The scheduler's own states, from unit noise; `denoise` is asked in the theory's time."""
        ready = self.family.prepared(self.scheduler, steps, shape)
        return schedulers.states(
            denoise, noise, ready, 1 if ready.config.get("invert_sigmas") else self.family.sign
        )


def read_index(folder: Path) -> dict[str, Any]:
    """The content of model_index.json.

    Raises:
        Failed: it is damaged.
    """
    try:
        return dict(json.loads((folder / INDEX).read_text(encoding="utf-8")))
    except (OSError, ValueError) as problem:
        raise Failed(f"{folder / INDEX} is damaged ({problem}). Copy the folder again.") from problem


def family_of(folder: Path) -> Family:
    """The family that speaks to the pipeline in a folder.

    Raises:
        Refused: no family does; the nearest pipeline is offered.
    """
    name, known = str(read_index(folder).get("_class_name")), pipelines()
    if name not in known:
        raise Refused(f'{folder} holds a "{name}", which no family here reads.{nearest(name, known)}')
    return known[name]


def unused_of(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a pipeline's components that its family does not use, whether they are there or not."""
    family = pipelines().get(str(index.get("_class_name")))
    return () if family is None else tuple(family.unused_components)


def find_model(given: Path | str, variant: str = "") -> Path:
    """Where a model is: the path as given, or of the Hub's what its family reads; see `hub_files.place`."""
    return hub_files.place(given, variant, unused_of)


def check_parts(folder: Path, family: Family) -> None:
    """Raises Refused where a component that the index lists is missing, or is only there as a pickle."""
    for name, entry in read_index(folder).items():
        if (
            name.startswith("_")
            or name in family.unused_components
            or not isinstance(entry, list)
            or entry[0] is None
        ):
            continue
        place = folder / name
        if not place.is_dir():
            raise Refused(
                f'{folder} lists a component "{name}" ({entry[1]}) but has no folder {name}/. '
                "Download the model again, whole."
            )
        files = [file.name for file in place.iterdir()]
        is_network = "config.json" in files and not name.startswith("tokenizer")
        if not is_network or any(file.endswith(".safetensors") for file in files):
            continue
        pickles = [file for file in files if file.endswith(PICKLES)]
        if pickles:
            must_be_safetensors(
                place / pickles[0], "load the pipeline with diffusers and save_pretrained(FOLDER)"
            )
        raise Refused(f"{place} holds no weights (*.safetensors). Download the model again, whole.")


def left_out(index: dict[str, Any], family: Family) -> list[str]:
    """Components that are not loaded: those no stage of ours uses, and those a model was saved without."""
    empty = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None]
    return [*empty, *(name for name in family.unused_components if name in index and name not in empty)]


def variant_of(folder: Path, index: dict[str, Any], dtype: torch.dtype) -> str | None:
    """Which of several weights to read ("fp16" of model.fp16.safetensors), None where a component has plain.

    Of several variants that of the dtype is taken, else the first by name.
    """
    usual = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype)
    found: set[str] = set()
    for name in index:
        files = [file.name for file in (folder / name).glob("*.safetensors")]
        variants = [word.group(1) for file in files if (word := VARIANT.fullmatch(file)) is not None]
        if files and len(variants) == len(files):
            found |= set(variants)
    return None if not found else usual if usual in found else min(found)


def open_pipeline(
    folder: Path,
    dtype: torch.dtype,
    family: Family,
    held: dict[str, Any],
    codec_dtype: torch.dtype | None = None,
) -> Any:
    """diffusers' own pipeline object from a folder, with the components that are held already.

    Args:
        codec_dtype: of the autoencoder's weights; None: as the others'.

    Raises:
        Refused: it does not load; the reason is passed on.
    """
    import diffusers
    from diffusers.utils import logging
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.disable_progress_bar()
    for part in sorted(folder.glob("*/scheduler_config.json")):
        check_scheduler_size(part)
    index = read_index(folder)
    given: dict[str, Any] = dict.fromkeys(left_out(index, family))
    try:
        composed = family.custom_components(folder)  # diffusers takes only the classes that the index names
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        said = " ".join(str(problem).split())[:300]
        raise Refused(f"{folder} does not load as a {index['_class_name']}: {said}") from problem
    given |= dict.fromkeys(composed) | held
    variant = variant_of(folder, index, dtype)
    todo = {name: index[name] for name in index if name not in given}
    dtypes = dict.fromkeys(todo, dtype) | {"vae": codec_dtype or dtype}
    given |= open_networks(folder, todo, dtypes, variant)
    if "requires_safety_checker" in index:
        given["requires_safety_checker"] = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer diffusers call torch_dtype dtype
            pipe: Any = getattr(diffusers, index["_class_name"]).from_pretrained(
                folder,
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                **given,
            )
    except (OSError, ValueError, TypeError, RuntimeError) as problem:
        said = " ".join(str(problem).split())
        raise Refused(f"{folder} does not load as a {index['_class_name']}: {said}") from problem
    pipe.register_modules(**composed)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def open_networks(
    folder: Path, index: dict[str, Any], dtypes: Mapping[str, torch.dtype], variant: str | None
) -> dict[str, nn.Module]:
    """The components that are networks of diffusers or transformers, with every weight of their files.

    Raises:
        Refused: one lacks a weight, or its file holds a key that no layer has.
    """
    import diffusers
    import transformers

    found: dict[str, nn.Module] = {}
    for name, entry in index.items():
        if (
            name.startswith("_")
            or not isinstance(entry, list)
            or entry[0] not in ("diffusers", "transformers")
        ):
            continue
        kind = getattr(diffusers if entry[0] == "diffusers" else transformers, str(entry[1]), None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_pretrained")):
            continue
        files = [file.name for file in (folder / name).glob("*.safetensors")]
        words = {word.group(1) for file in files if (word := VARIANT.fullmatch(file)) is not None}
        found[name] = load_network(
            kind, str(folder / name), dtypes[name], variant if variant in words else None
        )
    return found


def first_of(pipe: Any, *names: str, otherwise: int = 1) -> int:
    """The first of these attributes that the pipeline has."""
    return next((int(getattr(pipe, name)) for name in names if getattr(pipe, name, None)), otherwise)


def codec_of(family: Family, pipe: Any) -> Codec:
    """The pipeline's autoencoder as a codec; pixels where it has none."""
    vae = getattr(pipe, "vae", None)
    if vae is None:
        channels = int(getattr(pipe, family.network).config.get("in_channels") or 3)
        if channels not in (1, 3):
            raise Refused(
                f"A network on pixels of {channels} channels cannot be drawn with: 3 (RGB) or 1 (grey)."
            )
        return PixelCodec(grey=channels == 1)
    shift, scale = family.statistics(vae)
    gather = int(getattr(family, "gather", 1))
    levels = len(vae.config.get("block_out_channels") or (1,))
    stride = first_of(
        pipe,
        "vae_scale_factor_spatial",
        "vae_spatial_compression_ratio",
        "vae_spatial_scale_factor",
        "vae_scale_factor",
        otherwise=2 ** (levels - 1),
    )
    time_stride = first_of(
        pipe, "vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor"
    )
    return PretrainedCodec(
        vae, shift, scale, stride * gather, time_stride, family.patch, shift.ndim == 4, patch=gather
    )


def conditioner_of(family: Family, pipe: Any, codec: Codec) -> Conditioner:
    """What guides the pipeline: text, labels, or nothing."""
    if hasattr(pipe, "encode_prompt"):
        return PretrainedConditioner(family, pipe, codec.encode)
    network = getattr(pipe, family.network)
    if network.config.get("num_embeds_ada_norm"):
        names = {str(k).lower(): int(v) for k, v in (getattr(pipe, "labels", None) or {}).items()}
        return LabelConditioner(names, int(network.config["num_embeds_ada_norm"]))
    return NoConditioner()


def load_pipeline(
    folder: Path,
    dtype: torch.dtype,
    model_class: type[Model],
    file: Path | None = None,
    codec_dtype: torch.dtype | None = None,
) -> Model:
    """The model in a diffusers folder; with `file`, that file's weights in the folder's networks.

    Raises:
        Refused: an unknown pipeline, a missing component, weights that are not safetensors or do not fit.
    """
    family = family_of(folder)
    held: dict[str, Any] = {}
    said: dict[str, Any] = {}
    if file is None:
        check_parts(folder, family)
    else:
        said = {} if family.timestep_input else single_file.said_of_theory(file)
        held = single_file.components(file, folder, read_index(folder), family.network, dtype, codec_dtype)
    pipe = open_pipeline(folder, dtype, family, held, codec_dtype)
    if hasattr(getattr(pipe, "scheduler", None), "alphas_cumprod"):
        pipe.register_modules(scheduler=schedulers.with_table(pipe.scheduler, said))
    network: nn.Module = family.get_denoiser(pipe)
    codec = codec_of(family, pipe)
    if misfit := family.why_incompatible(network, pipe, codec.latent_channels):
        raise Refused(
            f"{folder} is put together from different models: {misfit}. Download the model again, whole."
        )
    model = model_class(
        family.theory(pipe.scheduler),
        codec,
        conditioner_of(family, pipe, codec),
        PretrainedDenoiser(family, network),
        {**family.info(pipe), "family": type(family).__name__, "pipeline": type(pipe).__name__},
    )
    for stage in (model.codec, model.conditioner, model.denoiser):
        stage.eval().requires_grad_(False)
    model.origin, model.sampling = pipe, PipelineSampling(family, pipe)
    return model


def save_pipeline(model: Model, folder: Path, denoiser: Denoiser) -> None:
    """Write a model that came from a pipeline as such a pipeline again, with this denoiser's weights."""
    pipe: Any = model.origin
    family: Family = denoiser.family
    family.set_denoiser(pipe, denoiser.backbone)
    try:
        with quiet("diffusers"), train_text_encoders.merged_text_encoders(pipe):
            pipe.save_pretrained(folder, safe_serialization=True)
    finally:
        family.set_denoiser(pipe, model.denoiser.backbone)
    for name, part in pipe.components.items():
        if hasattr(part, "written_as"):  # composed here, so diffusers does not know it
            part.save_pretrained(folder / name)
            index = read_index(folder) | {name: list(part.written_as)}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
