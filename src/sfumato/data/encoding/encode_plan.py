"""Work: what encoding has to do, laid out before it begins, and done by threads that look ahead."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from sfumato.data.encoding import views
from sfumato.data.encoding.views import Companion, EncodingOptions, EncodingTask, Size
from sfumato.data.sources.sample import Sample, SetAside
from sfumato.data.store.store import key

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class EncodePlan:
    """What is to be in the store, and the samples that cannot be used.

    tasks are of the samples, companion_tasks those of their companions by (sample's name, which), texts the
    captions with their keys. prompt_images: where words are read beside a picture, its content by the
    sample's name.
    """

    tasks: list[EncodingTask]
    companion_tasks: dict[tuple[str, str], EncodingTask]
    texts: dict[str, str]
    set_aside: list[SetAside]
    prompt_images: dict[str, str] = field(default_factory=dict)

    def text(self, sample: Sample, caption: str) -> str:
        """The key of a sample's caption; "" without texts."""
        return self.texts.get(text_key(caption, self.prompt_images.get(sample.name, "")), "")

    @property
    def pictures(self) -> list[EncodingTask]:
        """The tasks of samples and companions."""
        return [*self.tasks, *self.companion_tasks.values()]

    @property
    def fingerprint(self) -> str:
        """Changes whenever a picture's file, or what draws it, does."""
        digest = hashlib.sha256()
        for task in self.pictures:
            line = (task.sample.name, task.companion, task.content)
            digest.update(repr(line).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]

    def keys(self, options: EncodingOptions) -> dict[str, list[str]]:
        """The keys of everything that is kept, by kind."""
        kept = [one for task in self.pictures for one in task.keys] if options.use_store else []
        return {"pixels": kept, "text": list(self.texts.values())}


def plan_encoding(
    samples: Sequence[Sample],
    bucket_of: Size | Callable[[Size], Size],
    options: EncodingOptions,
    companions: Mapping[str, Companion],
    with_texts: bool,
    progress: Progress,
    prompt_image: Callable[[Sample], str] | None = None,
) -> EncodePlan:
    """Look at every sample and say what is to be encoded; nothing is decoded or written.

    Args:
        prompt_image: the content of the picture that a sample's words are read beside, where they are.
    """

    def look(sample: Sample) -> EncodingTask | SetAside:
        return views.plan_task(sample, bucket_of, options)

    tasks: list[EncodingTask] = []
    set_aside: list[SetAside] = []
    with threads(options.threads) as pool:
        for done, found in enumerate(prefetch(pool, look, samples, 64)):
            if isinstance(found, SetAside):
                set_aside.append(found)
            else:
                tasks.append(found)
            progress(done + 1, len(samples), "reading")
    whole, companion_tasks = _companions(tasks, companions, options, set_aside)
    contents = (
        {task.sample.name: prompt_image(task.sample) for task in whole} if prompt_image and with_texts else {}
    )
    captions = {
        text_key(caption, contents.get(task.sample.name, ""))
        for task in whole
        for caption in (*task.sample.captions, "")
    }
    captions |= set() if contents or prompt_image else {""}
    texts = {caption: _text_key(options, caption) for caption in captions} if with_texts else {}
    return EncodePlan(whole, companion_tasks, texts, set_aside, contents)


PROMPT_IMAGE_MARK = "\0"


def text_key(caption: str, content: str) -> str:
    """What a text encoder is asked: a caption, and the content of the picture beside it, if there is one."""
    return f"{caption}{PROMPT_IMAGE_MARK}{content}" if content else caption


def _companions(
    tasks: Sequence[EncodingTask],
    companions: Mapping[str, Companion],
    options: EncodingOptions,
    set_aside: list[SetAside],
) -> tuple[list[EncodingTask], dict[tuple[str, str], EncodingTask]]:
    """The tasks whose samples have all companions, and the companions' own by (sample's name, which)."""
    whole: list[EncodingTask] = []
    companion_tasks: dict[tuple[str, str], EncodingTask] = {}
    for task in tasks:
        found = {
            (task.sample.name, name): views.companion_task(task, name, options, companion)
            for name, companion in companions.items()
        }
        missing = next((one for one in found.values() if isinstance(one, SetAside)), None)
        if missing is None:
            whole.append(task)
            companion_tasks |= {place: one for place, one in found.items() if isinstance(one, EncodingTask)}
        else:
            set_aside.append(SetAside(task.sample.name, companion_reason(task, missing)))
    return whole, companion_tasks


def companion_reason(task: EncodingTask, missing: SetAside) -> str:
    """The reason that a companion gives for setting its sample aside."""
    where = missing.file.removeprefix(f"{task.sample.name}: ")
    return missing.reason if missing.file == task.sample.name else f"{where}: {missing.reason}"


def _text_key(options: EncodingOptions, caption: str) -> str:
    return key(hashlib.sha256(caption.encode()).hexdigest(), "caption", options.texts, options.texts_format)


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that, when the block fails, does not finish what was only planned."""
    pool = ThreadPoolExecutor(max(1, count))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def prefetch(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """work(item) for each item in order, up to `depth` of them under way at once."""
    upcoming, waiting = iter(items), deque[Future[R]]()
    for item in islice(upcoming, depth):
        waiting.append(pool.submit(work, item))
    while waiting:
        result = waiting.popleft().result()
        for item in islice(upcoming, 1):
            waiting.append(pool.submit(work, item))
        yield result
