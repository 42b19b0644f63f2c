"""A command ends in one sentence and an exit code; only a programming error ends in a traceback."""

import errno
import functools
import inspect
import re
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, ParamSpec

import typer

from sfumato.commands.library_messages import in_the_log
from sfumato.errors import Failed, Refused, for_terminal
from sfumato.trust import trusting

FAILED, REFUSED, INTERRUPTED, TERMINATED = 1, 2, 130, 143

Arguments = ParamSpec("Arguments")


def with_exit_code(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """The command, ending the process with the exit code its outcome stands for."""

    @functools.wraps(command)
    def answered(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminated)
        try:
            with in_the_log():
                command(*args, **kwargs)
        except KeyboardInterrupt:
            stop("Stopped. What was saved stays; the same command goes on from there.", INTERRUPTED)
        except Exception as problem:
            verdict = refusal_of(problem, command.__name__)
            if verdict is None:
                raise
            stop(*verdict)

    return answered


def with_trust(command: Callable[Arguments, None]) -> Callable[..., None]:
    """The command with the option --trust: code that a run or a model names may run."""

    @functools.wraps(command)
    def trusted(*args: Any, trust: bool = False, **kwargs: Any) -> None:
        with trusting(trust):
            command(*args, **kwargs)

    option = typer.Option("--trust", help="Run code that a run or a model names, once you have read it.")
    added = inspect.Parameter(
        "trust", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )
    signature = inspect.signature(command)
    trusted.__annotations__ = {**command.__annotations__, "trust": added.annotation}
    parameters = [*signature.parameters.values(), added]
    vars(trusted)["__signature__"] = signature.replace(parameters=parameters)  # what typer reads
    return trusted


def refusal_of(problem: Exception, command: str = "") -> tuple[str, int] | None:
    """The sentence and exit code of a problem that is no programming error, else None.

    Args:
        command: whose problem it is, for advice.
    """
    text = " ".join(str(problem).split())
    if isinstance(problem, Refused):
        return text, REFUSED
    if isinstance(problem, Failed):
        return text, FAILED
    if isinstance(problem, OSError) and problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{problem.filename} may not be written or read: {problem.strerror}. Choose another place.",
            REFUSED,
        )
    if isinstance(problem, OSError) and problem.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{problem.filename} cannot be: {problem.strerror}. Choose another name.", REFUSED
    if "File too large (os error" in text or (isinstance(problem, OSError) and problem.errno == errno.EFBIG):
        return (
            "A file may not become that large here (ulimit -f, or the file system). What was saved stays; "
            "raise the limit and give the same command again.",
            FAILED,
        )
    full = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in text:
        where = getattr(problem, "filename", None) or "The disk"
        return (
            f"{where}: no space is left. What was saved stays; make room and give the same command again.",
            FAILED,
        )
    if is_out_of_memory(problem, text):
        return f"Memory is used up{_wanted(text)}. {MEMORY.get(command, MEMORY[''])}", FAILED
    return None


MEMORY = {
    "train": "Lower train.batch, data.resolution or the model's size, or raise train.gradient_accumulation "
    "to compute a batch in parts; sfumato plan says what a step needs.",
    "plan": "Lower train.batch, data.resolution or the model's size.",
    "encode": "Lower data.resolution or data.frames.",
    "generate": "Draw smaller pictures (--width, --height), fewer (--count), or decode in tiles (--tile).",
    "evaluate": "Measure fewer pictures at once: --samples.",
    "data": "A file of the data needs more than there is; look at the largest.",
    "": "Close what else uses it, or ask for less.",
}
"""What to do, by the command that used the memory up."""
_REFUSED_BY_AN_ALLOCATOR = (
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "Storage size calculation overflowed",
    "bad_alloc",
    "CUDA out of memory",
    "out of memory",
)


def is_out_of_memory(problem: Exception, text: str) -> bool:
    """Whether memory was refused: Python, numpy, torch's allocators and the system each say it otherwise."""
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return True
    if isinstance(problem, OSError):
        return problem.errno == errno.ENOMEM
    return isinstance(problem, RuntimeError) and any(words in text for words in _REFUSED_BY_AN_ALLOCATOR)


def _wanted(text: str) -> str:
    """How much was asked for at once, where the text says it."""
    if found := re.search(r"(\d{7,}) bytes", text):
        return f": {int(found[1]) / 1e9:,.3g} GB were asked for at once"
    found = re.search(r"[\d.]+ [KMGTPE]i?B\b", text)
    return f": {found[0]} were asked for at once" if found else ""


def stop(sentence: str, code: int) -> None:
    """Say the sentence on stderr and end the process with the code."""
    said = f"sfumato: {sentence}" if code in (FAILED, REFUSED) else sentence
    print(for_terminal(said), file=sys.stderr, flush=True)
    raise SystemExit(code)


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a command as SIGINT does, with its own exit code."""
    stop("Stopped. What was saved stays; the same command goes on from there.", TERMINATED)
