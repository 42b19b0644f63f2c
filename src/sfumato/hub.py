"""The Hub: which files of a repository are there, how they come into its usual cache, and how they leave.

All goes through `huggingface_hub`: its cache (HF_HOME, HF_HUB_CACHE), its endpoint (HF_ENDPOINT), its token
(`hf auth login`, HF_TOKEN), its offline mode (HF_HUB_OFFLINE). No code of a repository is fetched or run.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import Failed, Refused, for_terminal

ID = re.compile(
    r"(?P<source>modelscope:)?(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/\w+|[\w.-]+))?(?:/(?P<file>[\w./ -]+\.safetensors))?"
)

FILES = (".safetensors", ".ckpt", ".pt", ".bin", ".toml", ".json")
"""Endings of what is meant as a file of one's own, not as `owner/name`."""


@dataclass(frozen=True)
class RepoId:
    """`owner/name`, `owner/name@revision`, `owner/name/file.safetensors`; `modelscope:` before it."""

    name: str
    revision: str = ""
    file: str = ""
    of_modelscope: bool = False

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{'modelscope:' * self.of_modelscope}{self.name}{at}"


def parse(given: str) -> RepoId | None:
    """The repository that a text may mean; None where it can mean none."""
    found = ID.fullmatch(given)
    if found is None or ".." in given:
        return None
    said = found.groupdict(default="")
    if said["name"].endswith(FILES) and not said["file"]:
        return None
    return RepoId(said["name"], said["revision"], said["file"], bool(said["source"]))


@dataclass(frozen=True)
class Repo:
    """A repository as it is at one commit: {file: bytes}."""

    id: RepoId
    commit: str
    sizes: Mapping[str, int]
    kind: str = "model"

    @property
    def snapshot(self) -> Path:
        """Where its files are once they were fetched."""
        return home(self.id, self.kind) / "snapshots" / self.commit


def cache() -> Path:
    """Where the Hub's files are kept on this machine (HF_HOME, HF_HUB_CACHE)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def home(repo: RepoId, kind: str = "model") -> Path:
    """The folder of a repository in the cache."""
    return cache() / f"{kind}s--{repo.name.replace('/', '--')}"


def is_offline() -> bool:
    """Whether nothing may be fetched (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cached(repo: RepoId, kind: str = "model") -> Path | None:
    """The snapshot in the cache: of the revision, of main, else the only one; None where there is none."""
    place = home(repo, kind)
    reference = place / "refs" / (repo.revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else repo.revision
    if commit and (found := place / "snapshots" / commit).is_dir():
        return found
    kept = sorted((place / "snapshots").glob("*"))
    return kept[0] if len(kept) == 1 and not repo.revision else None


def missing(given: str) -> str:
    """What to do about a repository that is not in the cache while nothing may be fetched."""
    name = str(given).partition("@")[0]
    return (
        f'"{given}" is no folder here and not in the Hub\'s cache ({cache()}), and nothing is fetched, as '
        f"you were offline (HF_HUB_OFFLINE): put the folder at {Path(given).absolute()}, unset "
        f"HF_HUB_OFFLINE, or fill the cache where there is a network by `hf download {name}`."
    )


@contextmanager
def explained(repo: RepoId, kind: str = "model") -> Iterator[None]:
    """The Hub's errors as one sentence that names the repository and the way out.

    Raises:
        Refused: it is not there, gated, or not open to this token. Failed: the connection or a file.
    """
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repo.name}"
    try:
        yield
    except errors.GatedRepoError as problem:
        raise Refused(
            f"{repo} is gated: accept its terms at {page}, then say who you are with `hf auth login` (or "
            "HF_TOKEN) and give the same command again."
        ) from problem
    except errors.RepositoryNotFoundError as problem:
        raise Refused(
            f"{repo} is no folder here, and not at {page}, or it is private. Check its name; for a private "
            "one say who you are with `hf auth login` (or HF_TOKEN)."
        ) from problem
    except errors.RevisionNotFoundError as problem:
        raise Refused(
            f'{repo.name} has no revision "{repo.revision}": see {page}/commits for its branches and commits.'
        ) from problem
    except errors.HfHubHTTPError as problem:
        status = problem.response.status_code
        if status in (401, 403):
            raise Refused(
                f"{page} answers {status}: your token does not open it. Say who you are with `hf auth "
                "login`; to write there, a token needs the right to write."
            ) from problem
        raise Failed(f"{page} answers {status}. Try again later; what was fetched stays.") from problem
    except errors.LocalEntryNotFoundError as problem:
        raise Failed(
            f"{repo} is no folder here, and {constants.ENDPOINT} cannot be reached. What was fetched stays; "
            "give the same command again where there is a network."
        ) from problem
    except Exception as problem:
        if not _is_of_connection(problem):
            raise
        said = " ".join(str(problem).split())[:160] or type(problem).__name__
        raise Failed(
            f"{repo}: the connection to {constants.ENDPOINT} broke off ({said}). The files that came whole "
            "stay; give the same command again, and only the others are fetched."
        ) from problem


def _is_of_connection(problem: Exception) -> bool:
    """Whether a library of HTTP raised it, or a file came shorter than it was announced."""
    package = type(problem).__module__.partition(".")[0]
    return package in ("httpx", "httpx2", "httpcore", "requests") or "Consistency check failed" in str(
        problem
    )


def read_repo(repo: RepoId, kind: str = "model") -> Repo:
    """Which files a repository has at its revision, and how large they are; nothing of them is fetched.

    Raises:
        Refused, Failed: as `explained`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with explained(repo, kind):
        api = HfApi(library_name="sfumato")
        commit = api.repo_info(repo.name, revision=repo.revision or None, repo_type=kind).sha
        tree = api.list_repo_tree(repo.name, recursive=True, revision=commit, repo_type=kind)
        sizes = {one.path: one.size for one in tree if isinstance(one, RepoFile)}
    return Repo(repo, str(commit), sizes, kind)


def absent(repo: Repo, files: Sequence[str]) -> dict[str, int]:
    """Of these files, those that are not in the cache: {file: bytes}."""
    return {name: repo.sizes[name] for name in files if not (repo.snapshot / name).is_file()}


def summary(repo: Repo, files: Mapping[str, int]) -> dict[str, Any]:
    """{commit, files, size, bytes} of files of a repository, for a plan."""
    total = sum(files.values())
    return {"commit": repo.commit, "files": len(files), "size": size_text(total), "bytes": total}


def fetch(repo: Repo, files: Sequence[str]) -> Path:
    """Bring files of a repository into the cache, with a bar; returns the snapshot's folder.

    What is there is not fetched again. A connection that breaks is taken up where it broke, five times; after
    that the files that came whole stay. Sizes are compared, and the revision is remembered last.

    Raises:
        Refused, Failed: as `explained`.
    """
    from huggingface_hub import hf_hub_download

    lacking = absent(repo, files)
    if lacking:
        with explained(repo.id, repo.kind), _bar(f"Fetching {repo.id.name}", lacking) as bar:
            for name in lacking:
                hf_hub_download(
                    repo.id.name,
                    name,
                    repo_type=repo.kind,
                    revision=repo.commit,
                    library_name="sfumato",
                    tqdm_class=bar,
                )
        for name, size in lacking.items():
            if (came := (repo.snapshot / name).stat().st_size) != size:
                raise Failed(
                    f"{repo.id}: {name} has {came:,} bytes, not the {size:,} that the Hub lists. Delete "
                    f"{repo.snapshot / name} and give the same command again."
                )
    reference = home(repo.id, repo.kind) / "refs" / (repo.id.revision or "main")
    if reference.name != repo.commit and repo.snapshot.is_dir():
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(repo.commit, encoding="utf-8")
    return repo.snapshot


@contextmanager
def _bar(title: str, files: Mapping[str, int]) -> Iterator[Any]:
    """A line, and on a terminal one bar of all bytes; what is yielded stands for each file's bar."""
    from huggingface_hub import constants
    from tqdm import tqdm

    total = sum(files.values())
    many = f"{len(files)} file{'s' * (len(files) != 1)}, {size_text(total)}"
    quiet = os.environ.get("RANK", "0") != "0"
    if not quiet:
        print(for_terminal(f"{title}: {many}"), file=sys.stderr, flush=True)
    hidden = quiet or not sys.stderr.isatty() or bool(constants.HF_HUB_DISABLE_PROGRESS_BARS)
    with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=hidden) as whole:

        class Part:
            """What `huggingface_hub` takes for the bar of a file: adds to the whole."""

            def __init__(self, *args: Any, initial: int = 0, **options: Any) -> None:
                whole.update(initial)

            def __enter__(self) -> "Part":
                return self

            def __exit__(self, *problem: object) -> None:
                pass

            def update(self, count: float | None = 1) -> None:
                """So many bytes more."""
                whole.update(count or 0)

            def close(self) -> None:
                """The whole goes on."""

            def __getattr__(self, name: str) -> Callable[..., None]:
                if name.startswith("set_"):
                    return lambda *args, **options: None
                raise AttributeError(name)

        yield Part


def size_text(count: float) -> str:
    """Bytes in words: "3.4 GB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"


def modelscope_snapshot(repo: RepoId, allow: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """The files of a ModelScope repository that fit the patterns, fetched by its own library into its cache.

    Raises:
        Refused: the package modelscope is missing, or it cannot fetch this.
    """
    try:
        from modelscope import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Refused(
            f"{repo} is fetched with the package modelscope, which is not installed: pip install "
            "'sfumato[modelscope]'."
        ) from None
    given: dict[str, Any] = {"revision": repo.revision} if repo.revision else {}
    if is_offline():
        given["local_files_only"] = True
    try:
        found = snapshot_download(
            repo.name, allow_patterns=list(allow), ignore_patterns=list(ignore) or None, **given
        )
    except Exception as problem:  # the package documents none of its errors
        said = " ".join(str(problem).split())[:200]
        raise Refused(f"{repo} cannot be fetched ({type(problem).__name__}: {said}).") from problem
    return Path(found)
