"""Encode and train: what a recipe asks for, in order, each part kept as soon as it is done."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import stages
from ..data.encoded import EncodedSet
from ..data.sample import Collection, Sample
from ..generation import PaintingModel, load, painting
from ..recipe import Recipe
from ..record import RunFolder
from ..stages.teaching import left_alone
from ..studio import report
from ..training import device as devices
from ..training import parallel, probing
from ..training.callbacks import Callback
from ..training.held_out import HeldOut
from ..training.loop import fit, to_stderr
from ..training.objective import DiffusionObjective
from ..training.packed import PackedObjective
from ..training.run_precision import precision_of
from ..training.user_loss import UserLoss
from . import ahead, companions, costs, guided, prior, showing
from .acting import check_acts, warned
from .agreement import agree, code_of, content_of
from .checks import check_context, check_guidance, check_known, check_packed, sizes, theory_of
from .codecs import Progress, ready_codec
from .encoding import course_of, curriculum, encoded_samples, is_guided, reader_of
from .material import Bucket, class_names, material_of
from .preview import Preview, groups
from .tuning import base_of, check_latents, check_said, rated, remember, text_plan_of, tune
from .user_objects import handed_over

RecipeLike = Recipe | str | Path
Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """A run on disk."""

    path: Path
    step: int = 0

    @property
    def report(self) -> Path:
        """Its page."""
        return self.path / "report.html"

    def model(self, dtype: str = "float32", device: str = "cpu") -> PaintingModel:
        """The trained model, its averaged weights."""
        return load(self.path, dtype, device)

    def events(self) -> list[dict[str, Any]]:
        """What happened, in order."""
        return RunFolder.open(self.path).events()


@dataclass(frozen=True)
class Ready:
    """All that training needs, made once: the model's stages and the encoded samples."""

    model: PaintingModel
    collection: Collection
    train: EncodedSet
    held_out: EncodedSet
    set_aside: list[dict[str, str]]
    device: torch.device
    earlier: list[tuple[int, EncodedSet]] = field(default_factory=list)
    """Of a curriculum: until which step, the training samples at a smaller resolution."""
    prior: EncodedSet | None = None
    """The pictures of the subject's class, shown beside."""


def read(recipe: RecipeLike, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from wherever it is: a file, a run's folder, or made in Python."""
    return recipe.checked() if isinstance(recipe, Recipe) else Recipe.read(recipe, overrides)


def tell_notes(recipe: Recipe, say: Say) -> None:
    """Say what whoever wrote the recipe should know."""
    for note in recipe.notes:
        say(note)


def encode(
    recipe: RecipeLike,
    overrides: Iterable[str] = (),
    progress: Progress | None = None,
    say: Say = to_stderr,
    *,
    dataset: Any = None,
    codec: Any = None,
    conditioner: Any = None,
) -> Ready:
    """Train a missing codec, then encode what the store lacks; nothing that is there is done again.

    Under torchrun each process encodes its share of the shards.

    Args:
        dataset, codec, conditioner: one's own, in place of what the recipe names.

    Raises:
        Refused: the recipe or its data cannot be used. Failed: the disk is full.
    """
    objects = {"dataset": dataset, "codec": codec, "conditioner": conditioner}
    with (
        handed_over(read(recipe, overrides), objects) as asked,
        parallel.joined(asked.train.device) as processes,
    ):
        if not processes.leads:
            progress, say = None, lambda sentence: None
        tell_notes(asked, say)
        return ready(asked, gather(asked), progress, say)


def encode_on_cluster(
    recipe: RecipeLike,
    overrides: Iterable[str],
    workers: int,
    progress: Progress | None,
    say: Say = to_stderr,
) -> Ready:
    """`encode` by so many workers that Ray starts; the store must be on a disk that all of them see.

    Raises:
        Refused: Ray is not installed, or what `encode` refuses. Failed: the workers could not finish.
    """
    from ..data.cluster import spread

    asked = read(recipe, overrides)
    tell_notes(asked, say)
    gathered = gather(asked)
    if gathered.base is None:
        samples = gathered.collection.of("train") or gathered.collection.samples
        ready_codec(asked, samples, gathered.bucket_of, gathered.device, progress, say)

    def share(rank: int, world: int) -> int:
        return len(ready(asked, gather(asked), say=lambda sentence: None, part=(rank, world)).train)

    cards = 1.0 if gathered.device.type == "cuda" else 0.0
    spread(share, workers, gpus=cards)
    return ready(asked, gathered, progress, say)


def train(
    recipe: RecipeLike,
    overrides: Iterable[str] = (),
    progress: Progress | None = None,
    say: Say = to_stderr,
    profile: bool = False,
    *,
    theory: Any = None,
    denoiser: Any = None,
    codec: Any = None,
    conditioner: Any = None,
    dataset: Any = None,
    loss: Any = None,
    callbacks: Sequence[Any] | None = None,
) -> Run:
    """Train a recipe, going on from where its run folder stands.

    Args:
        profile: write a trace and a table of a few early steps into the run's folder `profile`.
        theory, denoiser, codec, conditioner, dataset, loss, callbacks: one's own, objects or classes, in
            place of what the recipe names as `file.py:name`; docs/own-code.md says what each has to be.

    Raises:
        Refused: the recipe cannot be used, or is not the one the run began with.
        Failed: the run could not go on. Stopped: it was asked to stop, and saved.
    """
    objects = {
        "theory": theory, "denoiser": denoiser, "codec": codec, "conditioner": conditioner,
        "dataset": dataset, "loss": loss, "callbacks": callbacks,
    }  # fmt: skip
    with (
        handed_over(read(recipe, overrides), objects) as asked,
        parallel.joined(asked.train.device) as processes,
    ):
        if not processes.leads:
            progress, say = None, lambda sentence: None
        tell_notes(asked, say)
        gathered = gather(asked)
        check_context(asked, gathered.base, processes.count)
        with processes.first():
            run = parallel.own_view(RunFolder.create(asked.output))
        with run.lock():
            with processes.first():
                for note in agree(run, asked, content_of(gathered.samples)):
                    say(note)
                if processes.leads:
                    RunFolder.create(asked.output, asked.to_toml(), asked.to_toml(every=True))
                    if codes := code_of(asked):
                        run.event("code", own=codes)
            prepared = ready(asked, gathered, progress, say, run)
            return Run(run.path, _train(asked, run, prepared, progress, say, profile))


def _train(
    recipe: Recipe,
    run: RunFolder,
    prepared: Ready,
    progress: Progress | None,
    say: Say,
    profile: bool = False,
) -> int:
    model, leads = prepared.model, parallel.current().leads
    if leads:
        remember(model, recipe, run.path / "model")
    for note in left_alone(model, text_plan_of(recipe)):
        say(note)
    network, settings = tune(model, recipe), rated(recipe)
    train, order = course_of(recipe, prepared.train, prepared.earlier)
    ahead.look_ahead(train, order, recipe)
    beside = showing.is_read_beside(model.conditioner)  # then the samples say which captions are left out
    dropout = recipe.data.caption_dropout if is_guided(model) and not beside else 0.0
    seen = companions.encoders(model, recipe.data)
    objective = (PackedObjective if recipe.train.sequence_packing else DiffusionObjective)(
        model, train, order, settings, recipe.seed, dropout,
        loss=UserLoss(recipe.train.loss, prepared.device) if recipe.train.loss else None,
        dropout=companions.shares(recipe.data, list(seen)),
        read_text=reader_of(model) if model.conditioner.learns else None,
    )  # fmt: skip
    measure = None
    if recipe.train.validate_every and len(prepared.held_out):
        precision = precision_of(recipe.train, prepared.device, run)
        measure = HeldOut(objective, prepared.held_out, prepared.train, run, precision=precision)
    shown = groups(recipe, prepared.train, prepared.held_out, is_guided(model))
    preview = Preview(
        model, recipe, run, guided.with_pictures(shown, model, recipe, prepared), lambda: report.write(run)
    )
    counts = {"train": len(prepared.train), "held_out": len(prepared.held_out)}
    for warning in warned(recipe):
        say(warning)
    say(costs.said(recipe, model, network, prepared.train, fresh=not run.checkpoint_folders()))
    if recipe.train.sanity and leads and not run.checkpoint_folders():
        with phase(run, "sanity"):
            look_before(recipe, run, prepared, network, say)
    finished = False
    try:
        with phase(run, "train"):
            outcome = fit(
                prior.beside(objective, prepared.prior, recipe), network, settings, run, recipe.seed,
                preview=preview, held_out=measure, preview_every=recipe.sample.every, progress=progress,
                say=say, counts=counts, callbacks=[Callback.load(word) for word in recipe.train.callbacks],
                profile=run.path / "profile" if profile else None,
            )  # fmt: skip
        run.event("stop", step=outcome.step, reason=outcome.reason, sync=True)
        finished = outcome.step >= recipe.train.steps
    finally:
        ahead.done(train, finished)
        if leads:
            report.write(run)
    return outcome.step


def look_before(recipe: Recipe, run: RunFolder, prepared: Ready, network: nn.Module, say: Say) -> None:
    """Climb the sanity ladder quickly and say what does not hold; the run goes on."""
    from . import ladder

    for rung in ladder.rungs(recipe, prepared, network, ladder.FEW):
        if rung.remark:
            say(f"before training: {rung.claim}: {rung.detail}")
            run.event("note", text=f"sanity: {rung.claim}: {rung.detail}")
        if not rung.holds:
            say(f"before training: it is not so that {rung.claim}: {rung.detail}")
            run.event("note", text=f"sanity: {rung.claim}: no. {rung.detail}")


@dataclass(frozen=True)
class Gathered:
    """What a recipe stands on, checked before anything is computed or written."""

    collection: Collection
    bucket_of: Bucket | Callable[[Bucket], Bucket]
    device: torch.device
    base: PaintingModel | None
    conditioner: stages.Conditioner
    prior: list[Sample] = field(default_factory=list)

    @property
    def samples(self) -> list[Sample]:
        """All that are there before anything is drawn."""
        return [*self.collection.samples, *self.prior]


def gather(recipe: Recipe) -> Gathered:
    """Look at all that a recipe names.

    Raises Refused for whatever cannot be used.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    device = devices.resolve(recipe.train.device)
    theory_of(recipe)
    ahead.limit_of(recipe)
    guided.check(recipe)
    prior.check(recipe)
    if guided.plan_of(recipe) is None:
        companions.shares(recipe.data, recipe.data.condition_columns)
    earlier = curriculum(recipe)
    base = base_of(recipe)
    codec = base.codec if base else stages.new_codec(recipe.model, recipe.seed, bool(recipe.data.frames))
    check_known(recipe, base)
    check_packed(recipe, base)
    collection = material_of(recipe)
    guided.check_column(recipe, collection.samples)
    classes = class_names(collection) if recipe.model.text_encoder == "labels" else ()
    conditioner = base.conditioner if base else stages.new_conditioner(recipe.model, classes)
    showing.check(recipe, conditioner)
    check_guidance(recipe, codec, conditioner, base)
    check_said(recipe.model.new_tokens, (text for one in collection.samples for text in one.captions))
    for _, smaller in earlier:
        check_latents(recipe, codec, base, smaller.data.resolution, smaller.data.resolution)
    shapes = sizes(recipe, collection.samples, codec, base)
    check_acts(recipe, device, len(collection.of("held_out")))
    return Gathered(collection, shapes, device, base, conditioner, prior.of_folder(recipe))


def ready(
    recipe: Recipe,
    gathered: Gathered,
    progress: Progress | None = None,
    say: Say = to_stderr,
    run: RunFolder | None = None,
    part: tuple[int, int] | None = None,
) -> Ready:
    """The stages of the recipe's model and its samples, encoded.

    Args:
        run: is told the phases; part: (rank, world) of those that encode, default the processes joined.
    """
    collection, bucket_of, device, base = (
        gathered.collection,
        gathered.bucket_of,
        gathered.device,
        gathered.base,
    )
    trained_on = collection.of("train") or collection.samples
    with phase(run, "codec"):
        codec = base.codec if base else ready_codec(recipe, trained_on, bucket_of, device, progress, say)
    model = model_of(recipe, gathered, codec)
    companions.shares(recipe.data, list(companions.encoders(model, recipe.data)))
    with phase(run, "prior"):
        others = prior.samples(recipe, gathered.prior, model, progress)
    with phase(run, "encode"):
        encoded = encoded_samples(recipe, collection.samples, bucket_of, model, progress, say, part)
        earlier = []
        for until, smaller in curriculum(recipe):
            shapes = sizes(smaller, collection.samples, codec, base)
            stage = f"until step {until}"
            found = encoded_samples(smaller, collection.samples, shapes, model, progress, say, part, stage)
            earlier.append((until, found.of("train")))
        of_class = None
        if others:
            shapes = sizes(recipe, others, codec, base)
            of_class = encoded_samples(recipe, others, shapes, model, progress, say, part, "prior")
    aside = [*collection.set_aside, *encoded.set_aside]
    listed = [{"file": one.file, "reason": one.reason} for one in aside]
    _tell(listed, encoded, collection.name, content_of(gathered.samples), run, say)
    train, held_out = encoded.of("train"), encoded.of("held_out")
    return Ready(model, collection, train, held_out, listed, device, earlier, of_class)


def model_of(recipe: Recipe, gathered: Gathered, codec: stages.Codec) -> PaintingModel:
    """The recipe's model around its codec, its frozen stages ready to encode."""
    base, frames = gathered.base, recipe.data.frames
    model = painting(base or stages.build(recipe.model, codec, gathered.conditioner, recipe.seed, frames))
    model.info |= {"frames": frames, "fps": recipe.data.fps} if frames else {}
    if frames and recipe.train.first_frame_share:
        model.info["known"] = ["first", *(["last"] if recipe.train.last_frame_share else [])]
    if base is None:
        model.info |= {"resolution": recipe.data.resolution}
        model.info |= {"steps": recipe.sample.steps, "guidance": recipe.sample.guidance}
    if recipe.sample.leaning:
        model.info["leaning"] = recipe.sample.leaning
    model.to(gathered.device)
    guided.guide(model, recipe)
    model.codec.eval().requires_grad_(False)
    model.conditioner.eval().requires_grad_(False)
    return model


def _tell(
    aside: list[dict[str, str]], encoded: EncodedSet, name: str, content: str, run: RunFolder | None, say: Say
) -> None:
    """Say what was set aside and repaired, and write the summary of the data."""
    for note in encoded.notes:
        say(note)
    for one in aside:
        say(f"set aside: {one['file']}: {one['reason']}")
    if aside:
        say(f"{len(aside)} set aside, {len(encoded)} samples left.")
    if run is None:
        return
    sizes: dict[str, int] = {}
    for item in encoded.items:
        size = "×".join(map(str, item.bucket))
        sizes[size] = sizes.get(size, 0) + 1
    captions = len({caption for caption in encoded.captions if caption})
    summary = {
        "name": name,
        "content": content,
        "samples": len(encoded.of("train")),
        "captions": captions,
    }
    held_out = len(encoded.of("held_out"))
    run.event("data", summary={**summary, "held_out": held_out, "sizes": sizes, "set_aside": aside})


@contextmanager
def phase(run: RunFolder | None, name: str) -> Iterator[None]:
    """Write how long a part took and the most memory the process had meanwhile, also when it ends early."""
    began = time.perf_counter()
    with probing.watched(torch.device("cpu")) as most:
        try:
            yield
        finally:
            if run is not None:
                seconds = round(time.perf_counter() - began, 3)
                run.event("phase", name=name, seconds=seconds, process_gb=round(most() / 1e9, 3))
