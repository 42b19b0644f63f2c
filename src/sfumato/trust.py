"""Which code may run: what the user named or trusts, never what a folder merely brings.

A recipe, a model or a run may name code as `file.py:name`. It runs

1. if the user named its file: in a recipe file, on the command line, or in Python;
2. if it is, byte for byte, what this machine remembers: code that sfumato trained with here, or that was
   trusted here before (`~/.cache/sfumato/trusted-code`, a file for each, named by its sha256);
3. if the user says so: `--trust`, `trust=True`; then the machine remembers it.

All else is named and refused. The bytes that are looked at are the bytes that run.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path

from sfumato.errors import Refused, printable

MEMORY = Path("~/.cache/sfumato/trusted-code")
"""The folder of what this machine remembers; delete a file of it, and its code is asked about again."""
MEMORY_VARIABLE = "SFUMATO_TRUSTED_CODE"
"""The environment's word for another such folder."""

_NAMED: set[Path] = set()
"""Files of code that the user of this process named."""
_TRUSTS: ContextVar[bool] = ContextVar("trusts", default=False)


@contextmanager
def trusting(trust: bool = True) -> Iterator[None]:
    """Inside it, if `trust`, code that a folder names may run, and is remembered."""
    before = _TRUSTS.set(trust or _TRUSTS.get())
    try:
        yield
    finally:
        _TRUSTS.reset(before)


def add_named_files(files: Iterable[Path]) -> None:
    """These files of code were named by the user: they may run in this process, whatever is in them."""
    _NAMED.update(_real(file) for file in files)


def remember(file: Path) -> bool:
    """Let this machine know the code of a file again; False where it cannot keep anything."""
    try:
        return _remember(file, sha256(file.read_bytes()).hexdigest())
    except OSError:
        return False


def is_remembered(digest: str) -> bool:
    """Whether this machine knows the code with this sha256."""
    memory = _memory()
    return memory is not None and (memory / digest).is_file()


def read_trusted_code(file: Path) -> bytes:
    """What a file of code says, to be run.

    Raises:
        Refused: nobody said that it may run.
    """
    try:
        code = file.read_bytes()
    except OSError as problem:
        raise Refused(f"{printable(file)} cannot be read: {problem.strerror}. Let it be readable.") from None
    if _real(file) in _NAMED:
        return code
    digest = sha256(code).hexdigest()
    if is_remembered(digest):
        return code
    if _TRUSTS.get():
        _remember(file, digest)
        return code
    raise Refused(
        f"{printable(file)} is code that was neither named by you nor run on this machine before (sha256 "
        f"{digest}), so nothing of it was run. Read it; if you trust it, say --trust, in Python trust=True."
    )


def _remember(file: Path, digest: str) -> bool:
    memory = _memory()
    if memory is None:
        return False
    place = memory / digest
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.write_text(f"{printable(_real(file))}\n", encoding="utf-8")
    except OSError:  # no home, or one that is read-only: then it is asked again
        return False
    return True


def _memory() -> Path | None:
    """The folder of what is remembered; None where nobody has a home."""
    said = os.environ.get(MEMORY_VARIABLE)
    try:
        return Path(said) if said else MEMORY.expanduser()
    except RuntimeError:
        return None


def _real(file: Path) -> Path:
    return Path(os.path.realpath(file.expanduser()))
