"""What a recipe would do, said before it is done: counts, what is missing, memory and disk."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import psutil
import torch

from sfumato import models
from sfumato.data import buckets
from sfumato.data.encoding.batch_sampler import BatchSampler
from sfumato.data.sources import hub_dataset
from sfumato.data.sources.sample import Collection, Sample
from sfumato.generation import Pipeline, as_pipeline
from sfumato.generation.memory_limit import stage_bytes
from sfumato.models import hub_files
from sfumato.models.interface import StagePlacement
from sfumato.models.io import adapter_run
from sfumato.models.pretrained.pipeline_folder import unused_of
from sfumato.recipe import Recipe
from sfumato.run_folder import RunFolder
from sfumato.settings import parse_bytes, plain
from sfumato.training.device import free_bytes
from sfumato.training.distributed.strategy import processes_per_machine
from sfumato.training.estimate import fit_memory, probe
from sfumato.training.estimate.memory import MemoryBreakdown, count_memory, repeated_blocks
from sfumato.training.precision import effective_precision
from sfumato.workflow import class_images, condition_encoders, control_training, own_stages
from sfumato.workflow.checks import check_context_parallel, recipe_warnings, truncation
from sfumato.workflow.dataset import dataset_names, known_sizes
from sfumato.workflow.finetune import pinned_base, prepare_trainable, with_base_sampling
from sfumato.workflow.planning import phase_costs
from sfumato.workflow.planning.step_costs import (
    StepEstimate,
    checkpoint_bytes,
    copies_bytes,
    inputs_of,
    step_cost,
    store_bytes,
)
from sfumato.workflow.planning.summary import unusual
from sfumato.workflow.prepare import ResolvedRecipe, resolve_recipe, stages_take_turns
from sfumato.workflow.resume import check_resume, data_fingerprint
from sfumato.workflow.train_codec import codec_home


def plan(recipe: Recipe, many: int = 0) -> dict[str, Any]:
    """Counts and sizes of a run, without encoding, training or writing anything.

    Args:
        many: processes that would share the run; 0: those torchrun started, else one.
    Returns:
        plain values: samples, captions, held_out, set_aside, tokens, codec, parameters, steps_per_epoch,
        epochs, device, precision, memory_gb, memory, seconds_per_step, hours, probed, process_gb, phases,
        store_gb, disk_gb, run, step, free, unusual, and recipe: {key: {value that takes effect,
        origin}}. `summary` makes twelve lines of them. While something is to be fetched, only fetch: {id:
        commit, files, size, bytes}.
    Raises:
        Refused: for whatever training would refuse.
    """
    if fetched := to_fetch(recipe):
        return {"fetch": fetched, "then": "memory, disk and time are said once these files are here"}
    resolved = resolve_recipe(recipe)
    collection, base = resolved.collection, resolved.base
    check_context_parallel(recipe, base, many or started_processes())
    condition_encoders.check_read_early(recipe, base)
    train = collection.with_split("train")
    found = _counts(collection)
    found |= {"tokens": cut} if (cut := truncation(resolved.conditioner, collection.samples)) else {}
    frames = recipe.data.frames
    codec = base.codec if base else models.new_codec(recipe.model, recipe.seed, bool(frames))
    model = as_pipeline(
        base or models.new_model(recipe.model, codec, resolved.conditioner, recipe.seed, frames)
    )
    control_training.attach_control(model, recipe)
    condition_encoders.check_read(recipe, model)
    home = None
    if base is None and models.needs_training(recipe.model, codec):
        home = codec_home(recipe, train, resolved.bucket_of)
    found["codec"] = f"of {recipe.model.base}" if base else _codec(recipe, home)
    network = prepare_trainable(model, recipe, resolved.device)
    parameters = sum(one.numel() for one in network.parameters() if one.requires_grad)
    found["parameters"] = sum(one.numel() for one in network.parameters())
    found["trained_parameters"] = parameters
    epoch_samples = sum(sample.repeat for sample in train)
    found["steps_per_epoch"] = max(1, round(epoch_samples) // recipe.train.batch)
    if callable(resolved.bucket_of):
        found["buckets"] = _buckets(recipe, train, resolved.bucket_of)
    found["device"] = str(resolved.device)
    found["precision"] = effective_precision(
        recipe.train.precision, resolved.device, recipe.train.weight_dtype
    )
    if stages_take_turns(recipe, resolved.device):
        model.placement = StagePlacement(resolved.device)
    else:
        model.codec.to(resolved.device)
        model.conditioner.to(resolved.device)
    captions = [sample.captions for sample in train]
    own_stages.check_own_stages(recipe, model)
    step = step_cost(
        recipe,
        model,
        captions,
        network,
        many or started_processes(),
        _sizes(recipe, train, resolved.bucket_of),
    )
    found["epochs"] = round(recipe.train.expected_steps(step.seconds) / found["steps_per_epoch"], 1)
    with model.at_work(model.codec, model.conditioner):
        parts = phase_costs.phase_costs(recipe, model, network, resolved, step, home)
    found |= step_report(recipe, step, parts, resolved.device)
    if resolved.device.type == "cuda":
        held = device_bytes(model, step.memory, parts)
        found["device_gb"] = {name: gigabytes(size) for name, size in held.items()}
    if class_images.is_used(recipe):
        drawn = 0 if resolved.class_images else recipe.data.num_class_images
        found["prior"] = (
            f"{drawn} pictures, drawn once" if drawn else f"{len(resolved.class_images)} pictures"
        )
    store = store_bytes(recipe, len(collection.samples), codec)
    found["store_gb"] = round(store / 1e9, 3)
    found["disk_gb"] = round((store + checkpoint_bytes(recipe, parameters)) / 1e9, 3)
    effective = with_base_sampling(recipe, base)
    found |= _standing(effective, resolved)
    found["free"] = _free(recipe, resolved.device)
    found["recipe"] = {
        name: {"value": plain(value), "origin": effective.origin(name)}
        for name, value in effective.values().items()
    }
    found["unusual"] = unusual(found, recipe_warnings(recipe))
    return found


def _counts(collection: Collection) -> dict[str, Any]:
    """How much data there is, and what of it is set aside."""
    return {
        "samples": len(collection.with_split("train")),
        "held_out": len(collection.with_split("held_out")),
        "captions": len({caption for sample in collection.samples for caption in sample.captions}),
        "set_aside": [{"file": one.file, "reason": one.reason} for one in collection.set_aside],
    }


def _free(recipe: Recipe, device: torch.device) -> dict[str, float]:
    """GB that are free now: memory of this machine, of the device if it has its own, and disk for the run."""
    place = next(one for one in (Path(recipe.output), *Path(recipe.output).parents) if one.is_dir())
    found = {"memory": psutil.virtual_memory().available, "disk": shutil.disk_usage(place).free}
    if device.type != "cpu":
        found["device"] = free_bytes(device)
    return {f"{name}_gb": gigabytes(size) for name, size in found.items()}


def to_fetch(recipe: Recipe) -> dict[str, Any]:
    """{id: commit, files, size, bytes} of what a recipe names of the Hub and is not here yet."""
    model = recipe.model
    named = [pinned_base(recipe), *model.merge_loras, model.init_adapter]
    found = hub_files.plan_fetch([one for one in named if one and one != "scratch"], unused_of)
    for name in dataset_names(recipe.data):
        if hub_dataset.is_hub_dataset(name) and (said := hub_dataset.to_fetch(hub_dataset.parse(name))):
            found[name] = said
    return found


def _standing(recipe: Recipe, resolved: ResolvedRecipe) -> dict[str, Any]:
    """Where the recipe's run stands, and what was changed since it began."""
    output = Path(recipe.output)
    if not (output / "effective.toml").is_file():
        return {"run": "new", "step": 0}
    run = RunFolder.open(output)
    adapter_run.verify_base(run.path / "model")
    changed = check_resume(run, recipe, data_fingerprint(resolved.samples))
    folders = run.checkpoint_folders()
    stands = f"goes on from {folders[-1].name}" if folders else "begun, no checkpoint yet"
    step = int(folders[-1].name.removeprefix("step-")) if folders else 0
    return {"changed": changed, "run": stands, "step": step}


def step_report(
    recipe: Recipe, step: StepEstimate, parts: dict[str, phase_costs.PhaseCost], device: torch.device
) -> dict[str, Any]:
    """What a step and the other parts of the run need: memory in GB, and seconds.

    memory_gb is a step's, process_gb all that the process has in host memory at its largest, phases the
    seconds of each part of the run and the memory that it takes beside what is there already.
    """
    count = recipe.train.expected_steps(step.seconds)
    steps = phase_costs.PhaseCost(step.seconds * count, step.memory.peak - step.memory.weights)
    most = max((part.peak or 0 for part in (*parts.values(), steps)), default=0)
    host = torch.device("cpu")
    on_host = 0 if device.type == "cuda" else most
    whole = probe.held_bytes(host) + on_host + copies_bytes(recipe, step.numbers)
    return {
        **step.sharing,
        "memory_gb": gigabytes(step.memory.peak),
        "memory": {name: gigabytes(size) for name, size in vars(step.memory).items()},
        "seconds_per_step": round(step.seconds, 3),
        "hours": round(steps.seconds / 3600, 2),
        "probed": step.how == "probed",
        "process_gb": gigabytes(whole),
        "phases": {
            name: {"seconds": round(part.seconds, 1)}
            | ({} if part.peak is None else {"memory_gb": gigabytes(part.peak)})
            for name, part in {**parts, "steps": steps}.items()
        },
    }


def device_bytes(
    model: Pipeline, step: MemoryBreakdown, parts: Mapping[str, phase_costs.PhaseCost]
) -> dict[str, int]:
    """The bytes that a GPU holds at once in each part of a run.

    Codec and text encoders are there only while they work, unless they work in every step; pictures are drawn
    beside the network, its optimizer and its averages.
    """
    codec, words = stage_bytes(model.codec), stage_bytes(model.conditioner)
    takes_turns = model.placement is not None
    rest = 0 if takes_turns else codec + words
    beside = step.weights + step.optimizer + step.average + rest
    extra = {name: part.peak or 0 for name, part in parts.items()}
    return {
        "encode": codec + words + extra.get("encode", 0) + (0 if takes_turns else step.weights),
        "steps": step.peak + rest,
        "draw": beside + takes_turns * max(codec, words) + extra.get("draw", 0),
    }


def gigabytes(size: float) -> float:
    """Bytes in GB, to the MB."""
    return round(size / 1e9, 3)


def _buckets(recipe: Recipe, train: list[Sample], bucket_of: Any) -> dict[str, Any]:
    """For each bucket: samples an epoch shows, the batch, and how many the next epoch takes over."""
    held: list[tuple[int, int]] = []
    repeats: list[float] = []
    for sample in train:
        for size in known_sizes([sample], bool(recipe.data.frames)):
            held.append(bucket_of(size))
            repeats.append(sample.repeat)
    batch: Any = recipe.train.batch
    if recipe.train.sequence_packing:
        shapes = {"×".join(map(str, shape)): held.count(shape) for shape in sorted(set(held))}
        return {"packed": {"samples": round(sum(repeats)), "batch": batch, "shapes": shapes}}
    if recipe.data.token_budget:
        by_shape = buckets.token_budget(recipe.train.batch, [(1, *shape) for shape in held])
        batch = lambda shape: by_shape((1, *shape))  # noqa: E731
    order = BatchSampler(held, batch, 0, repeats)
    return {
        "×".join(map(str, shape)): {"samples": count, "batch": size, "carried_over": count % size}
        for shape, count, size in zip(cast(Any, order.kinds), order.counts, order.batches, strict=True)
    }


def _sizes(recipe: Recipe, train: list[Sample], bucket_of: Any) -> list[tuple[int, ...]]:
    """What samples are brought to, where a step packs several sizes: width, height, and frames of clips."""
    if not recipe.train.sequence_packing:
        return []
    frames = (recipe.data.frames,) * bool(recipe.data.frames)
    fitted: Any = bucket_of if callable(bucket_of) else lambda size: bucket_of
    return [(*fitted(size), *frames) for size in known_sizes(train, bool(frames))]


def started_processes() -> int:
    """Processes that torchrun has started; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def fit_to_memory(recipe: Recipe, size: str, many: int = 0) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with what makes a step fit into `size` ("24GB") the fastest way, and why.

    Args:
        many: processes that would share the run; 0: those torchrun started, else this machine's GPUs.
    Returns:
        the recipe, and {memory_gb, room_gb, keys, why, faster: what was faster and did not fit}.
    Raises:
        Refused: nothing fits, or the recipe cannot be used.
    """
    room = parse_bytes(size)
    resolved, frames = resolve_recipe(recipe), recipe.data.frames
    codec = (
        resolved.base.codec if resolved.base else models.new_codec(recipe.model, recipe.seed, bool(frames))
    )
    built = resolved.base or models.new_model(recipe.model, codec, resolved.conditioner, recipe.seed, frames)
    model = as_pipeline(built)
    control_training.attach_control(model, recipe)
    whole = replace(recipe, train=replace(recipe.train, offload=False))  # what could be lent is counted
    network = prepare_trainable(model, whole)
    train = resolved.collection.with_split("train")
    captions, sizes = [sample.captions for sample in train], _sizes(recipe, train, resolved.bucket_of)
    on_gpu = resolved.device.type == "cuda"
    processes = many or max(started_processes(), torch.cuda.device_count() if on_gpu else 1)
    options = fit_memory.SearchSpace(
        is_adapter=any(not weight.requires_grad for weight in network.parameters()),
        on_gpu=on_gpu,
        has_blocks=bool(repeated_blocks(network)),
        has_8bit=find_spec("bitsandbytes") is not None,
        processes=processes,
        known=frozenset(recipe.values()),
        shard_size=recipe.train.hsdp_shard_size or processes_per_machine(processes),
    )
    check_context_parallel(recipe, resolved.base, processes)
    group_size = recipe.train.context_parallel
    found = fit_memory.memory_options(
        lambda count: count_memory(network, inputs_of(recipe, model, captions, count * group_size, sizes)),
        recipe.train,
        options,
    )
    way, faster = fit_memory.fastest_fitting(found, room)
    report = {
        "room_gb": round(room / 1e9, 3),
        "memory_gb": round(way.memory.peak / 1e9, 3),
        "keys": dict(way.keys),
        "why": way.reasons or ["the recipe fits as it is"],
        "slower_by": round(way.time / found[0].time - 1, 3),
        "faster": [
            {"keys": dict(one.keys), "memory_gb": round(one.memory.peak / 1e9, 3)} for one in faster[:8]
        ],
    }
    words = [
        f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in way.keys.items()
    ]
    return recipe.overridden(words, f"fit {size}"), report


def _codec(recipe: Recipe, home: Path | None) -> str:
    if home is None:
        return recipe.model.codec
    if home.exists():
        return "trained already, in the run" if home.name == "codec" else "trained already, in the store"
    return f"trained first, {recipe.model.codec_steps:,} steps"
