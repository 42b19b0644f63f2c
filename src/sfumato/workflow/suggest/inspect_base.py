"""What a base is like, as far as a recipe depends on it: its JSON and the heads of its files are read."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import Refused, explain_malformed, nearest
from sfumato.models import hub_files, locate
from sfumato.models.files import read_json
from sfumato.models.io import adapter_run
from sfumato.models.io.model import described_by
from sfumato.models.pretrained.pipeline_folder import INDEX, check_parts, family_of
from sfumato.models.size_limits import WeightCounts
from sfumato.readers import media
from sfumato.recipe import EFFECTIVE, Recipe

LARGE, CLIPS = 1024, 480
RATES = {"Wan": 16, "LTX": 24, "HunyuanVideo": 24, "CogVideoX": 8, "Mochi": 30}
"""Frames a second that pipelines of clips draw, by what their names begin with."""
FRAMES = 25
"""One and a multiple of the frames (4, 6 or 8) that share a latent in the video families."""


@dataclass(frozen=True)
class BaseFacts:
    """What a recipe depends on.

    kind: scratch, pipeline (a diffusers folder, or a single file beside one), run (of a network of our own,
    or a folder that holds one); resolution: pixels a side that it draws; frames, fps: of its clips, 0 for
    pictures; parameters: of its denoiser, 0 if unknown; recipe: that of the run.
    """

    kind: str = "scratch"
    name: str = ""
    resolution: int = 0
    frames: int = 0
    fps: float = 0.0
    parameters: int = 0
    recipe: Recipe | None = None

    def __str__(self) -> str:
        """In words, for whoever waits for the recipe."""
        clips = f", clips of {self.frames} frames" if self.frames else ""
        size = f", {self.parameters / 1e9:.2g} billion weights" if self.parameters > 5e7 else ""
        return f"{self.name or self.kind}: draws {self.resolution} pixels a side{clips}{size}"


def inspect_base(base: str) -> BaseFacts:
    """Look at a base.

    Raises:
        Refused: it is none, or nothing that is known.
    """
    if base == "scratch":
        return BaseFacts()
    place = Path(base).expanduser()
    if place.suffix == ".safetensors" and not place.is_dir():
        return pipeline_facts(described_by(place, None), [place])
    path, _ = locate.weights_of(hub_files.descriptions(base))
    if not path.exists():
        beside = [str(one) for one in path.parent.glob("*")] if path.parent.is_dir() else []
        raise Refused(
            f"{base} does not exist. Give --base the folder or the .safetensors file of a model, the folder "
            f"of a run, or scratch.{nearest(str(path), beside)}"
        )
    if path.is_file():
        described_by(path, None)  # says what a pickle, or whatever else it is, would have to be
    if (path / "model").is_dir() and (path / EFFECTIVE).is_file():
        locate.newest_weights(locate.RunFolder.open(path))
        return run_facts(path)
    if (path / EFFECTIVE).is_file():
        raise Refused(f"{base} is a run that has no model yet. Run `sfumato train {base}` first.")
    if (path / INDEX).is_file():
        check_parts(path, family_of(path))
        return pipeline_facts(path, ())
    if (path / "model.json").is_file():
        return saved_facts(path)
    raise Refused(_no_base(base, path))


def _no_base(base: str, path: Path) -> str:
    """Why a folder is no base, and what was probably meant."""
    if (path.parent / INDEX).is_file() or (path.parent / "model.json").is_file():
        return f"{base} is one part of the model in {path.parent}. Give --base {path.parent}."
    endings = (*media.CLIPS, ".png", ".jpg", ".jpeg", ".webp", ".gif")
    if any(file.suffix.lower() in endings for file in path.rglob("*")):
        return f"{base} holds pictures or clips and no model. Give it as --data, and a model as --base."
    return (
        f"{base} holds no model: neither {INDEX} (a folder in diffusers' layout), nor model.json (one of "
        f"ours), nor {EFFECTIVE} (a run). Give --base one that does, or leave it out."
    )


def run_facts(run: Path) -> BaseFacts:
    """Of a run: what its effective recipe says took effect."""
    recipe = Recipe.read(run)
    data = recipe.data
    kind = "run" if (run / "model" / "model.json").is_file() else "pipeline"
    below = run / "model" / adapter_run.BASE
    if below.is_file():
        with explain_malformed(below, "Copy the run again."):
            kind = inspect_base(str(adapter_run.read_base(run / "model")[0])).kind
    fps = data.fps if data.frames else 0.0
    return BaseFacts(kind, run.name, data.resolution, data.frames, fps, 0, recipe)


def saved_facts(folder: Path) -> BaseFacts:
    """Of a folder that `model.save` wrote."""
    with explain_malformed(folder / "model.json", "Save the model again."):
        info = dict(read_json(folder / "model.json")["info"])
    frames = int(info.get("frames", 0) or 0)
    return BaseFacts("run", folder.name, int(info.get("resolution", 64)), frames, float(info.get("fps", 8.0)))


def pipeline_facts(folder: Path, weights: Iterable[Path]) -> BaseFacts:
    """Of a folder in diffusers' layout.

    Args:
        weights: the files that hold its denoiser, if they are elsewhere.
    """
    name = str(_json(folder / INDEX).get("_class_name", ""))
    network = next(
        (folder / one for one in ("transformer", "unet", "prior") if (folder / one).is_dir()), None
    )
    files = list(weights) or sorted(network.glob("*.safetensors") if network is not None else ())
    rate = next((rate for start, rate in RATES.items() if name.startswith(start)), 0)
    return BaseFacts(
        kind="pipeline",
        name=name,
        resolution=CLIPS if rate else native_resolution(folder, network),
        frames=FRAMES if rate else 0,
        fps=float(rate),
        parameters=WeightCounts.of_files(files).numbers,
    )


def native_resolution(folder: Path, network: Path | None) -> int:
    """Pixels a side that a pipeline draws: its network's latents times what its autoencoder joins."""
    side = _json(network / "config.json").get("sample_size") if network is not None else None
    if not isinstance(side, int):
        return LARGE
    codec = _json(next((folder / one / "config.json" for one in ("vae", "vqvae", "movq")
                        if (folder / one).is_dir()), folder / "vae"))  # fmt: skip
    levels = codec.get("block_out_channels") or codec.get("encoder_block_out_channels") or [1]
    return side * 2 ** (len(levels) - 1)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read, which loading will say in its own words."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
