"""What a recipe says about data: where the samples are, what a model sees of them, where encodings are."""

from collections.abc import Mapping
from dataclasses import dataclass

from sfumato.settings import Table, key

FORMATS = ("same", "float32", "float16", "bfloat16", "float8", "int8")
EMBEDDED = (
    "openmoji",
    "openmoji-all",
    "shapes",
    "moving-shapes",
    "shapes-alone",
    "shapes-reference",
    "shapes-edit",
)
"""Data sets that come with the package, by name."""


@dataclass(frozen=True)
class ResolutionStage:
    """Of a curriculum: the resolution that is trained at until a step."""

    resolution: int
    until: int


@dataclass(frozen=True)
class DataSettings:
    """The section [data] of a recipe."""

    train: str | tuple[str, ...] = key(
        "",
        "folder of captioned pictures or clips, openmoji, openmoji-all, shapes, moving-shapes, a data set of "
        "the Hub as hf:owner/name, or one of your own as file.py:name; or several",
        path=True,
        words=EMBEDDED,
        many=True,
    )
    set_repeats: tuple[float, ...] = key(
        (),
        "how often an epoch shows each of the sets: 2 twice, 0.5 one half now and the other next",
        numbers=True,
    )
    captions: str = key(
        "files",
        "where captions are: files (metadata or .txt beside), folder (class names), none",
        choices=("files", "folder", "none"),
    )
    class_images: str = key(
        "",
        "folder of pictures of the class that the subject is one of, shown beside so that it stays",
        path=True,
    )
    class_prompt: str = key(
        "", "the caption of the prior's pictures; without a folder the base draws them from it, once"
    )
    num_class_images: int = key(100, "class_prompt only: so many are drawn", least=1)
    prior_loss_weight: float = key(1.0, "of the prior's loss beside the subject's", least=0)
    resolution: int = key(64, "pictures have about resolution x resolution pixels", least=8)
    buckets: int = key(1, "aspect ratios pictures are sorted into; 1 crops all of them square", least=1)
    token_budget: bool = key(
        False, "batches of large buckets are smaller, so that all cost alike; train.batch is the mean"
    )
    curriculum: tuple[ResolutionStage, ...] = key(
        (),
        "smaller resolutions to begin with, each until a step; 32:1000 is 32 until step 1000",
        rows=ResolutionStage,
        sign=":",
        example="32:1000",
    )
    frames: int = key(0, "frames of a clip; 0 trains on pictures", least=0)
    fps: float = key(8.0, "frames only: so many a second, whatever rate a file has", least=0.01)
    short_clip_frames: tuple[float, ...] = key(
        (),
        "frames only: lengths for clips too short for data.frames, as [9, 5, 1]; 1 makes them stills",
        numbers=True,
    )
    clips_per_video: int = key(
        1, "frames only: pieces taken of each clip, evenly spread; epochs take turns", least=1
    )
    flip: bool = key(False, "also learn from mirrored pictures")
    caption_dropout: float = key(0.1, "share of samples shown without their caption", least=0, most=1)
    template: str = key("{caption}", "how a caption is put: {caption}, and {name} of any text column")
    trigger_words: str = key("", "words put in front of every caption")
    tag_shuffles: int = key(
        0, "orders in which a caption's tags are shown, taking turns; 0 leaves it as it is", least=0
    )
    keep_tags: int = key(1, "tag_shuffles only: so many first tags stay where they are", least=0)
    tag_separator: str = key(",", "tag_shuffles only: what stands between tags")
    condition_columns: tuple[str, ...] = key(
        (), "further pictures that guide the model, by column: control, reference, mask, edit_source, ..."
    )
    condition_dropout: Mapping[str, float] = key(
        Table(),
        "share of samples shown without one companion, each by itself: control = 0.1",
        values=float,
        least=0,
        most=1,
        example="control=0.1",
    )
    control_image: str = key(
        "control",
        "controlnet, or full on our own networks: sketch, canny or soft-edge of the picture itself, or a "
        "column of control pictures",
    )
    reference_image: str = key(
        "picture", "ip-adapter only: the column of references; picture: the picture itself"
    )
    source_image: str = key(
        "",
        "the column of the pictures to begin with, for edit and bases that are shown one; empty: "
        "edit_source, where there has to be one",
    )
    random_masks: int = key(
        0,
        "for models that repaint: so many masks drawn for each picture (boxes, ovals, strokes), in place of "
        "a column mask",
        least=0,
    )
    held_out: float = key(0.05, "share of captions kept out of training to measure it", least=0, most=0.9)
    latent_sampling: str = key(
        "mode",
        "what of the codec's posterior is shown: its mode, or a new sample every epoch",
        choices=("mode", "sample"),
    )
    latent_format: str = key("same", "how latents are stored; smaller is less exact", choices=FORMATS)
    text_format: str = key("same", "how encoded captions are stored", choices=FORMATS)
    stream: bool = key(False, "encode pictures whenever they are shown, and keep none of it on disk")
    cache_limit: str = key(
        "", "as 20GB: if encoded pictures need more, the next steps' are encoded ahead and older ones dropped"
    )
    cache_dir: str = key(
        "~/.cache/sfumato", "where encodings are kept, for all runs", path=True, words=("~/.cache/sfumato",)
    )
