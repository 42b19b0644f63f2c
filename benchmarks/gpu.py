"""Does sfumato hold on this GPU, how fast is it, how much memory does it take? One command, nothing fetched.

    python benchmarks/gpu.py [--device cuda] [--quick] [--tiny] [--only WORD,…] [--out DIR]

Each check and each measurement is one line of JSON, also in DIR/gpu-PART.jsonl: its name, whether it holds,
what was measured. The parts are "correctness", "speed" beside diffusers' own loop, and "memory": what is
predicted beside what is taken, and the smallest GPU that is enough (`gpu_speed.py`). `--only` takes the lines
whose part or name contains one of the words. `--quick` leaves out what takes minutes, `--device cpu --tiny`
tries the script itself. Needs `pip install -e .[test] accelerate`.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_speed
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import sfumato
from sfumato.models.networks import dit
from sfumato.models.networks.quantized import dequantize, quantize
from sfumato.run_folder import RunFolder
from sfumato.theory import noise
from sfumato.training.optim.optimizers import OPTIMIZERS
from sfumato.training.state import posthoc_ema

USUAL = {
    "data.held_out": "0.0",
    "data.resolution": "32",
    "model.codec": "pixels",
    "model.patch": "4",
    "train.batch": "8",
    "train.steps": "4",
    "train.warmup_steps": "1",
    "train.log_every": "1",
    "train.validate_every": "0",
    "train.sanity": "false",
    "train.save_every": "1000",
    "sample.every": "0",
    "sample.steps": "4",
}
SLOW = ("optimizer came", "optimizer ademamix", "option train.compile=true")


class Checks:
    """The checks of one call, on one device."""

    def __init__(self, said: argparse.Namespace, home: Path) -> None:
        self.device, self.home = said.device, home
        width, depth = (32, 1) if said.tiny else (256, 4)
        self.network = {"model.width": str(width), "model.depth": str(depth), "model.heads": "2"}

    def every(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """The checks by name."""
        found: dict[str, Callable[[], dict[str, Any]]] = {
            "noise": self.noise,
            "codes of few bits": self.codes,
            "canvas twice": self.canvas,
            "averages on the device and in host memory": self.averages,
        }
        for kind in ("dit", "unet"):
            found[f"cpu and device {kind}"] = lambda kind=kind: self.devices(kind)
            for precision in ("fp32", "bf16"):
                found[f"resume {kind} {precision}"] = lambda k=kind, p=precision: self.resume(k, p)
        for name, spec in OPTIMIZERS.items():
            if not spec.is_paged:
                found[f"optimizer {name}"] = lambda name=name: self.option(f"train.optimizer={name}")
        for keys in (
            "train.weight_dtype=bf16",
            "train.weight_dtype=bf16-masters",
            "train.gradient_checkpointing=1",
            "train.gradient_accumulation=4 train.sanity=true",
            "train.exact_elastic=true",
            "train.timestep_importance_sampling=true train.weighting=min-snr",
            "train.sequence_packing=true data.buckets=4",
            "model.codec=auto model.codec_steps=4 train.weight_dtype=bf16",
            "train.compile=true",
        ):
            found[f"option {keys}"] = lambda keys=keys: self.option(*keys.split())
        return found

    # ------------------------------------------------------------------ what is asked

    def noise(self) -> dict[str, Any]:
        """The device draws what the host draws, but for the last bit of a logarithm."""
        mine, host = (
            noise.normal((16, 64, 64), 7, range(4), device=one).cpu() for one in (self.device, "cpu")
        )
        assert difference(mine, host) < 1e-6
        return {"difference": difference(mine, host), "equal": float((mine == host).double().mean())}

    def codes(self) -> dict[str, Any]:
        """Codes made on the device are the host's, and mean the same."""
        weight, found = torch.randn(256, 512), {}
        for form in ("int8", "fp8", "nf4"):
            here, there = quantize(weight, form), quantize(weight.to(self.device), form)
            wide = [dequantize(*one, (256, 512), torch.float32).cpu() for one in (here, there)]
            found[form] = difference(*wide)
            assert found[form] < 1e-5, found
        return found

    def canvas(self) -> dict[str, Any]:
        """The gradient of the canvas has the same bits twice."""
        gradients = []
        for _ in range(2):
            torch.manual_seed(0)
            x = torch.randn(4, 64, 4, 4).to(self.device).requires_grad_()
            seed = torch.randn(4, 64, 24, 16).to(self.device)
            (dit.interpolate(x, (24, 16)) * seed).sum().backward()
            assert x.grad is not None
            gradients.append(x.grad.cpu())
        assert torch.equal(*gradients)
        return {}

    def averages(self) -> dict[str, Any]:
        """What is kept in host memory is what is kept on the device."""
        kept, share, interval = [], posthoc_ema.DEVICE_SHARE, posthoc_ema.LONGEST_INTERVAL
        try:
            posthoc_ema.LONGEST_INTERVAL = 1
            for posthoc_ema.DEVICE_SHARE in (1.0, 0.0):
                name = f"averages-{posthoc_ema.DEVICE_SHARE}"
                run, _ = self.run(name, "train.ema_snapshot_every=2", "train.deterministic=true")
                kept.append({k: v for k, v in tensors_of(run).items() if k.startswith("power-")})
        finally:
            posthoc_ema.DEVICE_SHARE, posthoc_ema.LONGEST_INTERVAL = share, interval
        worst = max(difference(one, kept[1][name]) for name, one in kept[0].items())
        assert worst < 1e-5, worst
        return {"difference": worst}

    def devices(self, kind: str) -> dict[str, Any]:
        """CPU and device have the same losses and draw the same pictures, but for rounding."""
        keys = self.of_kind(kind, "train.precision=fp32")
        (mine, here), (_, host) = self.run(f"{kind}-a", *keys), self.run(f"{kind}-b", *keys, device="cpu")
        drawn = [
            mine.model(device=one).generate(["a circle"], seed=1, steps=6)[0].convert("RGB").tobytes()
            for one in (self.device, "cpu")
        ]
        levels = sum(abs(a - b) for a, b in zip(*drawn, strict=True)) / len(drawn[0])
        found = {
            "losses differ by": difference(torch.tensor(here), torch.tensor(host)),
            "gray levels": levels,
        }
        assert found["losses differ by"] < 2e-3 and levels < 1, found
        return found

    def resume(self, kind: str, precision: str) -> dict[str, Any]:
        """A run that was stopped, and one that is repeated, end with the same bits."""
        keys = self.of_kind(kind, f"train.precision={precision}", "train.save_every=3", "train.ema=0.9")
        keys += ("train.deterministic=true",)
        names = [f"{kind}-{precision}-{end}" for end in ("whole", "again", "parts")]
        self.run(names[2], *keys, "train.steps=3")
        whole, again, parts = (tensors_of(self.run(name, *keys, "train.steps=6")[0]) for name in names)
        twice, stopped = ([k for k in whole if not torch.equal(whole[k], one[k])] for one in (again, parts))
        found = {"differ twice": len(twice), "differ when stopped": len(stopped), "of": len(whole)}
        assert not twice and not stopped, found | {"first": [*twice, *stopped][:2]}
        return found

    def option(self, *keys: str) -> dict[str, Any]:
        """Training goes through and what it leaves draws."""
        try:
            run, losses = self.run("-".join(keys).replace("=", "-"), *keys)
        except sfumato.Refused as refusal:
            if "is not installed" not in str(refusal):
                raise
            return {"left out": str(refusal)}
        run.model(device=self.device).generate(["a circle"], steps=2)
        assert all(loss == loss for loss in losses), losses
        return {"losses": [round(loss, 4) for loss in losses]}

    # ------------------------------------------------------------------ how

    def of_kind(self, kind: str, *keys: str) -> tuple[str, ...]:
        """The keys of one of our denoisers."""
        more = ("model.width=32", "model.depth=2") if kind == "unet" else ()
        return (f"model.denoiser={kind}", *more, *keys)

    def pictures(self) -> Path:
        """Sixteen pictures of two kinds."""
        folder = self.home / "pictures"
        if not folder.is_dir():
            folder.mkdir()
            for index in range(16):
                name = ("circle", "square")[index % 2]
                Image.effect_noise((8, 8), 90).resize((48, 32 + 8 * (index % 3))).convert("RGB").save(
                    folder / f"{index}.png"
                )
                (folder / f"{index}.txt").write_text(f"a {name}")
        return folder

    def run(self, name: str, *keys: str, device: str = "") -> tuple[Any, list[float]]:
        """Train; the run, and its losses."""
        recipe = self.home / f"{name}.toml"
        recipe.write_text("")
        said = USUAL | self.network | dict(key.split("=", 1) for key in keys)
        said |= {"data.train": str(self.pictures()), "train.device": device or self.device}
        said |= {"output": str(self.home / "runs" / name), "data.cache_dir": str(self.home / "cache")}
        run = sfumato.train(recipe, [f"{key}={value}" for key, value in said.items()], say=lambda _: None)
        events = RunFolder.open(run.path).events()
        return run, [one["loss"] for one in events if one["kind"] == "step"]


def tensors_of(run: Any) -> dict[str, Tensor]:
    """All tensors of a run's last checkpoint."""
    files = sorted(RunFolder.open(run.path).checkpoint_folders()[-1].glob("*.safetensors"))
    return {f"{file.stem}/{name}": one for file in files for name, one in load_file(file).items()}


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    one, other = one.double().cpu(), other.double().cpu()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def parts(said: argparse.Namespace, home: Path) -> dict[str, dict[str, Callable[[], dict[str, Any]]]]:
    """What is asked, by part."""
    bench = gpu_speed.Bench(said)
    return {"correctness": Checks(said, home).every(), "speed": bench.speed(), "memory": bench.memory()}


def answer(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The line of one check or measurement."""
    began = time.perf_counter()
    try:
        row = {"name": name, "holds": True, **work()}
    except Exception as problem:
        at = [
            f"{Path(one.filename).name}:{one.lineno}" for one in traceback.extract_tb(problem.__traceback__)
        ]
        row = {
            "name": name,
            "holds": False,
            "why": f"{type(problem).__name__}: {problem}"[:500],
            "at": at[-4:],
        }
    return row | {"seconds": round(time.perf_counter() - began, 2)}


def main() -> int:
    """Run what is asked; 1 if something does not hold."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--device", default="cuda")
    ask.add_argument("--only", default="correctness,speed,memory")
    ask.add_argument("--out", type=Path, default=Path())
    ask.add_argument("--quick", action="store_true")
    ask.add_argument("--tiny", action="store_true")
    said = ask.parse_args()
    said.out.mkdir(parents=True, exist_ok=True)
    words, failed = said.only.split(","), 0
    with tempfile.TemporaryDirectory() as home:
        for part, asked in parts(said, Path(home)).items():
            asked = {
                name: work for name, work in asked.items() if any(word in f"{part} {name}" for word in words)
            }
            if not asked:
                continue
            with (said.out / f"gpu-{part}.jsonl").open("w", encoding="utf-8") as file:
                for name, work in asked.items():
                    if said.quick and name in SLOW:
                        continue
                    row = answer(name, work)
                    failed += not row["holds"]
                    for place in (sys.stdout, file):
                        print(json.dumps(row), file=place, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
