"""What a new recipe says of lengths and sizes: for a small model from scratch, or a base that draws."""

import json
from pathlib import Path
from typing import Any

USUAL = {"resolution": 64, "steps": 5000, "batch": 32, "frames": ""}
FROM_A_PIPELINE = {"resolution": 512, "steps": 1500, "batch": 4, "frames": ""}
LARGE, CLIPS = 1024, 480
FRAMES = 25
"""One and a multiple of the frames (4, 6 or 8) that share a latent in the video families."""
OF_SCRATCH = """
frames = 9                  # of a clip; one and a multiple of model.codec_time_stride, which is 2
fps = 8                     # frames a second, whatever rate a file has
short_clip_frames = [1]     # lengths for clips too short for that; 1 makes them stills"""
"""What a recipe from scratch says where there are videos."""
OF_CLIPS = ("Wan", "LTX", "HunyuanVideo", "CogVideoX", "Mochi")


def lengths(base: str, data: str) -> dict[str, Any]:
    """The template's values for this base and these data; reads JSON alone, so that it takes no time."""
    folder = Path(base).expanduser()
    if base == "scratch":
        return {**USUAL, "batch": 16, "frames": OF_SCRATCH} if has_clips(data) else USUAL
    if folder.exists() and not (folder / "model_index.json").is_file():
        return USUAL
    found = dict(FROM_A_PIPELINE)
    index = _json(folder / "model_index.json")
    kind = str(index.get("_class_name", ""))
    if kind.startswith(OF_CLIPS):
        found["resolution"] = CLIPS
        if has_clips(data):
            found["frames"] = (
                f"\nframes = {FRAMES:<18} # of a clip; one and a multiple of what shares a latent"
            )
    elif kind:
        found["resolution"] = side_of(folder)
    return found


def side_of(folder: Path) -> int:
    """Pixels a side that a pipeline draws: its network's latents times what its autoencoder joins."""
    network = next(
        (folder / name / "config.json" for name in ("unet", "transformer") if (folder / name).is_dir()), None
    )
    side = _json(network).get("sample_size") if network is not None else None
    if not isinstance(side, int):
        return LARGE
    levels = _json(folder / "vae" / "config.json").get("block_out_channels") or [1]
    return side * 2 ** (len(levels) - 1)


def has_clips(data: str) -> bool:
    """Whether a folder holds videos."""
    from ..data.media import CLIPS as ENDINGS

    folder = Path(data).expanduser()
    return folder.is_dir() and any(file.suffix.lower() in ENDINGS for file in folder.rglob("*"))


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read, which loading will say in its own words."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
