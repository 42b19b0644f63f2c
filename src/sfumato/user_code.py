"""One's own: `file.py:name` names anything a user wrote, wherever a recipe or a command takes a name.

Python hands the object itself over: `object_name` names it, and inside `use_objects` that word means it.
`trust` says what may run.
"""

import importlib.machinery
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from sfumato import trust
from sfumato.errors import Refused, nearest, printable

COPIES = "code"
"""The folder beside what names code, in which the code is kept as it was."""

_LOGGER = logging.getLogger("sfumato")
_GIVEN: dict[str, Any] = {}
"""Objects that Python handed over, by their words, while the call lasts that was given them."""


def is_user_code(name: str) -> bool:
    """Whether `name` is written file.py:name."""
    return ".py:" in name


def load_named_object(name: str) -> Any:
    """The object called `name` in `file.py:name`, which the user has just named.

    Raises:
        Refused: as `load_user_object`, but not for want of trust.
    """
    trust.add_named_files(code_files([name]))
    return load_user_object(name)


def load_user_object(name: str) -> Any:
    """The object called `name` in `file.py:name`.

    Raises:
        Refused: if the file is missing or not trusted, fails when it runs, or has no such name.
    """
    if name in _GIVEN:
        return _GIVEN[name]
    where, _, what = name.rpartition(":")
    if is_unnamed(name):
        raise Refused(
            f"{name} is an object that Python handed over and that {where} does not name: hand it over again "
            "in sfumato.train(…), or let a name at the top level of a file stand for it, as FILE.py:NAME."
        )
    file = Path(where).expanduser()
    if not file.is_file():
        raise Refused(f"{file} does not exist. Write FILE.py:NAME with the path of a Python file.")
    code = trust.read_trusted_code(file)
    script = sys.modules.get("__main__")
    if file_of(script) == file.absolute() and hasattr(script, what):  # it runs: again, it would train again
        return getattr(script, what)
    name_here = f"sfumato_own_{file.stem}"
    loader = _SourceLoader(name_here, str(file), code)
    spec = importlib.util.spec_from_file_location(name_here, file, loader=loader)
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


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Runs these bytes, whatever the file or a compiled one beside it says by now."""

    def __init__(self, name: str, path: str, code: bytes) -> None:
        super().__init__(name, path)
        self.code = code

    def get_code(self, fullname: str) -> Any:
        """The bytes, compiled."""
        return self.source_to_code(self.code, self.path)


def make_user_object(name: str) -> Any:
    """What `file.py:name` stands for; a class is called without arguments.

    Raises:
        Refused: as `load_user_object`, or the class cannot be called so.
    """
    made = load_user_object(name)
    if not inspect.isclass(made):
        return made
    try:
        return made()
    except Refused:
        raise
    except Exception as problem:
        raise Refused(f"{describe_error(name, problem)}. A class is made without arguments.") from problem


def check_call(
    work: Callable[..., Any], known: Iterable[str], first: int = 0, of_class: bool = False
) -> None:
    """Raises TypeError unless work(*first, …) can be called with those of the known names that it takes.

    Args:
        first: arguments that stand before the named ones. of_class: `work` is a method, looked up on a class.
    """
    try:
        signature = inspect.signature(work)
    except ValueError as problem:  # of what is written in C
        raise TypeError(str(problem)) from None
    before = first + (of_class and inspect.isfunction(work))
    signature.bind(*[None] * before, **dict.fromkeys(accepted_arguments(work, known)))


def code_hash(name: str) -> str:
    """sha256 of the file of `file.py:name`, in 16 digits; empty where there is no such file."""
    file = Path(name.rpartition(":")[0]).expanduser()
    return sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""


def code_files(words: Iterable[Any]) -> list[Path]:
    """The files of those words that are `file.py:name`."""
    return [Path(one.rpartition(":")[0]) for one in words if isinstance(one, str) and is_user_code(one)]


def keep_code(words: Iterable[str], folder: Path) -> dict[str, str]:
    """Copy the files of these words into `folder`/code; {file.py:name: the file's sha256}.

    A file that is not there is left out.
    """
    found: dict[str, str] = {}
    for word in words:
        file = Path(word.rpartition(":")[0]).expanduser()
        if is_user_code(word) and file.is_file():
            code = file.read_bytes()
            found[word] = sha256(code).hexdigest()
            copy = _copy_of(file, found[word], folder)
            if not copy.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(code)
    return found


def locate_code(word: str, folder: Path, hashes: Any = None) -> str:
    """The `file.py:name` that a file in `folder` means by `word`; a relative path is looked for beside it.

    Args:
        hashes: what `keep_code` gave. Where the code is gone or was changed since, its copy is taken, and
            this is said.
    """
    if not is_user_code(word):
        return word
    where, _, what = word.rpartition(":")
    file = folder.absolute() / Path(where).expanduser()
    digest = hashes.get(word) if isinstance(hashes, Mapping) else None
    if not isinstance(digest, str) or not digest.isalnum():
        return f"{file}:{what}"
    present = sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    copy = _copy_of(file, digest, folder)
    if present != digest and copy.is_file():
        changed = "was changed since" if present else "is not there any more"
        how = "%s %s: %s, the copy kept of it, is used."
        _LOGGER.warning(how, printable(file), changed, printable(copy))
        file = copy
    elif present and present != digest:
        _LOGGER.warning("%s was changed since %s was written.", printable(file), printable(folder))
    return f"{file}:{what}"


def _copy_of(file: Path, digest: str, folder: Path) -> Path:
    return folder / COPIES / f"{file.stem}-{digest[:16]}.py"


def is_unnamed(name: str) -> bool:
    """Whether the word stands for an object that its file has no name for: file.py:<Class>."""
    return name.endswith(">")


def object_name(thing: Any) -> str:
    """`file.py:name` of an object; `file.py:<Class>` where no file names it at its top level."""
    is_home = inspect.isclass(thing) or inspect.isfunction(thing)
    home: Any = thing if is_home else type(thing)
    for module in [sys.modules.get(home.__module__), *([] if is_home else list(sys.modules.values()))]:
        file = file_of(module)
        if file is not None:
            for name, value in list(vars(module).items()):
                if value is thing:
                    return f"{file}:{name}"
    file = file_of(sys.modules.get(home.__module__)) or Path("python.py").absolute()
    return f"{file}:<{home.__qualname__}>"


def file_of(module: Any) -> Path | None:
    """The .py file of a module, if it has one."""
    file = getattr(module, "__dict__", {}).get("__file__")
    return Path(file).absolute() if isinstance(file, str) and file.endswith(".py") else None


def named_class(name: str) -> str:
    """`file.py:Class` where the word is that of a nameless object, else the word itself."""
    where, _, what = name.rpartition(":")
    return f"{where}:{what.strip('<>')}" if is_unnamed(name) else name


@contextmanager
def use_objects(objects: Mapping[str, Any]) -> Iterator[None]:
    """Inside it these words mean these objects."""
    before = dict(_GIVEN)
    _GIVEN.update(objects)
    try:
        yield
    finally:
        _GIVEN.clear()
        _GIVEN.update(before)


def accepted_arguments(work: Callable[..., Any], known: Iterable[str]) -> list[str]:
    """Those of the known names that a function takes; all where it takes **rest."""
    parameters = inspect.signature(work).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return list(known)
    return [name for name in known if name in parameters]


def describe_error(name: str, problem: BaseException) -> str:
    """`file.py:name, line 3: ValueError: …`: what went wrong in a user's code, in one line."""
    line = _line_in(problem, Path(name.rpartition(":")[0]))
    said = " ".join(str(problem).split())
    return f"{name}{line}: {type(problem).__name__}: {said}".rstrip(": ")


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
