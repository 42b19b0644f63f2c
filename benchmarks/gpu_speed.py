"""How fast are steps on this device, beside diffusers' own loop, and how much memory do they take?

Parts "speed" and "memory" of `gpu.py`, which says how to call it. Networks are those of well-known models in
their real sizes with random weights, so that nothing is fetched; inputs are encodings in memory, the same for
both loops. A row says samples a second, model FLOPs utilization, the peak of memory, waits and launches a
step, and the share of a traced step in which the device was idle. Ratios are of two rows at equal footing:
the same dtypes, threads, versions and settings.
"""

import argparse
import contextlib
import itertools
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sfumato.models.codecs.image import PixelCodec
from sfumato.models.condition import Condition
from sfumato.models.interface import Model
from sfumato.models.io import adapter_run
from sfumato.models.lora.adapter import AdapterPlan
from sfumato.models.networks import blocks, quantized
from sfumato.models.networks.dit import DiT
from sfumato.models.pretrained.families import families
from sfumato.models.pretrained.stages import PretrainedDenoiser
from sfumato.models.text.encoder import NoConditioner
from sfumato.run_folder import RunFolder
from sfumato.theory import get
from sfumato.training.device import release_cached_memory, wait_for
from sfumato.training.estimate.memory import predict_step
from sfumato.training.loop.loop import fit
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.settings import TrainSettings

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RANK, WARM, TRACED, SAMPLES = 16, 4, 2, 16
TERAFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "3090": 71, "T4": 65}
"""Peak of dense bf16 (T4: fp16) products, from the makers' data sheets."""


@dataclass(frozen=True)
class Size:
    """A network in the size of a well-known model, and what it is asked.

    kind: of diffusers, with config; family: who asks it. latents: of a sample; told: its condition's tensors.
    """

    kind: str
    config: dict[str, Any]
    family: str
    latents: tuple[int, ...]
    told: dict[str, tuple[int, ...]]
    batch: int


UNET = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
SIZES = {
    "sd15": Size("UNet2DConditionModel", {
                     "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
                 "StableDiffusion", (4, 64, 64), {"tokens": (77, 768)}, 8),
    "sdxl": Size("UNet2DConditionModel", UNET | {
                     "sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
                     "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
                     "use_linear_projection": True, "addition_embed_type": "text_time",
                     "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
                 "StableDiffusionXL", (4, 128, 128),
                 {"tokens": (77, 2048), "pooled": (1280,), "time_ids": (6,)}, 4),
    "sd35": Size("SD3Transformer2DModel", {
                     "sample_size": 128, "num_layers": 24, "attention_head_dim": 64,
                     "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
                     "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "out_channels": 16,
                     "in_channels": 16, "qk_norm": "rms_norm",
                     "dual_attention_layers": tuple(range(13))},
                 "StableDiffusion3", (16, 128, 128), {"tokens": (333, 4096), "pooled": (2048,)}, 2),
    "flux": Size("FluxTransformer2DModel", {"guidance_embeds": True}, "Flux", (16, 128, 128),
                 {"tokens": (512, 4096), "pooled": (768,)}, 1),
    "qwen": Size("QwenImageTransformer2DModel", {}, "QwenImage", (16, 128, 128), {"tokens": (256, 3584)}, 1),
    "wan": Size("WanTransformer3DModel", {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960,
                                          "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256},
                "Wan", (16, 13, 60, 104), {"tokens": (512, 4096)}, 1),
    "dit": Size("", {"width": 1024, "depth": 24, "heads": 16, "patch": 2}, "", (16, 32, 32),
                {"tokens": (77, 768), "pooled": (768,)}, 32),
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "norm_num_groups": 8},
    "sdxl": {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1, "layers_per_block": 1,
             "attention_head_dim": 8, "norm_num_groups": 8},
    "sd35": {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128,
             "dual_attention_layers": ()},
    "flux": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
    "qwen": {"num_layers": 1, "num_attention_heads": 2},
    "wan": {"num_layers": 1, "num_attention_heads": 2, "ffn_dim": 64},
    "dit": {"width": 64, "depth": 2, "heads": 2},
}  # fmt: skip
SPEED: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("sd15", "lora", "bfloat16", {}),
    ("sd15", "full", "float32", {}),
    ("sdxl", "lora", "bfloat16", {}),
    ("sdxl", "full", "float32", {"gradient_checkpointing": 1}),
    ("sd35", "lora", "bfloat16", {"gradient_checkpointing": 1}),
    ("flux", "lora", "bfloat16", {"gradient_checkpointing": 1}),
    ("qwen", "lora", "bfloat16", {"gradient_checkpointing": 1}),
    ("wan", "lora", "bfloat16", {"gradient_checkpointing": 1}),
    ("wan", "full", "float32", {"gradient_checkpointing": 1}),
)
"""(size, what is trained, dtype of the frozen weights, settings), measured in both loops."""
OURS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("dit", "full", "float32", {}),
    ("dit", "full", "float32", {"compile": True}),
    ("sd15", "full", "float32", {"ema": 0.999}),
    ("sd15", "full", "float32", {"ema": 0.999, "ema_snapshot_every": 500}),
    ("sd15", "full", "float32", {"weight_dtype": "bf16"}),
    ("sd15", "full", "float32", {"optimizer": "adafactor"}),
    ("sd15", "full", "float32", {"optimizer": "muon"}),
    ("sd15", "full", "float32", {"weighting": "min-snr"}),
    ("flux", "lora", "nf4", {"gradient_checkpointing": 1}),
    ("flux", "lora", "int8", {"gradient_checkpointing": 1}),
    ("flux", "lora", "bfloat16", {"gradient_checkpointing": 1, "offload": True}),
)
"""What ours can do besides, and what it costs."""
QUICK = (("sd15", "lora"), ("sdxl", "lora"), ("flux", "lora"), ("wan", "lora"), ("dit", "full"))
FEW_BITS = ("int8", "nf4")
CAPS = (8, 12, 16, 24, 48)
"""GB of smaller GPUs, tried by allowing torch no more."""


class Enough(Exception):
    """All is measured."""


@dataclass
class Watch:
    """Called after each step: measures some, then traces a few, then raises `Enough`."""

    device: torch.device
    batch: int
    steps: int
    done: int = 0
    began: float = 0.0
    seconds: float = 0.0
    peak: int = 0
    traced: dict[str, float] = field(default_factory=dict)
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __call__(self, *_: Any, **__: Any) -> None:
        self.done += 1
        on_gpu = self.device.type == "cuda"
        if self.done == WARM:
            wait_for(self.device)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
            self.began = time.perf_counter()
        if self.done == WARM + self.steps:
            wait_for(self.device)
            self.seconds = (time.perf_counter() - self.began) / self.steps
            self.peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else 0
            if not on_gpu:
                raise Enough
            self._trace()
        if self.done == WARM + self.steps + TRACED:
            self._read_trace()
            raise Enough

    def _trace(self) -> None:
        self._said = self._open.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        self._profile = self._open.enter_context(
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        )
        self._window = time.perf_counter()

    def _read_trace(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        wait_for(self.device)
        window = time.perf_counter() - self._window
        waits = sum("synchroniz" in str(one.message) for one in self._said)
        self._open.close()
        spans = sorted(
            (one.time_range.start, one.time_range.end)
            for one in self._profile.events() or ()
            if str(one.device_type).endswith("CUDA")
        )
        busy, until = 0.0, 0.0
        for start, end in spans:
            busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
        self.traced = {
            "waits a step": waits / TRACED,
            "launches a step": len(spans) / TRACED,
            "idle share while traced": round(1 - busy / 1e6 / window, 3),
        }


class Samples:
    """Random encodings in memory."""

    def __init__(self, size: Size) -> None:
        draw = torch.Generator().manual_seed(1)
        self.ids, self.names = list(range(SAMPLES)), [str(one) for one in range(SAMPLES)]
        self.latents = torch.randn(SAMPLES, *size.latents, generator=draw)
        self.rows = [
            {name: torch.randn(shape, generator=draw) for name, shape in size.told.items()} for _ in self.ids
        ]
        self.null = {name: torch.zeros(shape) for name, shape in size.told.items()}

    def __len__(self) -> int:
        return SAMPLES

    def read(self, indices: Any, seed: int, epoch: int) -> Any:
        """Some of them, as the store gives them."""
        rows = [self.rows[one] for one in indices]
        return SimpleNamespace(
            ids=list(indices), latents=self.latents[list(indices)], conditions=rows,
            captions=[""] * len(rows),
            time_ids=torch.full((len(rows), 6), 512.0),
        )  # fmt: skip


class Bench:
    """The rows of one call, on one device."""

    def __init__(self, said: argparse.Namespace) -> None:
        self.device = torch.device(said.device)
        self.tiny, self.quick = said.tiny, said.quick
        self.steps = 2 if said.tiny else 6 if said.quick else 16
        self.flops: dict[tuple[str, str], int] = {}
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        self.peak = next((1e12 * value for word, value in TERAFLOPS.items() if word in name), None)

    def speed(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Each size in both loops, and what ours can do besides; a ratio after each pair."""
        found: dict[str, Callable[[], dict[str, Any]]] = {}
        rates: dict[str, dict[str, Any]] = {}
        for name, train, base, how in SPEED:
            if self.leaves_out(name, train):
                continue
            title = f"speed {name} {train} {base}"
            for who, work in (("diffusers", self.theirs), ("ours", self.ours)):
                found[f"{title} {who}"] = partial(
                    self.measured, work, rates, title, who, name, train, base, how
                )
            found[f"{title} ratio"] = partial(ratio, rates, title)
        for name, train, base, how in OURS:
            if not self.leaves_out(name, train):
                told = " ".join(f"{key}={value}" for key, value in how.items())
                found[f"speed {name} {train} {base} ours {told}".strip()] = partial(
                    self.measured, self.ours, {}, "", "ours", name, train, base, how
                )
        return found

    def memory(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What is predicted beside what was measured, and the smallest GPU that is enough."""
        rows = [*SPEED, *OURS[-3:]]
        return {
            f"memory {name} {train} {base} {' '.join(how)}".strip(): partial(
                self.fits, name, train, base, how
            )
            for name, train, base, how in rows
            if not self.leaves_out(name, train)
        }

    def leaves_out(self, name: str, train: str) -> bool:
        """Whether a quick call does not measure it."""
        return self.quick and (name, train) not in QUICK

    # ------------------------------------------------------------------ rows

    def measured(
        self, work: Any, rates: Any, title: str, who: str, name: str, train: str, base: str, how: Any
    ) -> dict[str, Any]:
        """A row of one loop."""
        release_cached_memory()
        watch = work(name, train, base, how)
        flops = self.flops.get((name, train), 0)
        row = {
            "samples a second": round(watch.batch / watch.seconds, 3),
            "ms a step": round(1e3 * watch.seconds, 2),
            "TFLOP a step": round(flops / 1e12, 3) or None,
            "MFU": round(flops / watch.seconds / self.peak, 3) if self.peak and flops else None,
            "peak GB": round(watch.peak / 1e9, 2) or None,
            **watch.traced,
            "footing": footing(self.precision(how), base, how),
        }
        rates.setdefault(title, {})[who] = row
        return {key: value for key, value in row.items() if value is not None}

    def fits(self, name: str, train: str, base: str, how: dict[str, Any]) -> dict[str, Any]:
        """Predicted and measured bytes of a step; the smallest of the caps in which steps go through."""
        release_cached_memory()
        predicted = self.predicted(name, train, base, how)
        row: dict[str, Any] = {"predicted GB": round(predicted / 1e9, 2)}
        if self.device.type != "cuda":
            return row | {"left out": "measured on GPUs alone"}
        watch = self.ours(name, train, base, how)
        row |= {"measured GB": round(watch.peak / 1e9, 2), "ratio": round(predicted / watch.peak, 3)}
        row["smallest GPU, GB"] = next(
            (cap for cap in CAPS if self.goes_through(cap, name, train, base, how)), None
        )
        assert abs(row["ratio"] - 1) < 0.1, row
        return row

    def goes_through(self, cap: int, *asked: Any) -> bool:
        """Whether steps go through with no more than so many GB."""
        total = torch.cuda.mem_get_info(self.device)[1]
        try:
            self.ours(*asked, share=min(1.0, cap * 1e9 / total))
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
        return True

    # ------------------------------------------------------------------ loops

    def precision(self, how: dict[str, Any]) -> str:
        """What both loops compute in: bf16 on GPUs, float32 on CPUs."""
        return "auto" if "weight_dtype" in how else "bf16" if self.device.type == "cuda" else "fp32"

    def size(self, name: str) -> Size:
        """The size, or a tiny one of its kind."""
        size = SIZES[name]
        if not self.tiny:
            return size
        latents = (*size.latents[:-2], 8, 8) if len(size.latents) == 3 else (size.latents[0], 3, 8, 8)
        told = {one: (4, shape[1]) if one == "tokens" else shape for one, shape in size.told.items()}
        return Size(size.kind, size.config | TINY[name], size.family, latents, told, min(size.batch, 2))

    def network(self, name: str, base: str) -> nn.Module:
        """The network on the device, with random weights, which nobody had on the host."""
        size = self.size(name)
        torch.manual_seed(0)
        if not size.kind:
            told = size.told["tokens"][1]
            return DiT(size.latents[0], text_width=told, pooled_width=told, **size.config).to(self.device)
        torch.set_default_dtype(torch.float32 if base == "float32" else torch.bfloat16)
        try:
            with self.device:
                return getattr(diffusers, size.kind)(**size.config)
        finally:
            torch.set_default_dtype(torch.float32)

    def learner(self, name: str, train: str, base: str, how: dict[str, Any]) -> tuple[Any, Any]:
        """(denoiser, theory) as a run prepares them."""
        size, network = self.size(name), self.network(name, base)
        if not size.kind:
            return network, get("flow-matching")
        family = {type(one).__name__: one for one in families().values()}[size.family]
        denoiser = PretrainedDenoiser(family, network)
        theory = family.theory(diffusers.DDPMScheduler(**BETAS))  # type: ignore[arg-type]
        if train == "lora":
            network.requires_grad_(False)
            adapter_run.attach(denoiser, AdapterPlan(rank=RANK))
            widen(network)
            denoiser.compute_dtype = quantized.quantize_frozen(network, base)
            if base in FEW_BITS:  # what is not stored in few bits is wide, as a run has it
                network.float()
        if how.get("gradient_checkpointing"):
            blocks.recompute(network, how["gradient_checkpointing"])
        if how.get("offload") and self.device.type == "cuda":
            blocks.offload_blocks(network, self.device)
        if how.get("compile"):
            blocks.compile_blocks(network, self.device)
        return denoiser, theory

    def objective(self, name: str, denoiser: Any, theory: Any, how: dict[str, Any]) -> Any:
        """(objective, settings) of a run on encodings in memory."""
        size = self.size(name)
        codec = PixelCodec()
        codec.latent_channels = size.latents[0]  # type: ignore[misc]
        model = Model(theory, codec, NoConditioner(), denoiser)
        known = {"ema": 0.0, "ema_snapshot_every": 0, "validate_every": 0, "sanity": False} | how
        settings = TrainSettings(
            steps=10**6,
            batch=size.batch,
            save_every=10**9,
            log_every=10,
            precision=self.precision(how),
            **known,
        )
        order = SimpleNamespace(
            at=lambda step: ([(step * size.batch + i) % SAMPLES for i in range(size.batch)], 0)
        )
        return DiffusionObjective(model, Samples(size), order, settings, 0), settings  # type: ignore[arg-type]

    def ours(self, name: str, train: str, base: str, how: dict[str, Any], share: float = 1.0) -> Watch:
        """Steps of `fit`, which may take this share of the device's memory."""
        denoiser, theory = self.learner(name, train, base, how)
        release_cached_memory()
        if share < 1:
            torch.cuda.set_per_process_memory_fraction(share, self.device)
        objective, settings = self.objective(name, denoiser, theory, how)
        watch = Watch(self.device, settings.batch, self.steps)
        with contextlib.suppress(Enough), tempfile.TemporaryDirectory() as place:
            run = RunFolder.create(Path(place) / "run")
            fit(objective, denoiser, settings, run, progress=watch, say=lambda _: None)
        return watch

    def predicted(self, name: str, train: str, base: str, how: dict[str, Any]) -> int:
        """The bytes of a step as `sfumato plan` counts them."""
        denoiser, theory = self.learner(name, train, base, how)
        objective, settings = self.objective(name, denoiser, theory, how)
        x, clock, condition = next(inputs_of(objective, self.size(name), self.device))
        return predict_step(denoiser, (x, clock, condition), settings).memory.peak

    def theirs(self, name: str, train: str, base: str, how: dict[str, Any]) -> Watch:
        """Steps of diffusers' scripts (train_text_to_image, train_dreambooth_lora_*), inputs cached."""
        from accelerate import Accelerator
        from peft import LoraConfig

        size, network = self.size(name), self.network(name, base)
        family = {type(one).__name__: one for one in families().values()}[size.family]
        precision = "bf16" if self.precision(how) == "bf16" else "no"
        accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision=precision)
        if train == "lora":
            network.requires_grad_(False)
            targets = list(family.lora_targets)
            network.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))  # type: ignore[operator]
        if how.get("gradient_checkpointing"):
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        weights = widen(network.train())
        samples, betas = Samples(size), diffusers.DDPMScheduler(**BETAS)  # type: ignore[arg-type]
        rows = [{"x": x, **row} for x, row in zip(samples.latents, samples.rows, strict=True)]
        loader = torch.utils.data.DataLoader(rows, shuffle=True, batch_size=size.batch)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=1e-2)
        network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
        watch = Watch(self.device, size.batch, self.steps)
        frozen = torch.bfloat16 if base == "bfloat16" else torch.float32

        def loss_of(given: dict[str, Tensor]) -> Tensor:
            x = given["x"]
            noise, s = torch.randn_like(x), torch.randn(len(x), device=x.device).sigmoid()
            told = Condition({key: one.to(frozen) for key, one in given.items() if key != "x"})
            if size.kind == "UNet2DConditionModel":
                t: Tensor = torch.randint(0, 1000, (len(x),), device=x.device)
                noisy, target, clock = betas.add_noise(x, noise, t), noise, t  # type: ignore[arg-type]
            else:
                share = s.view(-1, *[1] * (x.ndim - 1))
                noisy, target = torch.lerp(x, noise, share), noise - x
                clock = s if family.timestep_input == "share of noise" else 1000 * s
            with accelerator.autocast():
                out = family.predict(network, noisy.to(frozen), clock, told)
            return nn.functional.mse_loss(out.float(), target.float())

        with contextlib.suppress(Enough):
            for given in itertools.chain.from_iterable(itertools.repeat(loader)):
                counts = (name, train) not in self.flops
                with FlopCounterMode(display=False) if counts else contextlib.nullcontext() as counter:
                    loss = loss_of(given)
                    accelerator.gather(loss.repeat(size.batch)).mean().item()  # type: ignore[union-attr]
                    accelerator.backward(loss)
                if counter is not None:
                    self.flops[name, train] = counter.get_total_flops()
                accelerator.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                watch()
        return watch


def widen(network: nn.Module) -> list[nn.Parameter]:
    """What is trained, in float32, as both loops train it."""
    trained = [one for one in network.parameters() if one.requires_grad]
    for one in trained:
        one.data = one.data.float()
    return trained


def inputs_of(objective: Any, size: Size, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Condition]]:
    """The network's inputs in a step."""
    some = objective.encoded.read(list(range(size.batch)), 0, 0)
    x = some.latents.to(device)
    times = torch.full((size.batch,), 0.5, dtype=torch.float64)
    clock = objective.model.theory.clock(times).float().to(device)
    told = {name: torch.stack([row[name] for row in some.conditions]).to(device) for name in size.told}
    yield x, clock, Condition(told)


def footing(precision: str, base: str, how: dict[str, Any]) -> dict[str, Any]:
    """What two rows must share to be compared."""
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return {"precision": precision, "frozen": base, "threads": torch.get_num_threads(), **versions, **how}


def ratio(rates: dict[str, dict[str, Any]], title: str) -> dict[str, Any]:
    """Ours over theirs, where both stand on the same footing."""
    pair = rates.get(title, {})
    assert pair.keys() == {"ours", "diffusers"}, "one of the two was not measured"
    assert pair["ours"]["footing"] == pair["diffusers"]["footing"], "they differ in more than the loop"
    rate = {who: row["samples a second"] for who, row in pair.items()}
    return {"ours over diffusers": round(rate["ours"] / rate["diffusers"], 3)}
