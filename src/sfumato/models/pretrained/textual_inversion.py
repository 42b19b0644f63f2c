"""New words that others learned (textual inversion), read from their files and added to a model.

    diffusers   <cat>: [N, D]                     one tensor under the word itself
    A1111       emb_params: [N, D]                the word is the file's name
    SDXL        clip_l: [N, D], clip_g: [N, D]    one for each encoder; the word is the file's name

Source: Gal et al. 2022, arXiv:2208.01618; the conventions of diffusers, A1111, ComfyUI and sd-scripts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.files import HEADER, digest, must_be_safetensors

SUFFIX = ".safetensors"
CLIPS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
PARAMS = "emb_params"


def name_elsewhere(pipe: Any, home: str) -> str:
    """What others call an encoder in a file of embeddings."""
    is_t5 = type(getattr(pipe, home)).__name__.startswith(("T5", "UMT5"))
    return "t5xxl" if is_t5 else CLIPS.get(home, home)


def parse_embedding(said: str) -> tuple[str, str]:
    """(word, file) of WORD=FILE or FILE; without a word it is the file's own."""
    word, equals, file = said.partition("=")
    return (word.strip(), file.strip()) if equals and not Path(said).is_file() else ("", said)


def read_embedding(file: Path | str) -> tuple[str, dict[str, Tensor]]:
    """(the word it is for, its rows [N, D] by the file's own names).

    Raises:
        Refused: no such file, a pickle, tensors that are no embeddings.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise Refused(f"{path} does not exist. Give the file of an embedding (.safetensors).")
    must_be_safetensors(path, "load it with torch.load and save its tensor with safetensors as emb_params")
    try:
        with safe_open(path, "pt") as opened:
            seal = dict(opened.metadata() or {}).get(HEADER, "")
            rows = {key: opened.get_tensor(key) for key in sorted(opened.keys())}
    except (OSError, SafetensorError) as problem:
        raise Refused(f"{path} is damaged ({problem}). Copy it again.") from problem
    if seal not in ("", digest(rows)):
        raise Refused(f"{path} is damaged: it does not have the checksum it was written with. Copy it again.")
    several = {*CLIPS.values(), "t5xxl"}
    strange = [key for key, one in rows.items() if one.ndim not in (1, 2) or not one.is_floating_point()]
    if not rows or strange or (len(rows) > 1 and not rows.keys() <= several):
        odd = next(iter(strange or sorted(rows.keys() - several)), "nothing")
        raise Refused(
            f'{path} is no embedding of a word: it holds "{odd}", not one tensor, or clip_l and clip_g. '
            "A LoRA is given as --lora."
        )
    only = next(iter(rows))
    word = path.stem if len(rows) > 1 or only in {PARAMS, *several} else only
    return word, {key: one.float().reshape(-1, one.shape[-1]) for key, one in rows.items()}


def rows_by_encoder(pipe: Any, encoders: Mapping[str, nn.Module], file: Path | str) -> dict[str, Tensor]:
    """The rows of a file by the name of the encoder they are for.

    Raises:
        Refused: rows of another width, or for an encoder that is not there.
    """
    rows = read_embedding(file)[1]
    widths = {name: one.get_input_embeddings().weight.shape[1] for name, one in encoders.items()}  # type: ignore[operator]
    known = {name_elsewhere(pipe, name): name for name in encoders}
    found = {}
    for key, one in rows.items():
        fits = [name for name, width in widths.items() if width == one.shape[1]]
        homes = [known[key]] if key in known else fits if len(rows) == 1 else []
        if len(homes) > 1:
            raise Refused(
                f"{file} does not say for which of {', '.join(homes)} it is: all have {one.shape[1]} numbers "
                f"a token. Name its tensor {' or '.join(name_elsewhere(pipe, name) for name in homes)}."
            )
        if not homes or homes[0] not in fits:
            raise Refused(
                f'{file} is of another base: "{key}" has {one.shape[1]} numbers a token, but the text '
                f"encoders here have {', '.join(f'{n} ({w})' for n, w in widths.items())}."
            )
        found[homes[0]] = one
    return found
