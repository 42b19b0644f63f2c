"""SIGINT and SIGTERM ask a run to stop; it finishes its step, saves, and leaves with 130 or 143."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class Stopped(SystemExit):
    """The run was asked to stop and has saved its state; as an exit code, 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class Signals:
    """Within the block a first SIGINT or SIGTERM is noted in `received`, a second one stops at once.

    Outside the main thread, where Python takes no signals, nothing is changed.

    Args:
        waits_for_others: only ever note signals: other processes must learn of them first.
    """

    def __init__(self, waits_for_others: bool = False) -> None:
        self.waits_for_others = waits_for_others
        self.received: int | None = None
        self._at_once = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = number
        if (again or self._at_once) and not self.waits_for_others:
            self._at_once = False
            raise Stopped(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that changes no state (pictures, measurements): a signal raises Stopped inside it.

        Raises:
            Stopped: also if a signal was noted before.
        """
        if self.received is not None and not self.waits_for_others:
            raise Stopped(self.received)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
