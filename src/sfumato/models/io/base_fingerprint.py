"""A fingerprint of a base's files, taken in moments: a run knows whether its base is still that one.

A small file is hashed whole. Of a large one: its size, its header (names, shapes, dtypes, places) and some
bytes at the beginning, middle and end of every tensor, so that also one changed layer of 60 GB is seen.
"""

import json
import struct
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from sfumato.errors import Refused
from sfumato.models.lora.experts import split_expert
from sfumato.models.pretrained.pipeline_folder import family_of, left_out, read_index

WHOLE = 32 << 20
"""Files up to so many bytes are hashed whole."""
PIECE = 512
"""Bytes that are looked at, of each place of a large file."""
HEADER_BYTES = 100 << 20
"""What a header of safetensors has at most."""
KINDS = (".safetensors", ".json", ".txt", ".model")


def file_fingerprint(file: Path) -> str:
    """16 letters that change with a file; of a large one with its size, header and sampled bytes."""
    size, digest = file.stat().st_size, sha256()
    digest.update(str(size).encode())
    with file.open("rb") as opened:
        if size <= WHOLE:
            digest.update(opened.read())
        else:
            for place in _places(opened, size, digest):
                opened.seek(place)
                digest.update(opened.read(PIECE))
    return digest.hexdigest()[:16]


def _places(opened: BinaryIO, size: int, digest: Any) -> list[int]:
    """Where to look into a large file: three places of each tensor, or places spread over it."""
    first = opened.read(8)
    (length,) = struct.unpack("<Q", first.ljust(8, b"\0"))
    header = opened.read(length) if length <= min(HEADER_BYTES, size - 8) else b""
    digest.update(header)
    try:
        entries = [one["data_offsets"] for name, one in json.loads(header).items() if name != "__metadata__"]
        spans = [(8 + length + int(a), 8 + length + int(b)) for a, b in entries]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        spans = [(size * i // 256, size * (i + 1) // 256) for i in range(256)]
    return sorted({max(a, min(at, b - PIECE)) for a, b in spans for at in (a, (a + b) // 2, b)})


def base_fingerprint(base: Path, info: Mapping[str, Any]) -> dict[str, str]:
    """{file: fingerprint} of all that a pipeline's folder gives a model, and of LoRA files merged into it.

    Args:
        info: what the model remembers: `merge_loras` {file: weight}.
    """
    index = read_index(base)
    unused = left_out(index, family_of(base))
    names = [one for one, entry in index.items() if isinstance(entry, list) and one not in unused]
    files = [
        file for name in sorted(names) for file in sorted((base / name).glob("*")) if file.suffix in KINDS
    ]
    found = {file.relative_to(base).as_posix(): file_fingerprint(file) for file in files if file.is_file()}
    merged = info.get("merge_loras", {})
    for said in merged if isinstance(merged, Mapping) else ():
        path, _ = split_expert(said)
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file.absolute())] = file_fingerprint(file)
    return found


def check_base(folder: Path, base: Path, known: Mapping[str, str]) -> None:
    """Compare a base with what a run wrote down of it; a run of an older version wrote nothing down.

    Raises:
        Refused: naming the file that is another one now.
    """
    for name, before in known.items():
        file = base / name  # an absolute name stays itself
        if file.is_file() and file_fingerprint(file) == before:
            continue
        what = "was changed" if file.is_file() else "is gone"
        raise Refused(
            f"{folder.parent} was trained on {base}, but {name} of it {what} since: its answers would be "
            "others. "
            f'Put that base back, or write the place of a copy of it into {folder / "base.json"} ("base"); '
            'or, if it is meant, delete "fingerprint" there.'
        )
