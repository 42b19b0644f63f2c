"""Captions: all the ways a sample may be described, listed before training, so that each is encoded once.

Which of them a sample shows is chosen by `EncodedDataset.read` from (seed, sample, epoch); leaving captions
out (dropout) belongs to training.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import xxhash

from sfumato.data.sources.sample import Sample
from sfumato.errors import Refused


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are put.

    template holds "{caption}" and may hold the name of any column ("a photo, {caption}, by {artist}").
    trigger_words are put in front. tag_shuffles > 0 gives so many orders of a caption's tags (parts between
    separators), of which the first `keep_tags` stay where they are.
    """

    template: str = "{caption}"
    trigger_words: str = ""
    tag_shuffles: int = 0
    keep_tags: int = 1
    tag_separator: str = ","

    def __post_init__(self) -> None:
        if "{caption}" not in self.template:
            raise Refused(
                f'The caption template "{self.template}" has no place for the caption; add {{caption}}.'
            )


def expand_captions(samples: Iterable[Sample], options: CaptionOptions) -> list[Sample]:
    """The samples with every caption put as `options` says.

    Raises:
        Refused: the template names a column that a sample does not have.
    """
    return [replace(sample, captions=tuple(dict.fromkeys(_all(sample, options)))) for sample in samples]


def _all(sample: Sample, options: CaptionOptions) -> Iterable[str]:
    for caption in sample.captions:
        if not caption:
            yield caption
            continue
        for version in shuffled(caption, sample.id, options):
            try:
                text = options.template.format(**{**sample.extra, "caption": version})
            except (KeyError, IndexError, ValueError) as problem:
                raise Refused(
                    f'The template "{options.template}" cannot be filled for {sample.name}: {problem}. '
                    f"Known: {', '.join(sorted({'caption', *sample.extra}))}."
                ) from problem
            yield f"{options.trigger_words} {text}".strip()


def shuffled(caption: str, sample: int, options: CaptionOptions) -> list[str]:
    """Orders of a caption's tags, a function of its id alone; without shuffles the caption itself."""
    tags = [tag.strip() for tag in caption.split(options.tag_separator)]
    if not options.tag_shuffles or len(tags) <= options.keep_tags + 1:
        return [caption]
    kept, rest = tags[: options.keep_tags], tags[options.keep_tags :]

    def order(version: int) -> list[str]:
        return sorted(rest, key=lambda tag: xxhash.xxh3_64_intdigest(f"{sample} {version} {tag}".encode()))

    joint = options.tag_separator.strip() + " "
    return [joint.join(kept + order(version)) for version in range(options.tag_shuffles)]


def truncated(
    captions: Sequence[str], lengths: Callable[[list[str]], list[int]], most: int
) -> list[tuple[str, int]]:
    """Captions with more than `most` tokens, and how many they have, by the model's own tokenizer."""
    counted = zip(captions, lengths(list(captions)), strict=True)
    return [(caption, length) for caption, length in counted if length > most]
