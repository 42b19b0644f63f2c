"""What a recipe asks of sizes, frames and theory, refused before anything is computed where it cannot be."""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from sfumato import models
from sfumato.data import buckets
from sfumato.data.settings import EMBEDDED, DataSettings
from sfumato.data.sources.sample import Sample
from sfumato.errors import Refused, printable
from sfumato.generation import Pipeline, load
from sfumato.generation.guidance import ARGUMENTS, GuidanceOptions, check_negative
from sfumato.models import control, hub_files
from sfumato.models.interface import no_context_parallel
from sfumato.models.networks.dit import DiT
from sfumato.models.networks.ulysses import check_heads, uneven
from sfumato.models.networks.unet import UNet
from sfumato.models.pretrained import token_count
from sfumato.readers import clips
from sfumato.recipe import DEFAULT, Recipe
from sfumato.settings import Table
from sfumato.training.distributed import context_parallel
from sfumato.training.loop import callbacks, trackers
from sfumato.training.objective import user_loss
from sfumato.training.objective.packed_batches import why_not_packable
from sfumato.training.optim.run_optimizer import RunOptimizer
from sfumato.user_code import is_user_code, load_user_object
from sfumato.workflow.dataset import Bucket, dataset_names, known_sizes
from sfumato.workflow.finetune import check_latents

NETWORKS: dict[str, type[models.Denoiser]] = {"dit": DiT, "unet": UNet}

COUNTED = 20_000
"""Captions whose tokens are counted, at most."""


def check_theory(recipe: Recipe) -> None:
    """Refuse a theory that is unknown, or singular where training asks it, before anything is computed."""
    if recipe.model.base != "scratch" and not recipe.model.theory:
        return
    theory = models.new_theory(recipe.model.theory)
    found = theory.check()
    if not found.ok:
        raise Refused(f"model.theory: {found.problems[0]}")


def choose_sizes(
    recipe: Recipe, samples: list[Sample], codec: models.Codec, base: Pipeline | None
) -> Bucket | Callable[[Bucket], Bucket]:
    """What size (width, height) each picture is brought to.

    Raises:
        Refused: the resolution is none the codec or the denoiser can take.
    """
    side, wanted = recipe.data.resolution, recipe.data.buckets
    check_latents(recipe, codec, base, side, side)
    if recipe.data.frames:
        _check_frames(recipe.data, codec)
    if wanted == 1 or set(dataset_names(recipe.data)) <= set(EMBEDDED):
        check_tokens(recipe, codec, base, [(side, side)])
        return side, side
    known = known_sizes(samples, bool(recipe.data.frames))
    found = buckets.choose(known, side, _grain(recipe, codec, base), wanted)
    check_tokens(recipe, codec, base, found.shapes)
    return found


def _check_frames(data: DataSettings, codec: models.Codec) -> None:
    """Raises Refused unless clips of so many frames, and of so many fewer, become latents."""
    if not codec.of_clips:
        raise Refused(f"data.frames = {data.frames}, but this model draws pictures, not clips. Leave it out.")
    named = [
        ("data.frames", data.frames),
        *(("data.short_clip_frames", one) for one in data.short_clip_frames),
    ]
    for name, frames in named:
        if frames != int(frames) or not 1 <= frames <= data.frames:
            raise Refused(
                f"data.short_clip_frames has {frames:g}; clips too short for data.frames = {data.frames} are "
                f"taken with fewer: whole numbers from 1 to {data.frames - 1}."
            )
        try:
            codec.latent_frames(int(frames))
        except Refused as refusal:
            raise Refused(f"{name} = {frames:g}: {refusal}") from None


def check_known_frames(recipe: Recipe, base: Pipeline | None) -> None:
    """Raises Refused where frames are to have times of their own, and there are none or they cannot."""
    train = recipe.train
    wanted = {
        "frame_timesteps": train.frame_timesteps != "shared",
        "first_frame_share": train.first_frame_share,
        "last_frame_share": train.last_frame_share,
    }
    named = [name for name, is_asked in wanted.items() if is_asked]
    cut = {
        "data.clips_per_video": recipe.data.clips_per_video > 1,
        "data.short_clip_frames": recipe.data.short_clip_frames,
    }
    if not recipe.data.frames and (idle := next((name for name, is_asked in cut.items() if is_asked), "")):
        raise Refused(f"{idle} is about clips: set data.frames, or leave it out.")
    if named and not recipe.data.frames:
        raise Refused(f"train.{named[0]} is about the frames of clips: set data.frames, or leave it out.")
    if named and base is not None and not base.denoiser.frames_apart:
        raise Refused(f"train.{named[0]}: {recipe.model.base} is told one time for all frames. Leave it out.")
    if train.timestep_importance_sampling and (named or recipe.data.class_images or recipe.data.class_prompt):
        other = (
            f"train.{named[0]}"
            if named
            else "data.class_images"
            if recipe.data.class_images
            else "data.class_prompt"
        )
        raise Refused(
            f"train.timestep_importance_sampling follows one loss of one time a sample, which {other} has "
            "not. Leave one of them out."
        )
    if train.last_frame_share and not train.first_frame_share:
        raise Refused(
            "train.last_frame_share is a share of train.first_frame_share, which is 0. Set that too."
        )


def check_clips(recipe: Recipe, base: Pipeline | None, samples: Iterable[Sample]) -> None:
    """Raises Refused where clips would be read as pictures beside a base of clips, without data.frames."""
    if base is None or not base.codec.of_clips or recipe.data.frames:
        return
    found = next((one.name for one in samples if clips.is_clip(one.name, one.source())), None)
    if found is None:
        return
    place = hub_files.local(recipe.model.base)
    usual = Recipe.read(place).data.frames if (place / "effective.toml").is_file() else 0
    example = f"data.frames = {usual}, as that run did" if usual else "data.frames"
    raise Refused(
        f"{found} is a clip and {recipe.model.base} draws clips, but data.frames is 0, which takes pictures. "
        f"Set {example}; or data.frames = 1, to train on a single frame of each."
    )


def check_sequence_packing(recipe: Recipe, base: Pipeline | None) -> None:
    """Raises Refused where samples of several shapes are to be joined, and cannot be or there are none."""
    if not recipe.train.sequence_packing:
        return
    data, model = recipe.data, recipe.model
    packs = (
        base.denoiser.supports_packing
        if base
        else model.denoiser not in NETWORKS or NETWORKS[model.denoiser].supports_packing
    )
    if not packs:
        raise Refused(why_not_packable(model.base if base else f'model.denoiser = "{model.denoiser}"'))
    if model.train in control.KINDS or data.condition_columns:
        raise Refused(
            "train.sequence_packing joins samples of several shapes, but pictures that guide are read in "
            "batches of one. Leave train.sequence_packing out, or do without the pictures that guide."
        )
    if recipe.train.compile:
        raise Refused(
            "train.compile makes a program for each shape, and with train.sequence_packing every step has "
            "another. Leave one of them out."
        )
    embedded = set(dataset_names(data)) <= set(EMBEDDED)
    if (data.buckets == 1 or embedded) and not data.frames:
        why = "the embedded sets have one shape" if embedded else "data.buckets = 1 crops all of them square"
        raise Refused(
            f"train.sequence_packing joins samples of several shapes, but {why}. "
            + ("Leave it out." if embedded else "Say, for example, data.buckets = 16.")
        )


def check_context_parallel(recipe: Recipe, base: Pipeline | None, count: int) -> None:
    """Raises Refused where samples are to be shared by some of `count` processes, and cannot be."""
    context_parallel.check(recipe.train, count)
    model, group_size = recipe.model, recipe.train.context_parallel
    if group_size == 1:
        return
    if model.train in control.KINDS:
        raise Refused(
            "train.context_parallel shares the tokens of each sample among processes; pictures that guide "
            "are not shared. Leave train.context_parallel at 1."
        )
    if model.dropout:
        raise Refused(
            "train.context_parallel: processes that share a sample would drop other inputs than one process "
            "does. Leave model.dropout at 0, or train.context_parallel at 1."
        )
    if base is not None:
        base.denoiser.check_context_parallel(group_size)
    elif model.denoiser != "dit":
        raise Refused(no_context_parallel(f'model.denoiser = "{model.denoiser}"'))
    else:
        check_heads(model.heads, group_size)


def check_tokens(recipe: Recipe, codec: models.Codec, base: Pipeline | None, sizes: Iterable[Bucket]) -> None:
    """Raises Refused unless samples of our DiT in these sizes can be shared evenly."""
    group_size, frames = recipe.train.context_parallel, recipe.data.frames or 1
    if group_size == 1 or (base is not None and not isinstance(base.denoiser, DiT)):
        return
    patch = base.denoiser.latent_multiple if base else recipe.model.patch
    for width, height in sizes:
        shape = codec.latent_shape(width, height, frames)
        tokens = math.prod(shape[1:]) // patch**2
        if tokens % group_size:
            raise Refused(uneven(tokens, group_size))


def size_multiple(recipe: Recipe, base: Pipeline | None) -> int:
    """The number whose multiples the sides of the recipe's pictures are."""
    codec = base.codec if base else models.new_codec(recipe.model, recipe.seed, bool(recipe.data.frames))
    return _grain(recipe, codec, base)


def _grain(recipe: Recipe, codec: models.Codec, base: Pipeline | None) -> int:
    """The smallest side whose multiples codec and denoiser both take."""
    grain = codec.stride
    while True:
        try:
            check_latents(recipe, codec, base, grain, grain)
            return grain
        except Refused:
            grain += codec.stride
            if grain > recipe.data.resolution:
                raise


def check_guidance(
    recipe: Recipe, codec: models.Codec, conditioner: models.Conditioner, base: Pipeline | None
) -> None:
    """Raises Refused where [sample] says something about guidance that would not act on what is drawn."""
    sample, has_negative = recipe.sample, bool(recipe.sample.negative)
    network = base.denoiser if base else NETWORKS.get(recipe.model.denoiser)
    if (
        not (sample.guidance_options or has_negative) or network is None
    ):  # a network of one's own is asked when it draws
        return
    guidance = sample.guidance
    if base is not None and recipe.origin("sample.guidance") == DEFAULT:
        guidance = float(base.info.get("guidance", guidance))
    options = {ARGUMENTS[name]: value for name, value in sample.guidance_options.items()}
    try:
        if sample.autoguidance_model:
            options["autoguidance_model"] = load(sample.autoguidance_model)
        how = GuidanceOptions.pop_from(options)
        policy = network.guidance
        scale = policy.guidance_at(guidance, base.theory.t_noise if base else 1.0, policy.options)
        leans = conditioner.kind != "none" and policy.needs_negative(scale, has_negative)
        check_negative(has_negative, leans, guidance)
        how.validate(network, leans, has_negative)
        how.check_latents(codec)
    except Refused as refusal:
        raise Refused(f"[sample] {refusal}") from None


def check_idle_settings(recipe: Recipe, device: torch.device, held_out: int) -> None:
    """Raises Refused for settings that are missing what they need.

    Args:
        held_out: how many samples are held out.
    """
    train = recipe.train
    trackers.check(train.trackers)
    _check_optimizer(recipe, device)
    if train.loss:
        user_loss.check(train.loss)
    for word in train.callbacks:
        callbacks.check(word)
    if train.patience and not (train.validate_every and held_out):
        missing = (
            "no sample is held out (data.held_out)" if train.validate_every else "train.validate_every is 0"
        )
        raise Refused(
            f"train.patience = {train.patience} waits for the held-out loss, but {missing}. "
            "Change that, or leave train.patience out."
        )
    if _is_given(recipe, "elastic_max_ranks") and not train.exact_elastic:
        raise Refused(
            "train.elastic_max_ranks is about train.exact_elastic = true. Say that too, or leave it out."
        )
    if train.exact_elastic and train.elastic_max_ranks & (train.elastic_max_ranks - 1):
        lower = 1 << (train.elastic_max_ranks.bit_length() - 1)
        raise Refused(
            f"train.elastic_max_ranks is {train.elastic_max_ranks}, but one tree of gradients needs a power "
            f"of 2. Choose {lower} or {2 * lower}."
        )
    if train.min_steps and not train.minutes:
        raise Refused(
            f"train.min_steps = {train.min_steps} is the least that train.minutes may come to, and "
            "train.minutes is 0. Say how many minutes, or leave train.min_steps out: train.steps decides."
        )
    if train.min_steps > train.steps:
        raise Refused(
            f"train.min_steps = {train.min_steps} is more than train.steps = {train.steps}. Change one."
        )
    if train.hsdp_shard_size and train.parallel != "hsdp":
        raise Refused(
            'train.hsdp_shard_size is about train.parallel = "hsdp". Say that too, or leave it out.'
        )


def _is_given(recipe: Recipe, name: str) -> bool:
    return recipe.origin(f"train.{name}") != DEFAULT


def _check_optimizer(recipe: Recipe, device: torch.device) -> None:
    """Raises Refused where its package is missing, it needs another machine, or it averages by itself."""
    train = recipe.train
    if is_user_code(train.optimizer):
        load_user_object(train.optimizer)
        return
    tried = RunOptimizer(
        dict(torch.nn.Linear(2, 2, device=device).named_parameters()), replace(train, lr_multipliers=Table())
    )
    if tried.keeps_average and train.ema and _is_given(recipe, "ema"):
        raise Refused(
            f'train.optimizer = "{train.optimizer}" keeps an average of its own, beside which train.ema does '
            "not act. Leave train.ema out."
        )


def recipe_warnings(recipe: Recipe) -> list[str]:
    """What acts, but hardly as it was meant, in sentences."""
    train, found, cores = recipe.train, list[str](), os.cpu_count() or 1
    if train.warmup_steps >= train.steps:
        only = (
            f" and train.lr_schedule = {train.lr_schedule} does not begin"
            if train.lr_schedule != "constant"
            else ""
        )
        found.append(
            f"The warm-up of {train.warmup_steps} steps (train.warmup_steps) is as long as the run of "
            f"{train.steps}: the learning rate rises to {train.steps / train.warmup_steps:.0%} of "
            f"train.learning_rate{only}."
        )
    if train.threads > cores:
        found.append(f"train.threads = {train.threads}, but there are {cores} cores: threads will wait.")
    return found


def truncation(conditioner: models.Conditioner, samples: Iterable[Sample]) -> dict[str, int] | None:
    """How many captions the model's own tokenizer cuts off: {read, longest, counted, cut_off}; None without.

    Of more than COUNTED captions so many, evenly spread, are counted.
    """
    found = _counted_tokens(conditioner, samples)
    if found is None:
        return None
    most, _, lengths = found
    cut = sum(length > most for length in lengths)
    return {"read": most, "longest": max(lengths), "counted": len(lengths), "cut_off": cut}


def truncation_warning(conditioner: models.Conditioner, samples: Iterable[Sample]) -> str:
    """A sentence about captions that are longer than the text encoder reads; "" where none is."""
    most, captions, lengths = _counted_tokens(conditioner, samples) or (0, [], [])
    cut = [(length, text) for length, text in zip(lengths, captions, strict=True) if length > most]
    if not cut:
        return ""
    longest, example = max(cut)
    return (
        f"{len(cut):,} of {len(captions):,} captions are longer than the {most} tokens this model reads: "
        f'what is beyond says nothing. The longest has {longest}: "{printable(example[:60])}…"'
    )


def _counted_tokens(
    conditioner: models.Conditioner, samples: Iterable[Sample]
) -> tuple[int, list[str], list[int]] | None:
    """(tokens that are read, captions, their tokens); None where no text is read."""
    reading = token_count.of_conditioner(conditioner)
    captions = sorted({caption for sample in samples for caption in sample.captions if caption})
    if reading is None or not captions:
        return None
    some = captions[:: -(-len(captions) // COUNTED)]
    return reading.most, some, reading.count(some)
