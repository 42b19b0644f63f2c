"""Which of two experts a LoRA's file is for: Wan 2.2 A14B has one for much noise and one for little.

A pair of files belongs to the pair of networks. Which is whose is said by the first of these that speaks:
FILE@high, FILE@low or FILE@both; keys of `transformer_2`; our own header; high or low in the file's name, as
the community writes it (`…_high_noise`, `…-LOW`); the ending `_2` of our own exports. A file of which nothing
says it is the first network's, as diffusers' `load_lora_weights` takes it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import Refused
from sfumato.models.files import HEADER

EXPERTS = ("high", "low", "both")
"""What may follow @: the network for much noise, that for little, each of them."""
SECOND = "transformer_2."
"""Before a key: of the second network, as diffusers calls it."""
EXPERT_HEADER = "sfumato.expert"
WORDS = re.compile(
    r"(?<![a-z])(high|low)(?:[-_ .]*noise|(?![a-z])(?![-_ "
    "]*(?:rank|res|vram|poly|key|light|quality|fps|angle|cfg|detail)))"
)
"""high or low in a file's name, as of noise and not of something else."""


def split_expert(file: Path | str) -> tuple[Path, str]:
    """(the file, the expert it is said to be for or ""), of FILE or FILE@EXPERT."""
    said = str(file)
    path, at, word = said.rpartition("@")
    if at and word in EXPERTS and not Path(said).expanduser().exists():
        return Path(path).expanduser(), word
    return Path(said).expanduser(), ""


def expert_of(path: Path, keys: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """high or low: what a file says of itself.

    Raises:
        Refused: its name says both.
    """
    if metadata.get(EXPERT_HEADER) in EXPERTS:
        return metadata[EXPERT_HEADER]
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", path.stem).lower()
    if not WORDS.search(name):
        name = path.stem.lower()
    found = {word.group(1) for word in WORDS.finditer(name)}
    if len(found) > 1:
        raise Refused(
            f"{path} says both high and low: which of the two networks is it for? Write {path.name}@high, "
            f"{path.name}@low or {path.name}@both."
        )
    if found:
        return found.pop()
    first = path.with_name(f"{path.stem.removesuffix('_2')}{path.suffix}")
    is_pair = HEADER in metadata or first.is_file() or path.stem == "pytorch_lora_weights_2"
    return "low" if path.stem.endswith("_2") and is_pair else "high"
