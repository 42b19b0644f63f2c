"""Families of clips beside their diffusers pipelines: largest differences of answer, codec, guided clip.

    python benchmarks/video_parity.py [--out benchmarks/results/video_parity.json]

Tiny random checkpoints, made and asked exactly as tests/families/test_parity.py does: the same noise, times
and guidance, four steps; answers in their own unit, pixels in [0, 1] (the codec's in [-1, 1]).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import sfumato
from families import test_parity as parity
from families.zoo import NEGATIVE, PROMPT, ZOO


def compared(name: str, folder: Path) -> dict[str, float | str]:
    """The three differences of one family."""
    drawn = parity.drawing(ZOO[name], name, folder / name)
    model, call = sfumato.load(drawn.folder), ZOO[name].call
    condition = model.denoiser.guidance.embed_guidance(parity.embed_guidance(model, drawn), drawn.guidance)
    start = parity.start_of(model, drawn)
    answer = parity.ours(model, start, drawn.times[0], condition, model.denoiser.network)[0]
    pixels = torch.rand(1, 3, call["num_frames"], 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = model.encode(pixels)
    with torch.no_grad():
        code = drawn.pipe.vae.encode(pixels)
        raw = code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latent
        again = model.codec.network.decode(raw).sample
    seen: list[torch.Tensor] = []
    decode = model.decode
    model.decode = lambda x, *pieces: seen.append(decode(x, *pieces)) or seen[-1]
    model.generate(
        prompt=[PROMPT], negative=NEGATIVE if ZOO[name].negative else None, steps=parity.STEPS,
        guidance=drawn.guidance, height=call["height"], width=call["width"], frames=call["num_frames"],
        times=drawn.times, solver="euler", latents=start, **parity.options_of(model, drawn, drawing=True),
    )  # fmt: skip
    clip = (parity.shown(seen[0]).flatten() - parity.shown(drawn.pixels).flatten()).abs().max()
    return {
        "family": name, "pipeline": type(drawn.pipe).__name__,
        "answer": min(float((answer - row).abs().max()) for row in drawn.answers[0]),
        "codec": float((decode(latents) - again).abs().max()), "clip": float(clip),
    }  # fmt: skip


def main() -> None:
    """Compare all, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video_parity.json"))
    asked, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder, parity.pictures.small():
        for name in (name for name, case in ZOO.items() if "num_frames" in case.call):
            rows.append(compared(name, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    asked.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
