"""An export made ready for the Hub, and sent: weights, a model card, and the pictures that the card shows.

What leaves is a list of files that is shown first. No path of this machine, no picture and no caption of the
data is among them: prompts are those that the recipe itself says.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato import hub
from sfumato.errors import Failed, Refused
from sfumato.models.io import adapter_run
from sfumato.models.locate import weights_of
from sfumato.recipe import DEFAULT, Recipe
from sfumato.run_folder import RunFolder
from sfumato.settings import plain, toml
from sfumato.workflow.export.compare import Exported

CARD, PICTURES = "README.md", "images"
LEFT_OUT = ("output", "data.train", "data.cache_dir", "data.class_images", "model.new_tokens", "model.codec")
"""Keys of a recipe that name places."""


@dataclass(frozen=True)
class Upload:
    """What would leave: the files of a folder for a repository.

    `files` are {name: bytes}; nothing else of the folder is sent.
    """

    repo: str
    folder: Path
    files: Mapping[str, int]
    private: bool = False


def prepare_upload(
    run: Path,
    exported: Exported,
    folder: Path,
    repo: str,
    private: bool = False,
    triggers: Sequence[str] = (),
) -> Upload:
    """Write a model card and its pictures beside an export for diffusers; nothing leaves.

    Args:
        folder: that the export was written to. repo: `owner/name`.
        triggers: words that call what was learned.
    Raises:
        Refused: no such name. Failed: a file would tell where it was made.
    """
    known = hub.parse(repo)
    if known is None or known.revision or known.file or known.of_modelscope:
        raise Refused(f'--push "{repo}" is no name of a repository. Write owner/name.')
    path, checkpoint = weights_of(run)
    _forget_places(folder)
    shutil.rmtree(folder / PICTURES, ignore_errors=True)
    shown = list(_pictures(path, checkpoint, folder)) if (path / "effective.toml").is_file() else []
    text = model_card(path, exported, repo, shown, triggers)
    (folder / CARD).write_text(text, encoding="utf-8")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    for file in files:
        _must_not_tell(file, [path, folder, Path.home()])
    return Upload(repo, folder, {f.relative_to(folder).as_posix(): f.stat().st_size for f in files}, private)


def upload(ready: Upload, message: str = "Trained with sfumato") -> str:
    """Send the listed files as one commit; returns the repository's address.

    Raises:
        Refused: the token may not write there. Failed: the connection broke off.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    repo = hub.parse(ready.repo)
    assert repo is not None
    if hub.is_offline():
        raise Refused("Nothing is sent while you are offline (HF_HUB_OFFLINE). Unset it.")
    with hub.explained(repo):
        api = HfApi(library_name="sfumato")
        url = api.create_repo(ready.repo, private=ready.private or None, exist_ok=True)
        adds = [CommitOperationAdd(name, str(ready.folder / name)) for name in ready.files]
        api.create_commit(ready.repo, adds, commit_message=message)
    return str(url)


def model_card(
    run: Path,
    exported: Exported,
    repo: str,
    shown: Sequence[tuple[str, str, int]] = (),
    triggers: Sequence[str] = (),
) -> str:
    """The card of an export: metadata that the Hub reads, and what somebody who uses it wants to know.

    Args:
        shown: (file in the repository, prompt, seed) of pictures.
    """
    from huggingface_hub import ModelCard, ModelCardData

    said = dict(exported.metadata)
    base = base_of_run(run)
    recipe = Recipe.read(run) if (run / "effective.toml").is_file() else None
    is_adapter = bool(said.get("kind"))
    is_video = recipe is not None and bool(recipe.data.frames)
    words = [word for word in (recipe.data.trigger_words if recipe else "", *triggers) if word]
    more: dict[str, Any] = (
        {"widget": [{"text": p, "output": {"url": f}} for f, p, _ in shown]} if shown else {}
    )
    if words:
        more["instance_prompt"] = ", ".join(words)
    if base:
        more["base_model_relation"] = "adapter" if is_adapter else "finetune"
    data = ModelCardData(
        base_model=base.get("hub"),
        library_name="diffusers",
        pipeline_tag="text-to-video" if is_video else "text-to-image",
        tags=["sfumato", "diffusers", *(["lora", "template:diffusion-lora"] if is_adapter else [])],
        **license_of(run),
        **more,
    )
    parts = [f"# {repo.partition('/')[2]}", _what(said, base, words)]
    if shown:
        parts.append(
            "## Pictures\n\n"
            + "\n\n".join(f"![{_line(p)}]({f})\n*{_line(p)}* (seed {s})" for f, p, s in shown)
        )
    parts.append("## How to draw with it\n\n" + _usage(repo, base, is_adapter, words, shown))
    if recipe is not None:
        events = RunFolder.open(run).events()
        parts += [_training(said, recipe, events), _numbers(events)]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(one for one in parts if one) + "\n"))


def base_of_run(run: Path) -> dict[str, str]:
    """{hub, commit} of the Hub's model that a run began on; empty for any other."""
    found = adapter_run.hub_commit(run / "model")
    if found or not (run / "effective.toml").is_file():
        return found
    named = hub.parse(Recipe.read(run).model.base)
    return {} if named is None else {"hub": named.name, "commit": named.revision or "main"}


def license_of(run: Path) -> dict[str, str]:
    """{license, license_name, license_link} that the base's own card says; empty where it says none."""
    from huggingface_hub import metadata_load

    if (run / "model" / adapter_run.BASE).is_file():
        place = adapter_run.read_base(run / "model")[0]
    else:
        named = hub.parse(base_of_run(run).get("hub", ""))
        place = (hub.cached(named) if named is not None else None) or run
    card = place / CARD
    try:
        said = (metadata_load(card) or {}) if card.is_file() else {}
    except Exception as problem:  # YAML's own errors: somebody else's card
        raise Failed(f"{card} cannot be read ({problem}). Mend it, or remove it.") from problem
    return {name: str(said[name]) for name in ("license", "license_name", "license_link") if said.get(name)}


def _what(said: Mapping[str, str], base: Mapping[str, str], words: Sequence[str]) -> str:
    kind = said.get("kind") or "whole model"
    of = f"[{base['hub']}](https://huggingface.co/{base['hub']})" if base else f"a {said['pipeline']}"
    at = f" at commit `{base['commit']}`" if base else ""
    text = f"A {kind} of {of}{at}, trained for {said['steps']} steps at {said['resolution']} pixels."
    if words:
        text += f"\n\n**Trigger words:** `{', '.join(words)}`"
    return text


def _usage(
    repo: str,
    base: Mapping[str, str],
    is_adapter: bool,
    words: Sequence[str],
    shown: Sequence[tuple[str, str, int]],
) -> str:
    prompt = json.dumps(shown[0][1] if shown else ", ".join(words) or "a picture", ensure_ascii=False)
    lines = ["import torch", "from diffusers import DiffusionPipeline", ""]
    name = base.get("hub", "BASE") if is_adapter else repo
    lines.append(f'pipe = DiffusionPipeline.from_pretrained("{name}", torch_dtype=torch.bfloat16).to("cuda")')
    lines += [f'pipe.load_lora_weights("{repo}")'] * is_adapter
    lines.append(f"pipe({prompt})")
    ours = f"sfumato generate {repo} --prompt {prompt}"
    return "```python\n" + "\n".join(lines) + "\n```\n\n```sh\n" + ours + "\n```"


def _training(said: Mapping[str, str], recipe: Recipe, events: Sequence[Mapping[str, Any]]) -> str:
    """The recipe without its places, and the data in numbers."""
    lines = []
    for name, value in recipe.values().items():
        if recipe.origin(name) == DEFAULT or name in LEFT_OUT or _names_a_place(value):
            continue
        lines.append(f"{name} = {toml(plain(value))}")
    data = next((one["summary"] for one in reversed(events) if one["kind"] == "data"), {})
    counts = [
        f"{name.replace('_', ' ')}: {data[name]}"
        for name in ("samples", "captions", "held_out")
        if isinstance(data.get(name), int)
    ]
    plan = [
        f"{name}: {said[name]}" for name in ("rank", "alpha", "targets", "theory", "steps") if name in said
    ]
    text = "## Training\n\n```toml\n" + "\n".join(lines) + "\n```"
    text += f"\n\nPlan: {'; '.join(plan)}." if plan else ""
    return text + (f"\n\nData (not included): {', '.join(counts)}." if counts else "")


def _numbers(events: Sequence[Mapping[str, Any]]) -> str:
    """The run's newest losses and metrics, with their standard errors."""
    rows: dict[str, str] = {}
    for one in events:
        if one["kind"] == "validation" and isinstance(one.get("loss"), float):
            split = str(one.get("split", "held_out")).replace("_", " ")
            rows[f"loss, {split}"] = (
                f"{one['loss']:.4g} ± {one.get('error') or 0:.2g} | {one.get('step', '')}"
            )
        if one["kind"] == "evaluation":
            for name, found in one["metrics"].items():
                value, error = found.get("value"), found.get("error")
                if isinstance(value, int | float):
                    rows[name.replace("_", " ")] = f"{value:.4g} ± {error or 0:.2g} | {one.get('step', '')}"
    if not rows:
        return ""
    head = "## Numbers\n\n| measured | value ± standard error | step |\n|---|---|---|\n"
    return head + "\n".join(f"| {name} | {said} |" for name, said in rows.items())


def _pictures(run: Path, checkpoint: Path | None, folder: Path) -> Iterator[tuple[str, str, int]]:
    """The newest pictures of the prompts that the recipe says, copied; (file, prompt, seed) of each."""
    prompts = Recipe.read(run).sample.prompts
    step = int(match[1]) if checkpoint and (match := re.search(r"step-(\d+)$", checkpoint.name)) else None
    found: dict[str, tuple[Path, int]] = {}
    for one in RunFolder.open(run).events():
        if one["kind"] == "pictures" and not one.get("group") and (step is None or one["step"] <= step):
            for name, prompt, seed in zip(one["files"], one["prompts"], one["seeds"], strict=True):
                if prompt in prompts and (run / name).is_file():
                    found[prompt] = (run / name, int(seed))
    for number, (prompt, (file, seed)) in enumerate(found.items()):
        name = f"{PICTURES}/{number:02d}{file.suffix}"
        (folder / PICTURES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / name)
        yield name, prompt, seed


def _forget_places(folder: Path) -> None:
    """diffusers writes into configs where a model lay when it was loaded; that is nobody's business."""
    for file in folder.rglob("*.json"):
        said = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(said, dict) and _names_a_place(said.get("_name_or_path")):
            del said["_name_or_path"]
            file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _must_not_tell(file: Path, places: Sequence[Path]) -> None:
    """Raises Failed where the words of a file name a place on this machine."""
    with file.open("rb") as opened:
        if file.suffix == ".safetensors":
            words = opened.read(int.from_bytes(opened.read(8), "little"))
        else:
            words = opened.read()
    for place in places:
        told = str(place.absolute()).encode()
        if len(told) > 1 and re.search(re.escape(told) + rb"(?![\w-])", words):
            raise Failed(f"{file} names {place.absolute()}, a place on this machine; nothing was sent.")


def _names_a_place(value: Any) -> bool:
    """Whether a value is, or holds, an absolute path."""
    if isinstance(value, Mapping):
        return any(_names_a_place(one) for pair in value.items() for one in pair)
    if isinstance(value, list | tuple):
        return any(_names_a_place(one) for one in value)
    return isinstance(value, str | os.PathLike) and Path(str(value)).expanduser().is_absolute()


def _line(text: str) -> str:
    """A prompt as one line of Markdown."""
    return re.sub(r"([\[\]*_`<>!\\|])", r"\\\1", " ".join(text.split()))
