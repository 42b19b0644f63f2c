"""Prepare a run: resolve what a recipe stands on, then make its model's stages and encode its samples."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from sfumato import models
from sfumato.data.encoding.encoded_dataset import EncodedDataset
from sfumato.data.sources.sample import Collection, Sample
from sfumato.generation import Pipeline, as_pipeline
from sfumato.models.interface import StagePlacement
from sfumato.recipe import Recipe
from sfumato.run_folder import RunFolder
from sfumato.training import device as devices
from sfumato.training.estimate import probe
from sfumato.training.loop.loop import print_to_stderr
from sfumato.workflow import (
    base_images,
    class_images,
    condition_encoders,
    control_training,
    encode_ahead,
    own_stages,
)
from sfumato.workflow.checks import (
    check_clips,
    check_guidance,
    check_idle_settings,
    check_known_frames,
    check_sequence_packing,
    check_theory,
    choose_sizes,
)
from sfumato.workflow.dataset import Bucket, class_names, collection_of
from sfumato.workflow.encode_samples import curriculum_stages, encoded_samples
from sfumato.workflow.finetune import base_of, check_latents, check_tokens_in_captions, text_plan_of
from sfumato.workflow.resume import data_fingerprint, pixels_note
from sfumato.workflow.train_codec import Progress, trained_codec

Say = Callable[[str], None]


@dataclass(frozen=True)
class PreparedRun:
    """All that training needs, made once: the model's stages and the encoded samples."""

    model: Pipeline
    collection: Collection
    train: EncodedDataset
    held_out: EncodedDataset
    set_aside: list[dict[str, str]]
    device: torch.device
    curriculum: list[tuple[int, EncodedDataset]] = field(default_factory=list)
    """Of a curriculum: until which step, the training samples at a smaller resolution."""
    class_images: EncodedDataset | None = None
    """The pictures of the subject's class, shown beside."""


@dataclass(frozen=True)
class ResolvedRecipe:
    """What a recipe stands on, checked before anything is computed or written."""

    collection: Collection
    bucket_of: Bucket | Callable[[Bucket], Bucket]
    device: torch.device
    base: Pipeline | None
    conditioner: models.Conditioner
    class_images: list[Sample] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        """All that are there before anything is drawn."""
        return [*self.collection.samples, *self.class_images]

    @property
    def classes(self) -> list[str]:
        """Of a model of classes, their names in the order of their numbers; of any other none."""
        return list(getattr(self.conditioner, "names", ())) if self.conditioner.kind == "labels" else []


def resolve_recipe(recipe: Recipe) -> ResolvedRecipe:
    """Look at all that a recipe names.

    Raises Refused for whatever cannot be used.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    device = devices.resolve(recipe.train.device)
    check_theory(recipe)
    encode_ahead.cache_limit_bytes(recipe)
    control_training.check(recipe)
    class_images.check(recipe)
    if control_training.control_plan_of(recipe) is None:
        condition_encoders.condition_dropout(recipe.data, recipe.data.condition_columns)
    earlier = curriculum_stages(recipe)
    base = base_of(recipe)
    codec = base.codec if base else models.new_codec(recipe.model, recipe.seed, bool(recipe.data.frames))
    check_known_frames(recipe, base)
    check_sequence_packing(recipe, base)
    collection = collection_of(recipe)
    check_clips(recipe, base, collection.samples)
    control_training.check_column(recipe, collection.samples)
    classes = class_names(collection) if recipe.model.text_encoder == "labels" else ()
    conditioner = base.conditioner if base else models.new_conditioner(recipe.model, classes)
    base_images.check(recipe, conditioner)
    check_guidance(recipe, codec, conditioner, base)
    check_tokens_in_captions(
        recipe.model.new_tokens, (text for one in collection.samples for text in one.captions)
    )
    for _, smaller in earlier:
        check_latents(recipe, codec, base, smaller.data.resolution, smaller.data.resolution)
    shapes = choose_sizes(recipe, collection.samples, codec, base)
    check_idle_settings(recipe, device, len(collection.with_split("held_out")))
    return ResolvedRecipe(collection, shapes, device, base, conditioner, class_images.folder_samples(recipe))


def prepare_run(
    recipe: Recipe,
    resolved: ResolvedRecipe,
    progress: Progress | None = None,
    say: Say = print_to_stderr,
    run: RunFolder | None = None,
    part: tuple[int, int] | None = None,
) -> PreparedRun:
    """The stages of the recipe's model and its samples, encoded.

    Args:
        run: is told the phases; part: (rank, world) of those that encode, default the processes joined.
    """
    collection, bucket_of, device, base = (
        resolved.collection,
        resolved.bucket_of,
        resolved.device,
        resolved.base,
    )
    trained_on = collection.with_split("train") or collection.samples
    with phase(run, "codec"):
        codec = base.codec if base else trained_codec(recipe, trained_on, bucket_of, device, progress, say)
    model = model_of(recipe, resolved, codec)
    if run is not None:  # what is only encoded may be read by a loop of one's own
        condition_encoders.check_read(recipe, model)
    condition_encoders.condition_dropout(recipe.data, list(condition_encoders.encoders(model, recipe.data)))
    own_stages.check_own_stages(recipe, model)
    drawing = (model.denoiser, model.codec, model.conditioner) if class_images.is_used(recipe) else ()
    with phase(run, "prior"), model.at_work(*drawing):
        others = class_images.samples(recipe, resolved.class_images, model, progress)
    with phase(run, "encode"), model.at_work(model.codec, model.conditioner):
        encoded = encoded_samples(recipe, collection.samples, bucket_of, model, progress, say, part)
        earlier = []
        for until, smaller in curriculum_stages(recipe):
            shapes = choose_sizes(smaller, collection.samples, codec, base)
            stage = f"until step {until}"
            found = encoded_samples(smaller, collection.samples, shapes, model, progress, say, part, stage)
            earlier.append((until, found.with_split("train")))
        of_class = None
        if others:
            shapes = choose_sizes(recipe, others, codec, base)
            of_class = encoded_samples(recipe, others, shapes, model, progress, say, part, "prior")
    aside = [*collection.set_aside, *encoded.set_aside]
    listed = [{"file": one.file, "reason": one.reason} for one in aside]
    if run is not None:
        pixels = encoded.pixels
        if of_class is not None and resolved.class_images:  # those that are drawn are the same every time
            pixels = f"{pixels} {of_class.pixels}"
        _record_data(listed, encoded, collection.name, data_fingerprint(resolved.samples), pixels, run, say)
    else:
        _say_set_aside(listed, encoded, say)
    train, held_out = encoded.with_split("train"), encoded.with_split("held_out")
    return PreparedRun(model, collection, train, held_out, listed, device, earlier, of_class)


def model_of(recipe: Recipe, resolved: ResolvedRecipe, codec: models.Codec) -> Pipeline:
    """The recipe's model around its codec, its frozen stages ready to encode."""
    base, frames = resolved.base, recipe.data.frames
    model = as_pipeline(
        base or models.new_model(recipe.model, codec, resolved.conditioner, recipe.seed, frames)
    )
    model.info |= {"frames": frames, "fps": recipe.data.fps} if frames else {}
    if frames and recipe.train.first_frame_share:
        model.info["known"] = ["first", *(["last"] if recipe.train.last_frame_share else [])]
    if base is None:
        model.info |= {"resolution": recipe.data.resolution}
        model.info |= {"steps": recipe.sample.steps, "guidance": recipe.sample.guidance}
    if recipe.sample.guidance_options:
        model.info["guidance_options"] = recipe.sample.guidance_options
    if stages_take_turns(recipe, resolved.device):
        model.placement = StagePlacement(resolved.device)
    else:
        model.to(resolved.device)
    control_training.attach_control(model, recipe)
    model.codec.eval().requires_grad_(False)
    model.conditioner.eval().requires_grad_(False)
    return model


def stages_take_turns(recipe: Recipe, device: torch.device) -> bool:
    """Whether codec and conditioner are on the device only while they work, the denoiser when it is ready.

    Not where they work in every step: pictures encoded as they are shown, text encoders that are trained,
    pictures that guide.
    """
    always = recipe.data.stream or recipe.data.cache_limit or text_plan_of(recipe)
    return device.type == "cuda" and not always and control_training.control_plan_of(recipe) is None


def _record_data(
    aside: list[dict[str, str]],
    encoded: EncodedDataset,
    name: str,
    content: str,
    pixels: str,
    run: RunFolder,
    say: Say,
) -> None:
    """Say what was set aside, repaired and changed, and write the summary of the data."""
    _say_set_aside(aside, encoded, say)
    if note := pixels_note(run, pixels, content):
        say(note)
        run.event("note", text=note)
    sizes: dict[str, int] = {}
    for item in encoded.items:
        size = "×".join(map(str, item.bucket))
        sizes[size] = sizes.get(size, 0) + 1
    captions = len({caption for caption in encoded.captions if caption})
    summary = {
        "name": name,
        "content": content,
        "pixels": pixels,
        "samples": len(encoded.with_split("train")),
        "captions": captions,
    }
    held_out = len(encoded.with_split("held_out"))
    run.event("data", summary={**summary, "held_out": held_out, "sizes": sizes, "set_aside": aside})


def _say_set_aside(aside: list[dict[str, str]], encoded: EncodedDataset, say: Say) -> None:
    for note in encoded.notes:
        say(note)
    for one in aside:
        say(f"set aside: {one['file']}: {one['reason']}")
    if aside:
        say(f"{len(aside)} set aside, {len(encoded)} samples left.")


@contextmanager
def phase(run: RunFolder | None, name: str) -> Iterator[None]:
    """Write how long a part took and the most memory the process had meanwhile, also when it ends early."""
    began = time.perf_counter()
    with probe.peak_memory(torch.device("cpu")) as most:
        try:
            yield
        finally:
            if run is not None:
                seconds = round(time.perf_counter() - began, 3)
                run.event("phase", name=name, seconds=seconds, process_gb=round(most() / 1e9, 3))
