"""Encoding for a run: its samples in the store, or streamed, and the order in which training reads them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from sfumato.data import buckets
from sfumato.data.encoding.batch_sampler import BatchSampler, Curriculum, CurriculumStage, PackedSampler
from sfumato.data.encoding.encode import encode_to_store
from sfumato.data.encoding.encoded_dataset import EncodedDataset
from sfumato.data.encoding.streaming_dataset import StreamingDataset
from sfumato.data.encoding.views import EncodingOptions
from sfumato.data.sources.sample import Sample
from sfumato.data.store.leases import Owner
from sfumato.data.store.store import Store
from sfumato.errors import Refused
from sfumato.generation import Pipeline
from sfumato.models.at_once import AtOnce
from sfumato.recipe import Recipe
from sfumato.training.distributed.processes import BatchSplit, current_processes
from sfumato.training.loop.loop import print_to_stderr
from sfumato.workflow import base_images, condition_encoders, encode_ahead, finetune
from sfumato.workflow.dataset import Bucket
from sfumato.workflow.train_codec import Progress

Say = Callable[[str], None]


def batch_sampler_of(recipe: Recipe, train: EncodedDataset) -> BatchSampler:
    """Which samples each step of the recipe trains on."""
    return _order(recipe, train, train)


def _order(recipe: Recipe, dataset: EncodedDataset, typical: EncodedDataset) -> BatchSampler:
    """The order of `shown`; with a token budget, a batch of it costs as one of `typical` samples."""
    settings = recipe.train
    size: int | Callable[[Any], int] = settings.batch
    if settings.sequence_packing and recipe.data.token_budget:
        least = BatchSplit.of(settings, current_processes()).parts
        tokens = [math.prod(shape[1:]) for shape in dataset.buckets]
        return PackedSampler(
            tokens, _as_costly(settings.batch, dataset, typical), recipe.seed, dataset.repeats, least
        )
    if settings.sequence_packing:
        return BatchSampler([0] * len(dataset), size, recipe.seed, dataset.repeats)
    if recipe.data.token_budget:
        parts = settings.gradient_accumulation * settings.elastic_max_ranks
        multiple = parts if settings.batch % parts == 0 else settings.gradient_accumulation
        size = buckets.token_budget(settings.batch, typical.buckets, multiple)
    return BatchSampler(dataset.buckets, size, recipe.seed, dataset.repeats)


def _as_costly(batch: int, dataset: EncodedDataset, typical: EncodedDataset) -> int:
    """Samples of `shown`, on average, that have as many tokens as a batch of `typical` ones."""
    whole, each = (
        buckets.mean([math.prod(shape[1:]) for shape in one.buckets]) for one in (typical, dataset)
    )
    return max(1, round(batch * whole / each))


def dataset_and_sampler(
    recipe: Recipe, final: EncodedDataset, earlier: Sequence[tuple[int, EncodedDataset]]
) -> tuple[EncodedDataset, BatchSampler | Curriculum]:
    """All that training reads, and in which order: smaller resolutions first where they are asked."""
    if not earlier:
        return final, batch_sampler_of(recipe, final)
    parts, offset = [], 0
    for until, encoded in [*earlier, (None, final)]:
        parts.append(CurriculumStage(_order(recipe, encoded, final), until, offset))
        offset += len(encoded)
    return EncodedDataset.concatenate([*(one for _, one in earlier), final]), Curriculum(parts)


def curriculum_stages(recipe: Recipe) -> list[tuple[int, Recipe]]:
    """The stages before the last: (until which step, the recipe at its resolution).

    Raises:
        Refused: the steps do not rise.
    """
    found: list[tuple[int, Recipe]] = []
    for stage in recipe.data.curriculum:
        if stage.until <= (found[-1][0] if found else 0):
            raise Refused(
                f"data.curriculum: the steps must rise, but resolution {stage.resolution} until "
                f"{stage.until} ends before it begins."
            )
        smaller = replace(recipe, data=replace(recipe.data, resolution=stage.resolution))
        found.append((stage.until, smaller))
    return found


def encoded_samples(
    recipe: Recipe,
    samples: list[Sample],
    bucket_of: Bucket | Callable[[Bucket], Bucket],
    model: Pipeline,
    progress: Progress | None,
    say: Say = print_to_stderr,
    part: tuple[int, int] | None = None,
    stage: str = "",
) -> EncodedDataset:
    """The samples in the store, encoded now as far as they are missing; or encoded as they are shown.

    Args:
        stage: which part of a curriculum this is, so that the store knows that the run needs them all.
    """

    guided = is_conditional(model) and not finetune.text_plan_of(recipe)  # what learns is asked in every step
    how, data = encoding_of(recipe, model), recipe.data
    store = Store(recipe.data.cache_dir)
    processes, texts = current_processes(), None
    if guided:
        beside_it = base_images.encodes_text_with_image(model.conditioner)
        texts = base_images.text_image_encoder(model, data, samples) if beside_it else caption_encoder(model)
    part = part or (processes.rank, processes.count)
    beside = condition_encoders.encoders(model, recipe.data)
    pixels = posterior_encoder(model, say)

    def filled(how: EncodingOptions) -> EncodedDataset:
        return encode_to_store(
            store,
            samples,
            bucket_of,
            pixels,
            texts,
            how,
            progress,
            part,
            companions=beside,
            owner=Owner(recipe.output, stage),
            prompt_image=base_images.picture_key(model, data),
        )

    found = filled(how)
    if isinstance(found, StreamingDataset) and data.cache_limit:
        found = encode_ahead.as_ring_dataset(found, recipe) or filled(replace(how, use_store=True))
    if isinstance(found, StreamingDataset):
        found.say = say
    found.labels = found.labels and not finetune.text_plan_of(recipe)
    found.caption_dropout = data.caption_dropout
    found.samples_posterior, found.adds_time_ids = (
        data.latent_sampling == "sample",
        model.denoiser.trains_micro_conditioning,
    )
    return found


def encoding_of(recipe: Recipe, model: Pipeline) -> EncodingOptions:
    """How the recipe's samples are encoded by the model's frozen stages."""
    data = recipe.data
    return EncodingOptions.of(
        data,
        f"{model.codec.fingerprint()} with deviation",
        model.conditioner.fingerprint() if is_conditional(model) else "",
        flip=data.flip,
        pixels_format=data.latent_format,
        texts_format=data.text_format,
        use_store=not (data.stream or data.cache_limit),
    )


def caption_encoder(model: Pipeline) -> Callable[[Sequence[str]], list[dict[str, torch.Tensor]]]:
    """Captions → the rows of their conditions; the empty one is what guidance leans away from."""

    ask: Any = (
        model.conditioner.words if base_images.is_image_to_video(model.conditioner) else model.conditioner
    )

    def read(texts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        distinct = list(dict.fromkeys(text for text in texts if text or model.origin is None))
        rows = dict(zip(distinct, ask(distinct).rows(), strict=True)) if distinct else {}
        if model.origin is not None and "" in texts:
            rows[""] = model.conditioner.encode_empty(1).row(0)
        return [rows[text] for text in texts]

    return read


def posterior_encoder(
    model: Pipeline, say: Say = lambda sentence: None
) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    """Pixels → what the store keeps of the codec's posterior: its mean and, in 16 bits, its deviation.

    Where so many pictures do not fit into memory, half as many are encoded at once.
    """
    at_once = AtOnce("pictures to encode", "Lower data.resolution or data.frames, or use a larger GPU.", say)

    def encode(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        model.codec.check_size(pixels.shape[-1], pixels.shape[-2])
        parts = at_once(lambda some: encode_some(pixels[some]), len(pixels))
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}

    def encode_some(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, deviation = model.codec.distribution(model.codec_input(pixels))
        return {"latents": mean} if deviation is None else {"mean": mean, "std": deviation.bfloat16()}

    return encode


def is_conditional(model: Pipeline) -> bool:
    """Whether captions guide the model."""
    return model.conditioner.kind != "none"
