"""What a data set is like, as far as a recipe depends on it: heads of files are read, no pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sfumato.data.settings import EMBEDDED, DataSettings
from sfumato.data.sources import archives, folder, moving_shapes
from sfumato.data.sources.folder import SIDECARS
from sfumato.data.sources.metadata import FILES
from sfumato.data.sources.sample import Collection, Sample
from sfumato.readers import clips, media
from sfumato.workflow.dataset import collect

LOOKED_AT = 64
"""So many samples, evenly spread, are opened."""
SQUARE = 1.15
"""Pictures whose sides differ by less lose little when they are cropped square."""


@dataclass(frozen=True)
class DataFacts:
    """What a recipe depends on.

    samples: to train on; captions: where they are (files, folder, none); classes: how many, if every sample
    has a number of one, else 0; side: the median of √(width·height) in pixels, 0 if unknown;
    oblong: share of samples that are not square; clips, stills: whether there are some; seconds, fps: of a
    short clip (a tenth are shorter) and the median rate; companions: names of the pictures beside;
    transparent: share of pictures with an alpha channel; has_split: whether some are held out already.
    """

    samples: int
    captions: str = "files"
    classes: int = 0
    side: int = 0
    oblong: float = 0.0
    clips: bool = False
    stills: bool = False
    seconds: float = 0.0
    fps: float = 0.0
    companions: tuple[str, ...] = ()
    transparent: float = 0.0
    has_split: bool = False

    def __str__(self) -> str:
        """In words, for whoever waits for the recipe."""
        kinds = "clips and stills" if self.clips and self.stills else "clips" if self.clips else "pictures"
        words = [f"{self.samples:,} {kinds}"]
        if self.side:
            words.append(f"about {self.side} pixels a side")
        if self.oblong >= 0.1:
            words.append(f"{self.oblong:.0%} of them not square")
        if self.classes:
            words.append(f"{self.classes} classes")
        if self.captions == "none":
            words.append("no captions")
        if self.transparent:
            words.append(f"{self.transparent:.0%} with an alpha channel, which is laid on white")
        if self.companions:
            words.append(f"pictures beside them: {', '.join(self.companions)}")
        return ", ".join(words)


def inspect_data(data: str) -> DataFacts:
    """Look at a data set.

    Raises:
        Refused: there is no such data set, or no sample in it.
    """
    folder.check_source(data)
    where = caption_source(data)
    frames = moving_shapes.FRAMES if data == "moving-shapes" else 0
    found = collect(DataSettings(train=data, captions=where, held_out=0.0, frames=frames))
    return facts_of(found, where)


def caption_source(data: str) -> str:
    """Where captions seem to be: beside the pictures (files), in the names of folders (folder), or none."""
    folder = Path(data).expanduser()
    if data in EMBEDDED or archives.find_reader(folder) is not None:
        return "files"
    named = (FILES, tuple(f"*{suffix}" for suffix in SIDECARS))
    if any(next(folder.rglob(name), None) for names in named for name in names):
        return "files"
    return "folder" if any(entry.is_dir() for entry in folder.iterdir()) else "none"


def facts_of(found: Collection, captions: str) -> DataFacts:
    """What its samples' names say, and the heads of some of their files."""
    samples = found.with_split("train") or found.samples
    looked = [samples[i * len(samples) // LOOKED_AT] for i in range(LOOKED_AT)]
    looked = list({one.name: one for one in looked}.values())
    videos = [one for one in looked if clips.is_clip(one.name, one.source())]
    named = any(one.name.lower().endswith(media.CLIPS) for one in samples)
    has_clips = named or 2 * len(videos) >= len(looked)
    sizes, alphas = _heads(looked)
    lengths, rates = _lengths(videos)
    aspects = [max(one) / min(one) for one in sizes]
    labels = {one.label for one in samples}
    is_classes = captions != "none" and None not in labels and len(labels) < len(samples) / 4
    return DataFacts(
        samples=len(samples),
        captions=captions,
        classes=len(labels) if is_classes else 0,
        side=round(median((width * height) ** 0.5 for width, height in sizes)) if sizes else 0,
        oblong=sum(one > SQUARE for one in aspects) / max(1, len(aspects)),
        clips=has_clips,
        stills=has_clips and len(videos) < len(looked),
        seconds=sorted(lengths)[len(lengths) // 10] if lengths else 0.0,
        fps=median(rates) if rates else 0.0,
        companions=tuple(sorted({name for one in samples for name in one.companions})),
        transparent=alphas / max(1, len(looked)),
        has_split=len(samples) < len(found.samples),
    )


def _heads(samples: Sequence[Sample]) -> tuple[list[tuple[int, int]], int]:
    """Sizes of those that can be read, and how many have an alpha channel; training names the rest."""
    sizes, alphas = [], 0
    for one in samples:
        try:
            source = one.source()
            if one.name.lower().endswith(media.CLIPS):
                sizes.append(clips.video_info(one.name, source).size)
                continue
            sizes.append(media.size_of(source))
            alphas += media.open_picture(source, whole=False).mode in ("RGBA", "LA", "PA")
        except (media.Unreadable, OSError):
            continue
    return sizes, alphas


def _lengths(videos: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """Seconds and frames a second of the clips that can be read."""
    found = []
    for one in videos:
        try:
            found.append(clips.video_info(one.name, one.source()))
        except (media.Unreadable, OSError):
            continue
    return [one.seconds for one in found if one.seconds], [one.fps for one in found if one.fps]
