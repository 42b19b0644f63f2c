"""A sample is a picture (or clip) that can be opened, with the words that describe it.

Everything in this room passes samples around; only `media` opens them.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

TRAIN, HELD_OUT = "train", "held_out"
Picture = Path | Callable[[], Image.Image | bytes]


def identity(name: str) -> int:
    """A number in [0, 2^63) that depends on nothing but the name; noise and order are drawn from it."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Sample:
    """One captioned picture or clip.

    name is unique within its collection (a path relative to the data folder, or a made-up one);
    file is where the picture lies, or picture draws it (or reads its bytes from an archive); content, if
    given, is a text that changes whenever the drawn picture would. Captions may be several. An epoch shows
    the sample `repeat` times. companions are further pictures of it (control, reference, mask, …): files, or
    what draws or reads them.
    """

    name: str
    captions: tuple[str, ...]
    file: Path | None = None
    split: str = TRAIN
    label: int | None = None
    picture: Callable[[], Image.Image | bytes] | None = field(default=None, repr=False, compare=False)
    content: str = ""
    repeat: float = 1
    companions: Mapping[str, Picture] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> int:
        """63 bits that depend on the name alone."""
        return identity(self.name)

    def source(self) -> Path | bytes | Image.Image:
        """What `media` can read: the file, or what picture() gives."""
        if self.picture is not None:
            return self.picture()
        if self.file is None:
            raise ValueError(f"sample {self.name} has neither a file nor a picture")
        return self.file

    def content_hash(self, source: Path | bytes | Image.Image | None = None) -> str:
        """Hash of all that the picture's pixels depend on: the file's bytes, or what draws it.

        Args:
            source: what `source()` gave or the bytes of that file, where they have been read already.
        Raises:
            OSError: the file cannot be read.
        """
        if self.content:
            return hashlib.sha256(self.content.encode()).hexdigest()
        source = self.source() if source is None else source
        if isinstance(source, Path):
            with source.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        if isinstance(source, Image.Image):
            source = repr((source.mode, source.size)).encode() + source.tobytes()
        return hashlib.sha256(source).hexdigest()


@dataclass(frozen=True)
class SetAside:
    """A file that cannot be used, and why."""

    file: str
    reason: str


@dataclass
class Collection:
    """Samples in a fixed order (by name), and the files that were set aside."""

    name: str
    samples: list[Sample]
    set_aside: list[SetAside] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def with_split(self, split: str) -> list[Sample]:
        """The samples of one split, "train" or "held_out"."""
        return [sample for sample in self.samples if sample.split == split]
