"""Reading ahead: while one part of a batch is computed, a thread reads the next."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from sfumato.errors import Failed

Read = TypeVar("Read")
Place = tuple[int, int, int]
PATIENCE_SECONDS = 300.0


class Reader(Generic[Read]):
    """`read(step, part, parts)`, with the place that will be asked for next read meanwhile.

    What follows a part is learned: what followed it last time. A wrong guess costs a read, never a
    wrong answer.

    Args:
        read: a pure function of its place.
        patience: seconds after which a read counts as stalled.
    """

    def __init__(self, read: Callable[[int, int, int], Read], patience: float = PATIENCE_SECONDS) -> None:
        self._read = read
        self._patience = patience
        self._last: Place | None = None
        self._follows: dict[tuple[int, int], tuple[int, int]] = {}
        self._ahead: tuple[Place, Future[Read]] | None = None
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, step: int, part: int, parts: int) -> Read:
        """What stands at this place.

        Raises:
            Failed: it did not arrive within the patience.
        """
        place = (step, part, parts)
        if self._last is not None and self._last[2] == parts:
            self._follows[self._last[1], parts] = (step - self._last[0], part)
        self._last = place
        found = self._taken(place)
        if self._pool is not None and (part, parts) in self._follows:
            later, next_part = self._follows[part, parts]
            following = (step + later, next_part, parts)
            self._ahead = (following, self._pool.submit(self._read, *following))
        return found

    def _taken(self, place: Place) -> Read:
        """What was read ahead, or is read now; a first read that stalls is named too."""
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        if self._ahead is None or self._ahead[0] != place:
            self._ahead = (place, self._pool.submit(self._read, *place))
        try:
            return self._ahead[1].result(self._patience)
        except TimeoutError:
            raise Failed(
                f"The data of step {place[0]} did not arrive within {self._patience:.0f} s: the disk of the "
                "store (data.cache_dir) hangs. Check it, and give the same command again."
            ) from None
