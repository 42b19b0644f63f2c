"""Clips measured: how much changes from frame to frame, drawn and real; what the codec leaves of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sfumato.data.encoding.views import EncodingOptions
from sfumato.data.sources.sample import Sample
from sfumato.evaluation import Measure, mean_with_error
from sfumato.generation import Pipeline
from sfumato.recipe import Recipe
from sfumato.workflow.dataset import Bucket, PicturesInMemory, fitting_in_memory


def measure_videos(
    recipe: Recipe,
    model: Pipeline,
    samples: list[Sample],
    bucket_of: Bucket | Callable[[Bucket], Bucket],
    count: int,
    drawing: dict[str, Any],
    watch: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Measure], list[tuple[str, Any]]]:
    """Numbers about `count` clips of these samples' captions beside the samples themselves, and the clips."""
    data = recipe.data
    how = EncodingOptions.of(data)
    found = PicturesInMemory(fitting_in_memory(samples, bucket_of, data.frames)[: 2 * count], bucket_of, how)
    captions = {sample.name: sample.captions[0] if sample.captions else "" for sample in samples}
    chosen = [i for i, one in enumerate(found.pictures) if one.shape[1] > 1][:count]
    real = [found.pictures[i].permute(1, 2, 3, 0).numpy() for i in chosen]
    prompts = [captions[found.names[i]] for i in chosen]
    texts = prompts if model.conditioner.kind != "none" else None
    seeds = [2_000_003 + i for i in range(len(chosen))]
    known = {"literal_prompt": True, "watch": watch, **drawing}  # captions are read as they were learned
    drawn = model.generate(texts, seed=seeds, **known) if chosen else []
    ratios = []
    for i in chosen:
        pixels = found.pictures[i][None].to(model.device).float() / 127.5 - 1
        again = model.decode(model.encode(pixels)).clamp(-1, 1)
        ratios.append(float(10 * torch.log10(4 / (again - pixels).square().mean().clamp_min(1e-12))))
    note = "mean difference of consecutive frames, levels of 255"
    metrics = {
        "change_drawn": mean_with_error([frame_change(clip) for clip in drawn], f"{note}, drawn clips"),
        "change_real": mean_with_error([frame_change(clip) for clip in real], f"{note}, training clips"),
        "codec_psnr": mean_with_error(ratios, "dB, training clips through the codec and back"),
    }
    return metrics if chosen else {}, list(zip(prompts, drawn, strict=True))


def frame_change(clip: np.ndarray) -> float:
    """Mean |difference| of consecutive frames of a clip [F, H, W, 3]."""
    return float(np.abs(np.diff(clip.astype(np.float32), axis=0)).mean())
