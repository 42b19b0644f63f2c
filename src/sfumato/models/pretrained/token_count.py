"""Tokens: how much of a caption a model reads, counted by its own tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import Refused
from sfumato.models.text.minilm import MINILM, minilm_folder, token_counting

if TYPE_CHECKING:
    from sfumato.models import Conditioner

MOST = 512
"""What a tokenizer that names no length is taken to read."""
USUAL = 64


@dataclass(frozen=True)
class TokenCounter:
    """Captions → their numbers of tokens, and how many of them are read; what is longer is cut off."""

    count: Callable[[list[str]], list[int]]
    most: int


def of_conditioner(conditioner: "Conditioner", asked: int | None = None) -> TokenCounter | None:
    """How much a model's conditioner reads, by its most patient tokenizer; None if it reads no text.

    Args:
        asked: its `max_sequence_length`, where that is not the usual one.
    """
    from sfumato.models.text.encoder import TextConditioner

    if isinstance(conditioner, TextConditioner):
        most = min(asked or conditioner.max_tokens, conditioner.tokenizer.model_max_length)
        return TokenCounter(_counting(conditioner.tokenizer), int(most))
    components: dict[str, Any] = getattr(getattr(conditioner, "pipe", None), "components", {})
    words: list[Any] = [
        part for name, part in components.items() if name.startswith("tokenizer") and callable(part)
    ]
    if not words:
        return None
    settings = getattr(conditioner, "settings", dict)({})
    asked = int(asked or settings.get("max_sequence_length") or MOST)
    limits = [int(one.model_max_length) if one.model_max_length <= 128 else asked for one in words]
    best = max(range(len(words)), key=lambda i: limits[i])
    return TokenCounter(_counting(words[best]), limits[best])


def of_folder(model: str) -> TokenCounter | None:
    """How much the model in a folder reads: a text encoder, a tokenizer or a diffusers pipeline; or minilm.

    Returns:
        None for "none", and for a MiniLM that is not installed.
    Raises:
        Refused: the folder holds no tokenizer.
    """
    if model == "none":
        return None

    if model == MINILM:
        try:
            return TokenCounter(token_counting(minilm_folder()), USUAL)
        except Refused:
            return None  # nobody asked for it: captions are counted in words
    folder = Path(model).expanduser()
    places = [folder, *sorted(folder.glob("tokenizer*")), folder / "model"]
    kept = [one for one in places if any(one.glob("tokenizer*.json")) or any(one.glob("vocab*"))]
    if not kept:
        raise Refused(
            f"{model} holds no tokenizer. Give --model the folder of a text encoder or of a diffusers "
            "pipeline, or minilm, or none."
        )
    from sfumato.models.text.encoder import tokenizer

    words = tokenizer(kept[0])
    return TokenCounter(_counting(words), min(int(words.model_max_length), MOST))


def _counting(words: Any) -> Callable[[list[str]], list[int]]:
    def count(captions: list[str]) -> list[int]:
        return [len(ids) for ids in words(captions, verbose=False)["input_ids"]] if captions else []

    return count
