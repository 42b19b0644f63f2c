"""What every judge of a demo needs: which prompts, and pictures drawn and entered into the run."""

from typing import Any

from PIL import Image

from sfumato.data.sources.sample import Sample
from sfumato.demo.runner import DemoReport
from sfumato.generation.files import DEFAULT_FPS, contents, is_clip
from sfumato.run_folder import write_atomic
from sfumato.theory import noise
from sfumato.workflow.preview import write_shown

JUDGED = 64
FIRST_SEED = 1_000_003
"""Judged pictures start from noise that no preview used."""


def sample_prompts(captions: list[str], count: int) -> list[str]:
    """`count` of the captions at random, the same every time."""
    distinct = sorted(set(captions))
    order = noise.permutation(len(distinct), 0, "judged prompts", 0).tolist()
    return [distinct[index] for index in order[:count]]


def draw(trained: DemoReport, prompts: list[str], group: str, **guides: Any) -> list[Any]:
    """Draw the prompts, guided by what else `generate` takes, and enter what was drawn into the run."""
    seeds = [FIRST_SEED + index for index in range(len(prompts))]

    def watch(done: int, total: int) -> None:
        if trained.progress is not None:
            trained.progress(done, total, f"drawing {group.replace('_', ' ')}")

    pictures = trained.model.generate(prompts, seed=seeds, watch=watch, **guides)
    kind = "webp" if is_clip(pictures[0]) else "png"
    names = [f"{group}-{trained.step:06d}-{index:02d}.{kind}" for index in range(len(pictures))]
    fps = float(trained.model.info.get("fps", DEFAULT_FPS))
    for index, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        metadata = {"prompt": prompts[index], "seed": seeds[index], "step": trained.step}
        write_atomic(trained.folder.samples / name, contents(picture, kind, metadata, fps)[f".{kind}"])
    event_fields: dict[str, Any] = {"prompts": prompts, "seeds": seeds, "group": group}
    if guides:
        event_fields["shown"] = write_shown(trained.folder, group, guides, fps)
    trained.folder.event(
        "pictures", step=trained.step, files=[f"samples/{name}" for name in names], **event_fields
    )
    return pictures


def picture_of(sample: Sample) -> Image.Image:
    """The picture of an embedded sample, which draws itself."""
    source = sample.source()
    assert isinstance(source, Image.Image), "embedded samples draw themselves"
    return source
