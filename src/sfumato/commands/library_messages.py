"""What other packages have to say goes into the log of the run that is written, not onto the terminal.

torch, transformers and diffusers warn of what we handle ourselves, often, with paths of this machine. A
command says what matters in its own words. Warnings of the user's own code are shown as ever.
"""

import logging
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from sfumato.errors import for_terminal
from sfumato.run_folder import LIBRARIES

QUIETED = ("transformers", "diffusers", "peft", "huggingface_hub", "torchao", "torch", "bitsandbytes")
SAID = ("CUDA", "NVIDIA", "driver")
"""Words of warnings about the machine, which are said: what the user asked of it may not happen."""
INSTALLED = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("purelib", "platlib", "stdlib")}
    | {str(Path(__file__).resolve().parents[1])}
)


class _Quieted(logging.Logger):
    """A package's own logger, which takes no handler that writes onto the terminal."""

    def addHandler(self, hdlr: logging.Handler) -> None:
        """Leave out a stream's."""
        if type(hdlr) is not logging.StreamHandler:
            super().addHandler(hdlr)


class _ToRun(logging.Handler):
    """Hands each message on once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a record on, the first time its words come."""
        try:
            text = record.getMessage()
        except (TypeError, ValueError):
            text = str(record.msg)
        if text not in self.seen:
            self.seen.add(text)
            LIBRARIES.log(record.levelno, "%s: %s", record.name, text)


@contextmanager
def in_the_log() -> Iterator[None]:
    """Keep other packages' messages off the terminal for the length of a block."""
    keeper = _ToRun()
    loggers = [logging.getLogger(name) for name in QUIETED]
    before = [(one, one.__class__, one.propagate) for one in loggers]
    for one in loggers:
        one.handlers[:] = [kept for kept in one.handlers if type(kept) is not logging.StreamHandler]
        one.__class__ = _Quieted
        one.addHandler(keeper)
        one.propagate = False
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not str(Path(filename).resolve()).startswith(INSTALLED):
            shown(message, category, filename, lineno, file, line)
            return
        text = " ".join(str(message).split())
        is_new = text not in keeper.seen
        keeper.emit(logging.LogRecord(category.__name__, logging.WARNING, filename, lineno, text, None, None))
        if is_new and any(word in text for word in SAID):
            said = f"torch says: {text.partition(' (Triggered')[0]}"
            print(for_terminal(said), file=sys.stderr, flush=True)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
        for one, kind, propagate in before:
            one.removeHandler(keeper)
            one.__class__, one.propagate = kind, propagate
