"""The pictures of a subject's class: a folder's, or drawn once by the base itself and kept in the store."""

import json
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from sfumato.data.encoding.encoded_dataset import EncodedDataset
from sfumato.data.sources import folder
from sfumato.data.sources.sample import Sample
from sfumato.errors import Refused
from sfumato.generation import Pipeline
from sfumato.generation.files import png
from sfumato.recipe import DEFAULT, Recipe
from sfumato.run_folder import write_atomic
from sfumato.training.distributed.processes import current_processes
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.objective.prior_preservation import WithPrior
from sfumato.workflow import control_training
from sfumato.workflow.encode_samples import batch_sampler_of
from sfumato.workflow.train_codec import Progress

AT_ONCE = 4
"""Pictures drawn together."""


def is_used(recipe: Recipe) -> bool:
    """Whether the recipe names a prior."""
    return bool(recipe.data.class_images or recipe.data.class_prompt)


def check(recipe: Recipe) -> None:
    """Raises Refused for a key about the prior that could not act."""
    data = recipe.data
    if not is_used(recipe):
        for name in ("num_class_images", "prior_loss_weight"):
            if recipe.origin(f"data.{name}") != DEFAULT:
                raise Refused(
                    f"data.{name} is about a prior, but none is named. Say what the subject is one of: "
                    'data.class_prompt = "a dog", or leave it out.'
                )
        return
    if control_training.control_plan_of(recipe) is not None or data.condition_columns:
        raise Refused(
            "data.class_images is for a subject that words name; a model that pictures guide has no use for "
            "it. Leave it out."
        )
    if data.class_images:
        if recipe.origin("data.num_class_images") != DEFAULT:
            raise Refused(
                "data.num_class_images: all of the folder data.class_images are shown. Leave it out."
            )
        return
    if recipe.model.base == "scratch":
        raise Refused(
            "data.class_prompt lets the base draw its prior, but this model is from scratch. Name a folder "
            "of pictures as data.class_images, or a base."
        )
    if data.frames:
        raise Refused(
            "data.class_prompt draws pictures, not clips. Name a folder of clips as data.class_images."
        )


def folder_samples(recipe: Recipe) -> list[Sample]:
    """The samples of the folder that the recipe names, all for training; none where it names no folder."""
    data = recipe.data
    if not data.class_images:
        return []
    prompt = data.class_prompt
    found = folder.open_collection(
        data.class_images, "none" if prompt else data.captions, held_out=0.0
    ).samples
    return [
        replace(
            one,
            name=f"prior/{one.name}",
            split="train",
            captions=(prompt,) if prompt else one.captions,
            file=one.file,
        )
        for one in found
    ]


def samples(
    recipe: Recipe, known: Sequence[Sample], model: Pipeline, progress: Progress | None
) -> list[Sample]:
    """The prior's samples, drawn now as far as they are missing.

    Args:
        known: those of a folder, if one is named. model: the base, as it was before training.
    """
    if known or not is_used(recipe):
        return list(known)
    place = drawn_folder(recipe, model)
    with current_processes().first():
        draw(recipe, model, place, progress)
    prompt, count = recipe.data.class_prompt, recipe.data.num_class_images
    return [Sample(f"prior/{name(i)}", (prompt,), place / name(i)) for i in range(count)]


def name(index: int) -> str:
    """The file of the prior's picture of this number."""
    return f"{index:05d}.png"


def drawn_folder(recipe: Recipe, model: Pipeline) -> Path:
    """Where the store keeps what this base draws of this prompt: its name follows from all it depends on."""
    data, parts = recipe.data, (model.denoiser, model.conditioner, model.codec)
    facts = {
        "prompt": data.class_prompt,
        "resolution": data.resolution,
        "seed": recipe.seed,
        "networks": [part.fingerprint() for part in parts],
        "theory": model.theory.name,
        "steps": model.info.get("steps"),
        "guidance": model.info.get("guidance"),
    }
    digest = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return Path(data.cache_dir).expanduser() / "priors" / digest


def draw(recipe: Recipe, model: Pipeline, place: Path, progress: Progress | None) -> None:
    """Draw the pictures that are not there; picture i depends on the recipe's seed and i alone."""
    data = recipe.data
    missing = [i for i in range(data.num_class_images) if not (place / name(i)).is_file()]
    for first in range(0, len(missing), AT_ONCE):
        group = missing[first : first + AT_ONCE]
        drawn = model.generate(
            prompt=[data.class_prompt] * len(group),
            seed=[recipe.seed + i for i in group],
            height=data.resolution,
            width=data.resolution,
            literal_prompt=True,  # it is their caption
        )
        for index, picture in zip(group, drawn, strict=True):
            metadata = {"prompt": data.class_prompt, "seed": recipe.seed + index}
            place.mkdir(parents=True, exist_ok=True)
            write_atomic(place / name(index), png(picture, metadata))
        if progress is not None:
            progress(first + len(group), len(missing), "drawing the prior")


def with_prior_preservation(
    objective: DiffusionObjective, encoded: EncodedDataset | None, recipe: Recipe
) -> DiffusionObjective | WithPrior:
    """The objective with the prior's beside it, where there is one."""
    if encoded is None:
        return objective
    model, seed = objective.model, recipe.seed
    order = batch_sampler_of(replace(recipe, seed=seed + 1), encoded)
    prior = type(objective)(
        model,
        encoded,
        order,
        recipe.train,
        seed,
        objective.caption_dropout,
        loss=objective.loss,
        read_text=objective.read_text,
    )
    return WithPrior(objective, prior, recipe.data.prior_loss_weight)
