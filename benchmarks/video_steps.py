"""What a frame costs: encoding, a training step (whole and LoRA), an evaluation, decoding.

    python benchmarks/video_steps.py [--out benchmarks/results/video_steps.json]

The network and codec of `sfumato demo --task video`, and each family of clips that draws from words on the
tiny checkpoints of tests/families. CPU milliseconds a frame on one thread, medians of five; two clips at
once, of the demo 16 as it is trained; a step is forward, backward and AdamW. Of the tiny ones most
is what each layer costs to be called.
"""

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from video import cpu

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from families import clips  # noqa: F401 - puts them into the zoo
from families.zoo import ZOO
from sfumato import load
from sfumato.data.sources import moving_shapes
from sfumato.demo.video import PLANS
from sfumato.generation import as_pipeline
from sfumato.models import new_codec, new_conditioner, new_model
from sfumato.models.lora import adapter
from sfumato.theory import noise

BATCH, DEMO = 2, 16


def of_demo() -> tuple[Any, dict[str, int]]:
    """The demo's model with weights of no matter, and the size of its clips."""
    settings, frames = PLANS["moving-shapes"].recipe.model, moving_shapes.FRAMES
    made = as_pipeline(
        new_model(settings, new_codec(settings, clips=True), new_conditioner(settings), frames=frames)
    )
    return made, {"frames": frames, "height": 32, "width": 32}


def of_family(name: str, folder: Path) -> tuple[Any, dict[str, int]]:
    """A tiny checkpoint and the size of its clips."""
    ZOO[name].make(name).save_pretrained(folder / name)
    call = ZOO[name].call
    return load(folder / name), {
        "frames": call["num_frames"],
        "height": call["height"],
        "width": call["width"],
    }


def step_of(model: Any, x: torch.Tensor, t: torch.Tensor, condition: Any) -> Any:
    """A training step of whatever of the network learns."""
    learning = [one for one in model.denoiser.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-6, fused=True)

    def step() -> None:
        model.predict(x, t, condition).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(model: Any, size: dict[str, int], batch: int) -> dict[str, float]:
    """Milliseconds a frame of each work, on so many clips at once."""
    frames, height, width = size["frames"], size["height"], size["width"]
    pixels = noise.normal((3, frames, height, width), 0, range(batch)).clamp(-1, 1)
    with torch.no_grad():
        x, condition = model.encode(pixels), model.condition(["a red circle moving left"] * batch)
    t = torch.full((batch,), 0.5 * model.theory.t_noise)

    def quietly(work: Any) -> Any:
        return torch.no_grad()(work)

    model.denoiser.requires_grad_(True)
    works = {
        "encode": quietly(lambda: model.encode(pixels)), "step": step_of(model, x, t, condition),
        "evaluation": quietly(lambda: model.predict(x, t, condition)),
        "decode": quietly(lambda: model.decode(x)),
    }  # fmt: skip
    each = 1000 / batch / frames
    found = {name: round(cpu(work) * each, 3) for name, work in works.items()}
    narrow = copy.deepcopy(model)
    narrow.denoiser.requires_grad_(False)
    adapter.attach(
        adapter.peft_target(narrow.denoiser),
        adapter.AdapterPlan("lora", rank=4),
        narrow.denoiser.lora_targets,
    )
    return {**found, "lora_step": round(cpu(step_of(narrow, x, t, condition)) * each, 3)}


def main() -> None:
    """Measure all, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/video_steps.json"))
    asked, rows = parser.parse_args(), []
    torch.set_num_threads(1)
    names = [name for name, case in ZOO.items() if "num_frames" in case.call and not case.call.get("image")]
    with tempfile.TemporaryDirectory() as folder:
        for name in ["demo", *names]:
            model, size = of_demo() if name == "demo" else of_family(name, Path(folder))
            if getattr(model.conditioner, "image_arguments", ()):
                continue
            weights, batch = (
                sum(one.numel() for one in model.denoiser.parameters()),
                DEMO if name == "demo" else BATCH,
            )
            took = measured(model, size, batch)
            rows.append({"network": name, **size, "batch": batch, "weights": weights, "ms_per_frame": took})
            print(json.dumps(rows[-1]), flush=True)
    asked.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
