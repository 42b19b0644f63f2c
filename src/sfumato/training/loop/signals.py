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
    """Within the block a first SIGINT or SIGTERM is noted in `asked`, a second one stops at once.

    Outside the main thread, where Python takes no signals, nothing is changed.

    Args:
        patient: only ever note signals: other processes must learn of them before this one may leave.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.asked: int | None = None
        self._at_once = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        again = self.asked is not None
        self.asked = number
        if (again or self._at_once) and not self.patient:
            self._at_once = False
            raise Stopped(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that changes no state (pictures, measurements): a signal raises Stopped inside it.

        Raises:
            Stopped: also if a signal was noted before.
        """
        if self.asked is not None and not self.patient:
            raise Stopped(self.asked)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
