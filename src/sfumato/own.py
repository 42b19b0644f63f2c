"""One's own: `file.py:name` names anything a user wrote, wherever a recipe or a command takes a name."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from .errors import Refused, nearest


def is_own(name: str) -> bool:
    """Whether `name` is written file.py:name."""
    return ".py:" in name


def load_own(name: str) -> Any:
    """The object called `name` in `file.py:name`.

    Raises:
        Refused: if the file is missing, fails when it runs, or has no such name.
    """
    where, _, what = name.rpartition(":")
    file = Path(where).expanduser()
    if not file.is_file():
        raise Refused(f"{file} does not exist. Write FILE.py:NAME with the path of a Python file.")
    spec = importlib.util.spec_from_file_location(f"sfumato_own_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Refused:
        raise
    except Exception as problem:
        line = _line_in(problem, file)
        raise Refused(f"{file}{line} fails with {type(problem).__name__}: {problem}.") from problem
    if not hasattr(module, what):
        known = [word for word in vars(module) if not word.startswith("_")]
        raise Refused(f'{file} has no "{what}".{nearest(what, known) if known else ""}')
    return getattr(module, what)


def _line_in(problem: BaseException, file: Path) -> str:
    """Where in the file the problem arose, as ', line 3'."""
    if isinstance(problem, SyntaxError) and problem.lineno:
        return f", line {problem.lineno}"
    trace, line = problem.__traceback__, None
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line else ""
