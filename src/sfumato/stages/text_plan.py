"""What is taught to a model's text encoders, as a plan that is written beside a run's model."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from sfumato.errors import Failed, Refused
from sfumato.record import write_atomic

from . import embeddings
from .adapters import AdapterPlan

FORMAT = 1
FILE = "text.json"


@dataclass(frozen=True)
class TextPlan:
    """What is taught: written beside a run's model, so that it can be taught again.

    Args:
        lora: of the text encoders that diffusers' LoRA loader knows, or None.
        tokens: new words, each with the words whose embeddings it begins with ("" begins at random), or
            the file of an embedding.
        alone: the denoiser stays its base.
    """

    lora: AdapterPlan | None = None
    tokens: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    alone: bool = False

    def __bool__(self) -> bool:
        return self.lora is not None or bool(self.tokens)


def write_plan(folder: Path, plan: TextPlan) -> None:
    """Remember what is taught."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = []
    for number, (word, like) in enumerate(plan.tokens):
        if like.endswith(embeddings.SUFFIX):
            kept = f"word-{number}{embeddings.SUFFIX}"
            if Path(like) != folder / kept:
                write_atomic(folder / kept, Path(like).read_bytes())
            like = kept
        tokens.append((word, like))
    written = {"format": FORMAT, **asdict(plan), "tokens": tokens}
    write_atomic(folder / FILE, json.dumps(written, indent=1))


def read_plan(folder: Path) -> TextPlan | None:
    """What is taught to the text encoders of the model in a folder, if anything.

    Raises:
        Failed: the file is damaged. Refused: a newer sfumato wrote it.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        said = dict(json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError) as problem:
        raise Failed(f"{folder / FILE} is damaged ({problem}). Train the recipe again.") from problem
    if said.get("format", 0) > FORMAT:
        raise Refused(f"{folder / FILE} was written by a newer sfumato. Update sfumato.")
    lora = said.get("lora")
    known = {one.name for one in fields(AdapterPlan)}
    adapter = (
        AdapterPlan(**{**{k: v for k, v in lora.items() if k in known}, "targets": tuple(lora["targets"])})
        if lora
        else None
    )
    tokens = tuple(
        (word, str(folder / like) if like.endswith(embeddings.SUFFIX) else like)
        for word, like in said["tokens"]
    )
    return TextPlan(adapter, tokens, said["seed"], said["alone"])
