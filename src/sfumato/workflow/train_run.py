"""Encode and train: what a recipe asks for, in order, each part kept as soon as it is done."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sfumato.generation import Pipeline, load
from sfumato.models.io import adapter_run
from sfumato.models.pretrained.train_text_encoders import untrainable_encoders
from sfumato.recipe import Recipe
from sfumato.report import run_page
from sfumato.run_folder import RunFolder
from sfumato.training.distributed.processes import current_processes, join_processes, run_folder_of_rank
from sfumato.training.loop.callbacks import Callback
from sfumato.training.loop.loop import fit, print_to_stderr
from sfumato.training.loop.validation import ValidationLoss
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.objective.packed_batches import PackedObjective
from sfumato.training.objective.user_loss import UserLoss
from sfumato.training.state.run_precision import precision_of
from sfumato.trust import trusting
from sfumato.workflow import base_images, class_images, condition_encoders, control_training, encode_ahead
from sfumato.workflow.checks import check_context_parallel, recipe_warnings, truncation_warning
from sfumato.workflow.encode_samples import caption_encoder, dataset_and_sampler, is_conditional
from sfumato.workflow.finetune import (
    prepare_trainable,
    save_base_reference,
    text_plan_of,
    with_base_sampling,
    with_text_learning_rate,
)
from sfumato.workflow.planning import step_costs
from sfumato.workflow.prepare import PreparedRun, Say, phase, prepare_run, resolve_recipe
from sfumato.workflow.preview import Preview, groups
from sfumato.workflow.resume import check_classes, check_resume, code_of, data_fingerprint, keep_code
from sfumato.workflow.train_codec import Progress, trained_codec
from sfumato.workflow.user_objects import with_user_objects

BEFORE_TRAINING = ("codec", "prior", "encode", "sanity")
"""Phases that `train.minutes` counts beside the training itself."""

RecipeLike = Recipe | str | Path


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    path: Path
    step: int = 0

    @property
    def report(self) -> Path:
        """Its page."""
        return self.path / "report.html"

    def model(self, dtype: str = "float32", device: str = "cpu", *, trust: bool = False) -> Pipeline:
        """The trained model, its averaged weights; see `sfumato.load`."""
        return load(self.path, dtype, device, trust=trust)

    def events(self) -> list[dict[str, Any]]:
        """What happened, in order."""
        return RunFolder.open(self.path).events()


def read_recipe(recipe: RecipeLike, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from wherever it is: a file, a run's folder, or made in Python."""
    return recipe.checked() if isinstance(recipe, Recipe) else Recipe.read(recipe, overrides)


def say_notes(recipe: Recipe, say: Say) -> None:
    """Say what whoever wrote the recipe should know."""
    for note in recipe.notes:
        say(note)


def encode(
    recipe: RecipeLike,
    overrides: Iterable[str] = (),
    progress: Progress | None = None,
    say: Say = print_to_stderr,
    *,
    dataset: Any = None,
    codec: Any = None,
    conditioner: Any = None,
    trust: bool = False,
) -> PreparedRun:
    """Train a missing codec, then encode what the store lacks; nothing that is there is done again.

    Under torchrun each process encodes its share of the shards.

    Args:
        dataset, codec, conditioner: one's own, in place of what the recipe names.
        trust: code that a run or a model names may run, see `sfumato.load`.

    Raises:
        Refused: the recipe or its data cannot be used. Failed: the disk is full.
    """
    objects = {"dataset": dataset, "codec": codec, "conditioner": conditioner}
    with (
        trusting(trust),
        with_user_objects(read_recipe(recipe, overrides), objects) as parsed,
        join_processes(parsed.train.device) as processes,
    ):
        if not processes.is_rank_zero:
            progress, say = None, lambda sentence: None
        say_notes(parsed, say)
        return prepare_run(parsed, resolve_recipe(parsed), progress, say)


def encode_on_cluster(
    recipe: RecipeLike,
    overrides: Iterable[str],
    workers: int,
    progress: Progress | None,
    say: Say = print_to_stderr,
) -> PreparedRun:
    """`encode` by so many workers that Ray starts; the store must be on a disk that all of them see.

    Raises:
        Refused: Ray is not installed, or what `encode` refuses. Failed: the workers could not finish.
    """
    from sfumato.data.encoding.ray_cluster import run_on_ray

    parsed = read_recipe(recipe, overrides)
    say_notes(parsed, say)
    resolved = resolve_recipe(parsed)
    if resolved.base is None:
        samples = resolved.collection.with_split("train") or resolved.collection.samples
        trained_codec(parsed, samples, resolved.bucket_of, resolved.device, progress, say)

    def share(rank: int, world: int) -> int:
        mine = parsed.checked()  # a worker is another process: what the user named is named there again
        return len(
            prepare_run(mine, resolve_recipe(mine), say=lambda sentence: None, part=(rank, world)).train
        )

    cards = 1.0 if resolved.device.type == "cuda" else 0.0
    run_on_ray(share, workers, gpus=cards)
    return prepare_run(parsed, resolved, progress, say)


def train(
    recipe: RecipeLike,
    overrides: Iterable[str] = (),
    progress: Progress | None = None,
    say: Say = print_to_stderr,
    profile: bool = False,
    *,
    theory: Any = None,
    denoiser: Any = None,
    codec: Any = None,
    conditioner: Any = None,
    dataset: Any = None,
    loss: Any = None,
    callbacks: Sequence[Any] | None = None,
    trust: bool = False,
) -> Run:
    """Train a recipe, going on from where its run folder stands.

    Args:
        profile: write a trace and a table of a few early steps into the run's folder `profile`.
        theory, denoiser, codec, conditioner, dataset, loss, callbacks: one's own, objects or classes, in
            place of what the recipe names as `file.py:name`; docs/own-code.md says what each has to be.
        trust: code that a run or a model names may run, see `sfumato.load`. What this run names is known on
            this machine from now on.

    Raises:
        Refused: the recipe cannot be used, or is not the one the run began with.
        Failed: the run could not go on. Stopped: it was recipe to stop, and saved.
    """
    objects = {
        "theory": theory,
        "denoiser": denoiser,
        "codec": codec,
        "conditioner": conditioner,
        "dataset": dataset,
        "loss": loss,
        "callbacks": callbacks,
    }
    with (
        trusting(trust),
        with_user_objects(read_recipe(recipe, overrides), objects) as parsed,
        join_processes(parsed.train.device) as processes,
    ):
        if not processes.is_rank_zero:
            progress, say = None, lambda sentence: None
        say_notes(parsed, say)
        resolved = resolve_recipe(parsed)
        check_context_parallel(parsed, resolved.base, processes.count)
        condition_encoders.check_read_early(parsed, resolved.base)
        with processes.first():
            run = run_folder_of_rank(RunFolder.create(parsed.output))
        with run.lock():
            with processes.first():
                check_classes(run, resolved.classes)
                adapter_run.verify_base(run.path / "model")
                effective = with_base_sampling(parsed, resolved.base)
                for note in check_resume(run, effective, data_fingerprint(resolved.samples)):
                    say(note)
                if processes.is_rank_zero:
                    RunFolder.create(parsed.output, parsed.to_toml(), effective.to_toml(every=True))
                    if codes := code_of(parsed):
                        run.event("code", hashes=codes)
                        keep_code(parsed, run)
            prepared = prepare_run(parsed, resolved, progress, say, run)
            return Run(run.path, _train(parsed, run, prepared, progress, say, profile))


def _train(
    recipe: Recipe,
    run: RunFolder,
    prepared: PreparedRun,
    progress: Progress | None,
    say: Say,
    profile: bool = False,
) -> int:
    model, leads = prepared.model, current_processes().is_rank_zero
    if leads:
        save_base_reference(model, recipe, run.path / "model")
    for note in untrainable_encoders(model, text_plan_of(recipe)):
        say(note)
    network = prepare_trainable(model, recipe, prepared.device)
    settings = with_text_learning_rate(recipe)
    train, order = dataset_and_sampler(recipe, prepared.train, prepared.curriculum)
    encode_ahead.start_encoding_ahead(train, order, recipe)
    # Where words are read beside a picture, the samples say which captions are left out.
    beside = base_images.encodes_text_with_image(model.conditioner)
    caption_dropout = recipe.data.caption_dropout if is_conditional(model) and not beside else 0.0
    encoders = condition_encoders.encoders(model, recipe.data)
    objective = (PackedObjective if recipe.train.sequence_packing else DiffusionObjective)(
        model,
        train,
        order,
        settings,
        recipe.seed,
        caption_dropout,
        loss=UserLoss(recipe.train.loss, prepared.device) if recipe.train.loss else None,
        condition_dropout=condition_encoders.condition_dropout(recipe.data, list(encoders)),
        read_text=caption_encoder(model) if model.conditioner.learns else None,
    )
    measure = None
    if recipe.train.validate_every and len(prepared.held_out):
        precision = precision_of(recipe.train, prepared.device, run)
        measure = ValidationLoss(objective, prepared.held_out, prepared.train, run, precision=precision)
    preview_groups = groups(recipe, prepared.train, prepared.held_out, is_conditional(model))
    preview = Preview(
        model,
        recipe,
        run,
        control_training.with_control_images(preview_groups, model, recipe, prepared),
        lambda: run_page.write(run),
    )
    counts = {"train": len(prepared.train), "held_out": len(prepared.held_out)}
    for warning in recipe_warnings(recipe):
        say(warning)
    if leads and (cut := truncation_warning(model.conditioner, prepared.collection.samples)):
        say(cut)
    if steps_made(run) < settings.steps:
        inputs = step_costs.inputs_of_run(recipe, model, prepared.train, objective)
        say(step_costs.cost_summary(recipe, network, inputs, fresh=not run.checkpoint_folders()))
    if recipe.train.sanity and leads and not run.checkpoint_folders():
        with phase(run, "sanity"):
            run_sanity_checks(recipe, run, prepared, network, say)
    finished = False
    try:
        with phase(run, "train"):
            outcome = fit(
                class_images.with_prior_preservation(objective, prepared.class_images, recipe),
                network,
                settings,
                run,
                recipe.seed,
                preview=preview,
                held_out=measure,
                preview_every=recipe.sample.every,
                progress=progress,
                say=say,
                counts=counts,
                callbacks=[Callback.load(word) for word in recipe.train.callbacks],
                profile=run.path / "profile" if profile else None,
                spent=seconds_before_training(run),
            )
        run.event("stop", step=outcome.step, reason=outcome.reason, sync=True)
        finished = outcome.reason == "done"
    finally:
        encode_ahead.stop_encoding_ahead(train, finished)
        if leads and run.recipe.is_file():
            run_page.write(run)
    return outcome.step


def seconds_before_training(run: RunFolder) -> float:
    """What codec, encodings and sanity checks took, over all the times the run was started."""
    phases = (one for one in run.events() if one["kind"] == "phase")
    return sum(one["seconds"] for one in phases if one["name"] in BEFORE_TRAINING)


def steps_made(run: RunFolder) -> int:
    """The step of a run's newest checkpoint."""
    return max((int(one.name.removeprefix("step-")) for one in run.checkpoint_folders()), default=0)


def run_sanity_checks(
    recipe: Recipe, run: RunFolder, prepared: PreparedRun, network: nn.Module, say: Say
) -> None:
    """Run the sanity checks quickly and say what does not hold; the run goes on."""
    from sfumato.workflow import sanity_checks

    checks = sanity_checks.sanity_checks(recipe, prepared, network, sanity_checks.FEW)
    for check in sanity_checks.as_memory_allows(checks):
        if check.remark:
            say(f"before training: {check.claim}: {check.detail}")
            run.event("note", text=f"sanity: {check.claim}: {check.detail}")
        if not check.holds:
            say(f"before training: it is not so that {check.claim}: {check.detail}")
            run.event("note", text=f"sanity: {check.claim}: no. {check.detail}")
