"""What a recipe says about data: where the samples are, what a model sees of them, where encodings are."""

from dataclasses import dataclass

from sfumato.settings import key


@dataclass(frozen=True)
class DataSettings:
    """The section [data] of a recipe."""

    train: str = key(
        "",
        "folder of captioned pictures, or an embedded set: openmoji, openmoji-all, shapes",
        path=True,
        words=("openmoji", "openmoji-all", "shapes"),
    )
    captions: str = key(
        "files",
        "where captions are: files (metadata or .txt beside), folder (class names), none",
        choices=("files", "folder", "none"),
    )
    resolution: int = key(64, "pictures have about resolution x resolution pixels", least=8)
    buckets: int = key(1, "aspect ratios pictures are sorted into; 1 crops all of them square", least=1)
    flip: bool = key(False, "also learn from mirrored pictures")
    caption_dropout: float = key(0.1, "share of samples shown without their caption", least=0, most=1)
    template: str = key("{caption}", "how a caption is put: {caption}, and {name} of any text column")
    trigger: str = key("", "words put in front of every caption")
    tag_orders: int = key(
        0, "orders in which a caption's tags are shown, taking turns; 0 leaves it as it is", least=0
    )
    tags_kept: int = key(1, "tag_orders only: so many first tags stay where they are", least=0)
    tag_separator: str = key(",", "tag_orders only: what stands between tags")
    companions: tuple[str, ...] = key(
        (), "further pictures that guide the model, by column: control, reference, mask, edit_source, ..."
    )
    dropout: tuple[str, ...] = key(
        (), "share of samples shown without one companion, each by itself: control=0.1"
    )
    held_out: float = key(0.05, "share of captions kept out of training to measure it", least=0, most=0.9)
    store: str = key(
        "~/.cache/sfumato", "where encodings are kept, for all runs", path=True, words=("~/.cache/sfumato",)
    )
