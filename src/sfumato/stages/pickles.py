"""Only safetensors are read: a pickle can run anything when it is opened."""

from pathlib import Path

from sfumato.errors import Refused

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
CONVERT = "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)"


def must_be_safetensors(file: Path, convert: str = CONVERT) -> None:
    """Raises Refused for a file of any other kind; `convert` says how a pickle is made one that is read."""
    if file.suffix == ".safetensors":
        return
    if file.suffix not in PICKLES:
        raise Refused(f"{file} is no .safetensors file, and only those are read. Give one of that kind.")
    raise Refused(
        f"{file} is a pickle, which can run anything when it is opened; only safetensors are read. "
        f"Convert it where you trust it: {convert}."
    )
