"""A codec that is missing is trained once, and kept in the store under the key of its data and settings."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from sfumato.data.encoding.batch_sampler import BatchSampler
from sfumato.data.encoding.views import EncodingOptions
from sfumato.data.sources.sample import Sample
from sfumato.errors import Failed, Refused
from sfumato.models import Codec, TrainableCodec, load_codec, needs_training, new_codec, save_stage
from sfumato.models.files import write_checksums
from sfumato.readers import media
from sfumato.recipe import Recipe
from sfumato.run_folder import RunFolder, atomic_folder
from sfumato.theory import noise
from sfumato.training.distributed.processes import current_processes, run_folder_of_rank
from sfumato.training.loop import loop as training_loop
from sfumato.training.objective.reconstruction import ReconstructionObjective, to_pixels
from sfumato.training.settings import TrainSettings
from sfumato.workflow.dataset import Bucket, PicturesInMemory, fitting_in_memory, map_samples

RECIPE = "codec 1: L1 and gradients, AdamW 1e-3, cosine"
CLIPS = "clips 2: a narrow posterior"
LOOKED_AT = 1024
FOLDER = "codecs"
"""Where a store keeps them."""

Progress = Callable[..., None]


def codec_key(
    recipe: Recipe, samples: Sequence[Sample], bucket_of: Bucket | Callable[[Bucket], Bucket]
) -> str:
    """What a trained codec depends on, hashed: pictures, sizes, its settings, the seed."""

    def content(sample: Sample) -> str:
        try:
            return sample.content_hash()
        except OSError:
            return ""

    contents = sorted(map_samples(content, samples))
    model = recipe.model
    settings = [
        model.codec,
        model.codec_stride,
        model.latent_channels,
        model.codec_width,
        model.codec_steps,
        model.codec_batch,
    ]
    size = bucket_of if isinstance(bucket_of, tuple) else [recipe.data.resolution, recipe.data.buckets]
    parts = [RECIPE, media.TRANSFORM, settings, size, recipe.data.flip, recipe.seed, contents]
    if recipe.data.frames:
        data = recipe.data
        parts += [
            model.codec_time_stride,
            data.frames,
            data.fps,
            data.clips_per_video,
            CLIPS,
            *data.short_clip_frames,
        ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def codec_folder(recipe: Recipe, key: str) -> Path:
    """Where the codec of a key is kept."""
    return Path(recipe.data.cache_dir).expanduser() / FOLDER / key


def codec_home(
    recipe: Recipe, samples: Sequence[Sample], bucket_of: Bucket | Callable[[Bucket], Bucket]
) -> Path:
    """Where the recipe's trained codec is, or will be: in the store; once the run has begun, in its folder.

    A run keeps the codec it began with. Data that changed would give another one, whose latents the run's
    weights do not know.
    """
    run = RunFolder(Path(recipe.output))
    own = run.path / "model" / "codec"
    if run.checkpoint_folders() and (own / "stage.json").is_file():
        return own
    return codec_folder(recipe, codec_key(recipe, samples, bucket_of))


def trained_codec(
    recipe: Recipe,
    samples: Sequence[Sample],
    bucket_of: Bucket | Callable[[Bucket], Bucket],
    device: torch.device,
    progress: Progress | None = None,
    say: Callable[[str], None] = training_loop.print_to_stderr,
) -> Codec:
    """The recipe's codec, trained on these samples first if it is missing.

    Raises:
        Stopped, Failed, Refused: as `training.fit` does.
    """
    codec = new_codec(recipe.model, recipe.seed, bool(recipe.data.frames))
    if not needs_training(recipe.model, codec):
        return codec.to(device).eval()
    assert isinstance(codec, TrainableCodec)
    home = codec_home(recipe, samples, bucket_of)
    training = home.with_name(f"{home.name}.run")
    if (home / "stage.json").is_file():
        try:
            found = load_codec(home)
        except (Failed, Refused) as problem:
            if home.parent.name != FOLDER:  # the run's own, which cannot be made again
                raise
            say(f"{problem} It is trained again.")
        else:
            _remove_training(training)
            return found.to(device).eval()
    say(f"Training the codec ({recipe.model.codec_steps:,} steps); it is kept for all runs on this data.")
    how = EncodingOptions.of(recipe.data)
    pictures = PicturesInMemory(fitting_in_memory(samples, bucket_of, how.frames), bucket_of, how)
    train_codec(recipe, codec.to(device), pictures, training, progress, say)
    if current_processes().is_rank_zero:
        with atomic_folder(home) as beside:
            save_stage(codec, beside)
            write_checksums(beside)
        _remove_training(training)
    return codec.eval()


def _remove_training(folder: Path) -> None:
    """Remove the checkpoints of a codec that is finished, unless another process works with them."""
    if not folder.is_dir() or folder.is_symlink():
        return
    with suppress(Refused, Failed, OSError), RunFolder(folder).lock():
        shutil.rmtree(folder, ignore_errors=True)


def codec_train_settings(recipe: Recipe) -> TrainSettings:
    """How the recipe's codec is trained; what the recipe says of the denoiser's weights is not of it."""
    steps = recipe.model.codec_steps
    return replace(
        recipe.train,
        steps=steps,
        minutes=0.0,
        min_steps=0,
        batch=recipe.model.codec_batch,
        gradient_accumulation=1,
        learning_rate=1e-3,
        optimizer="adamw",
        weight_dtype="fp32",
        lr_multipliers={},
        warmup_steps=20,
        lr_schedule="cosine",
        weight_decay=0.0,
        ema=0.0,
        ema_snapshot_every=0,
        save_every=max(100, steps // 5),
        keep_checkpoints=1,
        keep_every=0,
        validate_every=0,
        patience=0,
        parallel="ddp",
        context_parallel=1,
        sequence_packing=False,
    )


def train_codec(
    recipe: Recipe,
    codec: TrainableCodec,
    pictures: PicturesInMemory,
    folder: Path,
    progress: Progress | None,
    say: Callable[[str], None],
) -> None:
    """Train `codec` on `pictures`, resuming what `folder` holds."""
    device = next(codec.parameters()).device
    commonest = pictures.buckets.index(max(set(pictures.buckets), key=pictures.buckets.count))
    alike = [i for i, bucket in enumerate(pictures.buckets) if bucket == pictures.buckets[commonest]]
    most = LOOKED_AT // max(1, recipe.data.frames) + 1 if recipe.data.frames else LOOKED_AT
    chosen = noise.permutation(len(alike), recipe.seed, "codec sample", 0)[:most].tolist()
    sample = to_pixels(pictures.read([alike[i] for i in chosen])).to(device)
    codec.prepare(sample)
    settings = codec_train_settings(recipe)
    order = BatchSampler(pictures.buckets, min(settings.batch, len(pictures)), recipe.seed)
    objective = ReconstructionObjective(codec, pictures, order, recipe.seed, flip=recipe.data.flip)
    with current_processes().first():
        run = run_folder_of_rank(RunFolder.create(folder, "# a codec, trained for the runs that need it\n"))
    with run.lock():
        training_loop.fit(
            objective, codec, settings, run, recipe.seed, progress=progress, phase="codec", say=say
        )
    codec.fit_normalization(sample)
