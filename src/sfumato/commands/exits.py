"""A command ends in one sentence and an exit code; only a programming error ends in a traceback."""

import errno
import functools
import inspect
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, ParamSpec

import typer

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
            command(*args, **kwargs)
        except KeyboardInterrupt:
            stop("Stopped. What was saved stays; the same command goes on from there.", INTERRUPTED)
        except Exception as problem:
            verdict = refusal_of(problem)
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


def refusal_of(problem: Exception) -> tuple[str, int] | None:
    """The sentence and exit code of a problem that is no programming error, else None."""
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
    full = isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in text:
        where = getattr(problem, "filename", None) or "The disk"
        return (
            f"{where}: no space is left. What was saved stays; make room and give the same command again.",
            FAILED,
        )
    if isinstance(problem, MemoryError) or type(problem).__name__ == "OutOfMemoryError":
        return (
            "Memory is used up. Lower train.batch, or raise train.gradient_accumulation to compute it in "
            "parts.",
            FAILED,
        )
    return None


def stop(sentence: str, code: int) -> None:
    """Say the sentence on stderr and end the process with the code."""
    said = f"sfumato: {sentence}" if code in (FAILED, REFUSED) else sentence
    print(for_terminal(said), file=sys.stderr, flush=True)
    raise SystemExit(code)


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a command as SIGINT does, with its own exit code."""
    stop("Stopped. What was saved stays; the same command goes on from there.", TERMINATED)
