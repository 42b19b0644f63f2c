"""Which files of a Hub repository a model needs, and where they are once they came.

Of a diffusers pipeline: the components that its family uses, from safetensors, one variant, nothing of other
layouts. Of a LoRA, an IP-Adapter or a ControlNet: its weights and what describes them.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from sfumato import hub, paths
from sfumato.errors import Failed, Refused
from sfumato.hub import Repo, RepoId
from sfumato.models.files import PICKLES, read_json

INDEX, OWN, CARD = "model_index.json", "model.json", "README.md"
LORA = "pytorch_lora_weights.safetensors"
DESCRIBES = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken")
"""Endings of the files that describe a component: configs, tokenizers, templates."""
VARIANT = re.compile(
    r"(?P<stem>(?:diffusion_pytorch_)?model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.safetensors"
)
"""Names of weights in one file or in shards, plain or of a variant."""
Unused = Callable[[Mapping[str, Any]], Collection[str]]
"""A pipeline's index → those of its components that its family does not use."""
MOST_DESCRIBED = 1 << 24
"""Bytes of a file that only describes."""
DUPLICATES = ("*.fp16*", "*.bf16*", "*.fp8*", "*.non_ema*", "*.ema*")
"""Variants, where a listing of the repository is not to be had."""


def nothing(index: Mapping[str, Any]) -> Collection[str]:
    """No component is left out."""
    return ()


def component_files(names: Iterable[str], variant: str = "") -> list[str]:
    """Of the files of one component those that are read: what describes it, and its weights once.

    Plain weights come before a variant, one file before its shards.

    Args:
        variant: which one where there are no plain weights; otherwise the first by name.
    """
    found = sorted(names)
    indices = [name for name in found if ".index." in name and name.endswith(".json")]
    kept = [name for name in found if name.endswith(DESCRIBES) and name not in indices]
    weights: dict[str, list[str]] = {}
    for name in found:
        if word := VARIANT.fullmatch(PurePosixPath(name).name):
            weights.setdefault(word["variant"] or "", []).append(name)
    if not weights:
        return kept + [name for name in found if name.endswith(".safetensors")]
    chosen = "" if "" in weights else variant if variant in weights else min(weights)
    whole = [name for name in weights[chosen] if not re.search(r"-\d+-of-\d+", name)]
    if whole:
        return sorted([*kept, *whole])
    end = (
        (f".index.{chosen}.json", f".{chosen}.safetensors.index.json")
        if chosen
        else ".safetensors.index.json"
    )
    lists = [name for name in indices if name.endswith(end) and (chosen or name.count(".") == 3)]
    return sorted([*kept, *weights[chosen], *lists])


def of_pipeline(
    index: Mapping[str, Any], names: Iterable[str], variant: str = "", unused: Unused = nothing
) -> list[str]:
    """The files of a diffusers pipeline that its family reads.

    Raises:
        Refused: a component has its weights as pickles alone, or not at all.
    """
    listed, kept = list(names), [INDEX]
    for name in _components(index, unused):
        inside = [one for one in listed if one.startswith(f"{name}/")]
        files = component_files(inside, variant)
        if f"{name}/config.json" in inside and not name.startswith("tokenizer"):
            pickles = [one for one in inside if one.endswith(PICKLES)]
            if not any(one.endswith(".safetensors") for one in files):
                held = f"only {pickles[0]}, a pickle, which can run code" if pickles else "no weights"
                raise Refused(
                    f"Its {name}/ holds {held}; weights are read from .safetensors. Choose a revision that "
                    "has them, or convert it: load it with diffusers and save_pretrained(FOLDER)."
                )
        kept += files
    return kept + [CARD] * (CARD in listed)


def _components(index: Mapping[str, Any], unused: Unused) -> list[str]:
    """The components of a pipeline that are read."""
    left_out = set(unused(index))
    listed = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    return [name for name in listed if not name.startswith("_") and name not in left_out]


def wanted(repo: Repo, variant: str = "", unused: Unused = nothing) -> list[str]:
    """The files of a repository that are read, what its index says included; fetches descriptions alone.

    Raises:
        Refused: nothing there is a model, a LoRA or a control module; or pickles alone.
    """
    names = list(repo.sizes)
    if repo.id.file:
        beside = [one for one in ("adapter_config.json", CARD) if one in names]
        return [_known(repo, repo.id.file), *beside, *_encoder_beside(repo)]
    if INDEX in names:
        index = read_json(hub.fetch(repo, [INDEX]) / INDEX)
        try:
            return of_pipeline(index, names, variant, unused)
        except Refused as problem:
            raise Refused(f"{repo.id}: {problem}") from None
    top = [one for one in names if "/" not in one]
    if OWN in names:
        return [one for one in names if one.endswith((".safetensors", *DESCRIBES))]
    if "config.json" in top:
        return [*component_files(top, variant), *[CARD] * (CARD in top)]
    weights = [one for one in top if one.endswith(".safetensors")]
    chosen = [LORA] if LORA in weights else weights
    if len(chosen) == 1:
        return wanted(replace(repo, id=replace(repo.id, file=chosen[0])))
    if chosen:
        raise Refused(
            f"{repo.id} holds {len(chosen)} files of weights: name one, as {repo.id}/{chosen[0]}. "
            f"There are {', '.join(chosen[:6])}."
        )
    pickled = next((one for one in names if one.endswith(PICKLES)), "")
    held = f"its weights are a pickle ({pickled}), which can run code" if pickled else "there are no weights"
    raise Refused(f"{repo.id} holds nothing that is read here: {held}; models are read from .safetensors.")


def _known(repo: Repo, file: str) -> str:
    """A file's name, if the repository has it."""
    if file not in repo.sizes:
        have = sorted(one for one in repo.sizes if one.endswith(".safetensors"))
        raise Refused(f"{repo.id} has no {file}. It has {', '.join(have[:6]) or 'no .safetensors'}.")
    return file


def _encoder_beside(repo: Repo) -> list[str]:
    """The image encoder of an IP-Adapter: the folder image_encoder beside its file."""
    place = str(PurePosixPath(repo.id.file).parent / "image_encoder").removeprefix("./")
    return component_files(one for one in repo.sizes if one.startswith(f"{place}/"))


def place(given: Path | str, variant: str = "", unused: Unused = nothing) -> Path:
    """Where a model is: the path as it is given; where there is none, the Hub's repository, once it came.

    Args:
        variant: of weights, where there are no plain ones. unused: the components that are left out.

    Of `owner/name/file.safetensors`, and of a repository that holds one such file alone, the file.

    Raises:
        Refused: offline and not in the cache, gated, not there, or nothing that is read.
        Failed: the connection broke off.
    """
    path, repo = Path(given).expanduser(), hub.parse(str(given))
    if repo is None or path.exists():
        return path
    if wrong := paths.wrong_model(given):  # a run's name that was misspelled is no repository
        raise Refused(wrong)
    if repo.of_modelscope:
        return _inside(_of_modelscope(repo, unused), repo)
    if hub.is_offline() or (len(repo.revision) == 40 and _is_whole(hub.cached(repo), repo, unused)):
        found = hub.cached(repo)
        if found is None or (repo.file and not (found / repo.file).is_file()):
            raise Refused(hub.missing(str(given)))
        return _inside(found, repo)
    try:
        listed = hub.read_repo(repo)
    except Failed:
        if not _is_whole(found := hub.cached(repo), repo, unused) or found is None:
            raise
        return _inside(found, repo)  # as everybody: without a network, what is there
    return _inside(hub.fetch(listed, wanted(listed, variant, unused)), repo)


def local(given: Path | str) -> Path:
    """Where a model is on this machine, the Hub's cache included; the path itself where it is nowhere."""
    path, repo = Path(given).expanduser(), hub.parse(str(given))
    if path.exists() or repo is None or repo.of_modelscope:
        return path
    found = hub.cached(repo)
    return path if found is None else found / repo.file


def descriptions(given: Path | str) -> Path:
    """A folder that describes a model: where it is, else what its repository says of it, fetched alone.

    Raises:
        Refused: offline and not in the cache, gated, or not there. Failed: the connection broke off.
    """
    path, repo = local(given), hub.parse(str(given))
    if path.exists() or repo is None or repo.of_modelscope or paths.wrong_model(given):
        return path
    if hub.is_offline():
        raise Refused(hub.missing(str(given)))
    listed = hub.read_repo(repo)
    files = [name for name, size in listed.sizes.items() if name.endswith(".json") and size < MOST_DESCRIBED]
    return hub.fetch(listed, files)


def _of_modelscope(repo: RepoId, unused: Unused) -> Path:
    """The snapshot of a ModelScope repository; of a pipeline only what is read."""
    if repo.file:
        return hub.modelscope_snapshot(repo, [repo.file, "adapter_config.json", CARD])
    found = hub.modelscope_snapshot(repo, [INDEX, OWN, "config.json"])
    index = read_json(found / INDEX) if (found / INDEX).is_file() else {}
    allowed = [
        f"{name}/*{end}" for name in _components(index, unused) for end in (*DESCRIBES, ".safetensors")
    ]
    top = [f"*{end}" for end in (*DESCRIBES, ".safetensors")] if not index else [INDEX, CARD]
    return hub.modelscope_snapshot(repo, [*top, *allowed], DUPLICATES)


def _inside(snapshot: Path, repo: RepoId) -> Path:
    """What of a snapshot is meant: the file that was named, the only one of a LoRA, else the folder."""
    if repo.file:
        return snapshot / repo.file
    if any((snapshot / name).is_file() for name in (INDEX, OWN, "config.json")):
        return snapshot
    weights = sorted(snapshot.glob("*.safetensors"))
    chosen = [one for one in weights if one.name == LORA] or weights
    return chosen[0] if len(chosen) == 1 else snapshot


def _is_whole(snapshot: Path | None, repo: RepoId, unused: Unused) -> bool:
    """Whether a snapshot holds all that is read of it, as far as can be seen without the Hub."""
    if snapshot is None:
        return False
    inside = _inside(snapshot, repo)
    if not (inside / INDEX).is_file():
        return inside.is_file() or (inside.is_dir() and next(inside.glob("*.safetensors"), None) is not None)
    names = [one.relative_to(inside).as_posix() for one in inside.rglob("*") if one.is_file()]
    try:
        index = read_json(inside / INDEX)
        files = of_pipeline(index, names, unused=unused)
    except (Refused, Failed):
        return False
    shards = [one for one in files if one.endswith(".index.json")]
    listed = {
        str(PurePosixPath(one).parent / part)
        for one in shards
        for part in json.loads((inside / one).read_text(encoding="utf-8")).get("weight_map", {}).values()
    }
    homes = {PurePosixPath(one).parts[0] for one in names if "/" in one}
    return listed <= set(names) and set(_components(index, unused)) <= homes


def commit_of(place: Path) -> dict[str, str]:
    """{hub: owner/name, commit} of what lies in the Hub's cache; empty for any other place."""
    for part in (place, *place.parents):
        if part.parent.name == "snapshots" and part.parent.parent.name.startswith("models--"):
            name = part.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
            return {"hub": name, "commit": part.name}
    return {}


def plan_fetch(given: Sequence[str], unused: Unused = nothing) -> dict[str, dict[str, Any]]:
    """{id: {commit, files, size, bytes}} of what these ids would bring; no weights are fetched.

    Raises:
        Refused, Failed: as `place`.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in given:
        repo = hub.parse(one)
        if repo is None or repo.of_modelscope or Path(one).expanduser().exists() or hub.is_offline():
            continue
        listed = hub.read_repo(repo)
        files = wanted(listed, unused=unused)
        lacking = hub.absent(listed, files)
        if lacking:
            found[one] = hub.summary(listed, lacking)
    return found
