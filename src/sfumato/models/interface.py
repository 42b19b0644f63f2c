"""A model is three stages and a theory: codec, conditioner, denoiser.

pixels  → codec       → latents       (frozen, once, offline)
prompts → conditioner → condition     (frozen, once, offline)
(x_t, t, condition) → denoiser → out  (what is trained)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sfumato.errors import Refused
from sfumato.models.condition import Condition
from sfumato.models.guidance_policy import GuidancePolicy
from sfumato.theory import Theory
from sfumato.theory.convert import translate_inputs
from sfumato.theory.definition import as_float64, upload


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    """What `make` builds with torch's generator at `seed`; the generator's own state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


RENAMED_MEMBERS = {
    "null": "encode_empty",
    "away": "encode_negative",
    "settle": "fit_normalization",
    "packs": "supports_packing",
    "asked": "mask_error",
    "finish": "finalize_latents",
    "grain": "latent_multiple",
    "framing": "micro_conditioning",
    "trains_framing": "trains_micro_conditioning",
    "sees": "image_arguments",
    "placed": "sizes_images",
}
"""{what a stage's member was called before 0.2: what it is called}; stages users wrote then still serve."""
PLAIN = (bool, int, str, tuple)
"""What a stage that users wrote may set under an old name, as `self.grain = 2`."""


class Stage(nn.Module, ABC):
    """A part of a model that can be written down: a kind, a config of plain values, and weights."""

    kind = ""
    own_name = ""
    """`file.py:name` where a user wrote this stage."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        for old, new in RENAMED_MEMBERS.items():
            if old in vars(cls) and new not in vars(cls):
                setattr(cls, new, vars(cls)[old])

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in RENAMED_MEMBERS and isinstance(value, PLAIN):
            object.__setattr__(self, RENAMED_MEMBERS[name], value)

    def write_weights(self, folder: Path, by_name: bool = False) -> dict[str, Any]:
        """Write the weights into a folder; returns what the config says of them there, if anything.

        by_name: of what others made only where it came from.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "weights.safetensors")
        return {}

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Plain values from which `type(self)(**config)` builds the same network."""

    def fingerprint(self) -> str:
        """A hash of kind, config and weights: two stages that answer alike have the same one."""
        digest = sha256(f"{self.kind}{sorted(self.config().items())}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


Kind = TypeVar("Kind", bound=type[Stage])
KINDS: dict[str, type[Stage]] = {}
"""The stages that a folder can name, by their `kind`; whoever defines one registers it."""


def registered(stage: Kind) -> Kind:
    """A class of stages, known from now on by its `kind`."""
    KINDS[stage.kind] = stage
    return stage


class Codec(Stage):
    """Pixels [B, 3, H, W] in [-1, 1] ↔ normalised latents [B, C, H/stride, W/stride]."""

    stride: int
    latent_channels: int
    of_clips = False
    """Whether latents have frames: [B, C, K, h, w]."""
    time_stride: int = 1
    """Frames of a clip that share a latent, the first frame having one of its own."""
    reach: tuple[int, int] | None = None
    """How far `decode` looks around a latent, in latents of space and, backwards, of time; None: anywhere."""

    @abstractmethod
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """The posterior's mode, or with standard normal `noise` (shaped as the latents) a sample."""

    def distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mode and standard deviation of the posterior, both as latents; None where there is no posterior."""
        return self.encode(pixels), None

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels, not clamped."""

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """[C, h, w] of the latents of a picture of this size in pixels."""
        self.check_size(width, height)
        return self.latent_channels, height // self.stride, width // self.stride

    def latent_frames(self, frames: int) -> int:
        """Latents that stand for so many frames of a clip.

        Raises:
            Refused: the frames are not 1 + a multiple of time_stride.
        """
        more = (frames - 1) % self.time_stride
        if more or frames < 1:
            fit = max(1, frames - more)
            raise Refused(
                f"A clip of {frames} frames does not fit this codec, which takes one frame and then "
                f"{self.time_stride} for each latent. Choose {fit} or {fit + self.time_stride} frames."
            )
        return (frames - 1) // self.time_stride + 1

    def pixel_size(self, shape: Sequence[int]) -> dict[str, int]:
        """height, width (and num_frames) of what latents of this shape [C, (F,) h, w] show."""
        return {"height": shape[-2] * self.stride, "width": shape[-1] * self.stride}

    def check_size(self, width: int, height: int, name: str = "The picture") -> None:
        """Raises Refused unless both sides are multiples of `stride`."""
        if width % self.stride or height % self.stride:
            fit = [max(self.stride, side // self.stride * self.stride) for side in (width, height)]
            raise Refused(
                f"{name} is {width}×{height}, but this codec needs sides in multiples of {self.stride}. "
                f"Choose {fit[0]}×{fit[1]}."
            )


class TrainableCodec(Codec):
    """A codec that can be trained from scratch: reconstruction + KL."""

    @abstractmethod
    def prepare(self, pixels: Tensor) -> None:
        """Start from what a sample of the data [N, 3, H, W] shows, before training."""

    @abstractmethod
    def reconstruct(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(pixels again [B, 3, H, W], KL to the standard normal per sample [B]); noise as the latents."""

    @abstractmethod
    def fit_normalization(self, pixels: Tensor) -> None:
        """After training: fix the shift and scale that normalise latents, from a sample of the data."""


class Conditioner(Stage):
    """Prompts, labels or pictures → Condition."""

    image_arguments: tuple[str, ...] = ()
    """Options that show pictures; each holds one for every prompt, or a list of them."""
    learns: bool = False
    """Whether it is trained too: it is then asked in every step, with gradients."""
    sizes_images: bool = False
    """Whether those are seen at the size of what is drawn (the codec's `pixel_size`)."""

    @abstractmethod
    def forward(self, prompt: Sequence[str], **options: Any) -> Condition:
        """The condition of a batch of prompts; raises Refused for an option it does not know."""

    @abstractmethod
    def encode_empty(self, count: int) -> Condition:
        """The condition that says nothing, for guidance and caption dropout."""

    def encode_negative(self, prompt: Sequence[str | None], **options: Any) -> Condition:
        """What guidance leans away from: these prompts, None where none was given."""
        if all(text is None for text in prompt):
            return self.encode_empty(len(prompt))
        return self([text or "" for text in prompt], **options)


def no_context_parallel(name: str) -> str:
    """The sentence about a network whose samples processes cannot share."""
    return (
        "train.context_parallel shares the tokens of a sample among processes, which our own DiT and those "
        f"networks of diffusers that have a plan for it can; {name} cannot. Leave it at 1."
    )


def known_time(theory: Theory) -> float:
    """The time that a frame is told which is not noisy at all: a hundredth of a radian from the data."""
    return float(theory.time_of(torch.tensor(0.01, dtype=torch.float64)))


class Denoiser(Stage):
    """out = network(x_t, what it is told about time, condition)."""

    lora_targets: tuple[str, ...] = ()
    """Ends of the names of the layers that adapters usually go to."""
    micro_conditioning: str = ""
    """The condition's tensor [B, 6] that says how a picture was cut from its file, where that is heard."""
    trains_micro_conditioning: bool = False
    """Whether training tells each picture's own cut, instead of the usual one."""
    latent_multiple: int = 1
    """Sides of latents must be multiples of this."""
    frames_apart: bool = False
    """Whether each frame of a clip may be told a time of its own: clock [B, F]."""
    compute_dtype: torch.dtype | None = None
    """What the network computes in where its frozen weights are narrower than its inputs and answers."""
    supports_packing: bool = False
    """Whether `forward` also takes lists of batches of different shapes and computes them as one."""
    family: Any = None
    """The `Family` that asks the network, where it is a pipeline's."""
    guidance: GuidancePolicy = GuidancePolicy()
    """How its answers are guided; whatever stands around a denoiser hands this very object on."""

    def __call__(self, *args: Any, **known: Any) -> Any:
        """As `forward` answers; a network with narrow frozen weights computes in their dtype."""
        if self.compute_dtype is None:
            return super().__call__(*args, **known)
        x = args[0] if args else known["x"]
        device = (x if isinstance(x, Tensor) else x[0]).device.type
        if device == "meta":
            return super().__call__(*args, **known)
        with torch.autocast(device, self.compute_dtype):
            return super().__call__(*args, **known)

    @abstractmethod
    def forward(self, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x [B, C, ...] scaled by the theory's input_scale, clock [B] → out [B, C, ...]."""

    @property
    def backbone(self) -> nn.Module:
        """The network whose layers are adapted and looked into: the part called `network`, else all of it."""
        network = self._modules.get("network")
        return self if network is None else network

    def companions(self, model: "Model") -> Mapping[str, Any]:
        """How it wants pictures beside a sample encoded, by their names (`data.views.Companion`)."""
        return {}

    def mask_error(self, error: Tensor, condition: Condition) -> Tensor:
        """The part of the error [B, C, …] that training asks for; what the network is given is not."""
        return error

    def finalize_latents(self, x: Tensor, condition: Condition) -> Tensor:
        """Latents as they are decoded, after the last step."""
        return x

    def check_context_parallel(self, count: int) -> None:
        """Raises Refused unless so many processes can share the tokens of a sample."""
        raise Refused(no_context_parallel(type(self).__name__))

    def enable_context_parallel(self, mesh: Any) -> None:
        """Let processes share each sample: a mesh of torch with the dimensions ring and ulysses, or None."""
        if mesh is not None:
            self.check_context_parallel(mesh.size())


class DenoiserWrapper(Denoiser):
    """A denoiser around a denoiser `base`: every public member of `Denoiser` is that of the base.

    A wrapper that means something else by a member defines it, and says why. What `Denoiser` gains is handed
    on without a line here.
    """

    base: Denoiser

    def config(self) -> dict[str, Any]:
        """The base's."""
        return self.base.config()

    def forward(self, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """The base's answer."""
        return self.base(x, clock, condition)


def _handed_on(name: str) -> property:
    """A member that is the base's: read there, and set there."""

    def read(wrapper: DenoiserWrapper) -> Any:
        return getattr(wrapper.base, name)

    def write(wrapper: DenoiserWrapper, value: Any) -> None:
        setattr(wrapper.base, name, value)

    return property(read, write, doc=f"The base's `{name}`.")


OWN_TO_A_WRAPPER = {"kind", "config", "forward", "fingerprint", "write_weights"}
"""Of a stage as it is written down, which a wrapper with weights of its own is by itself."""
HANDED_ON = tuple(
    name
    for name in dict.fromkeys([*vars(Stage), *vars(Denoiser)])
    if not name.startswith("_") and name not in OWN_TO_A_WRAPPER
)
"""The public members of a denoiser."""
for _name in HANDED_ON:
    setattr(DenoiserWrapper, _name, _handed_on(_name))


class StagePlacement:
    """Where frozen stages work and where they rest, so that only the one that works takes a GPU's memory.

    What is lent is copied and dropped, never copied back: its numbers do not change.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.busy: set[int] = set()

    @contextmanager
    def at_work(self, *stages: nn.Module) -> Iterator[None]:
        """Within it the stages are on the device."""
        mine = [stage for stage in stages if id(stage) not in self.busy]
        homes = [
            (tensor, tensor.data) for stage in mine for tensor in (*stage.parameters(), *stage.buffers())
        ]
        self.busy |= {id(stage) for stage in mine}
        try:
            for tensor, home in homes:
                tensor.data = home.to(self.device)
            yield
        finally:
            self.busy -= {id(stage) for stage in mine}
            for tensor, home in homes:
                tensor.data = home
            if homes and self.device.type != "cpu":
                torch.get_device_module(self.device).empty_cache()


class Model:
    """Codec, conditioner and denoiser, bound by a theory.

    `info` holds what a user expects a model to remember: resolution, guidance, steps.
    """

    def __init__(
        self,
        theory: Theory,
        codec: Codec,
        conditioner: Conditioner,
        denoiser: Denoiser,
        info: Mapping[str, Any] | None = None,
    ):
        self.theory, self.codec, self.conditioner, self.denoiser = theory, codec, conditioner, denoiser
        self.info = dict(info or {})
        self.origin: Any = None
        """The diffusers pipeline it came from, if any."""
        self.sampling: Any = None
        """How that pipeline samples (`pipeline_folder.PipelineSampling`)."""
        self.trained: Theory | None = None
        """The theory the network itself speaks, where it is asked under another."""
        self.placement: StagePlacement | None = None
        """Where codec and conditioner work, if they rest elsewhere; None: they stay where they are."""
        self.fitted_times: Any = None
        """Sampling times fitted to this model (`theory.schedule_search.FittedGrid`), if any."""

    def with_theory(self, theory: Theory) -> Self:
        """This model, drawing and trained under another theory; stages and weights are shared, not copied.

        Exact, with gradients: each question is put to the network in the theory it speaks, and its answer
        translated. What is saved is that network in its own theory, whatever it was fine-tuned under.
        """
        other = copy(self)
        other.theory, other.trained, other.sampling = theory, self.trained or self.theory, None
        return other

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""
        if self.placement is not None:
            return self.placement.device
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of latents and answers: that of the denoiser's weights, unless they are stored narrow."""
        narrow = self.denoiser.compute_dtype is not None
        return torch.float32 if narrow else next(self.denoiser.parameters()).dtype

    def at_work(self, *stages: nn.Module) -> AbstractContextManager[None]:
        """Within it these stages are on the device, wherever they rest."""
        return nullcontext() if self.placement is None else self.placement.at_work(*stages)

    def codec_input(self, tensor: Tensor) -> Tensor:
        """Pixels or latents where the codec's weights are, in the model's dtype."""
        weight = next(self.codec.parameters(), None)
        return tensor.to(self.device if weight is None else weight.device, self.dtype)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move all three stages; returns self."""
        for stage in (self.codec, self.conditioner, self.denoiser):
            stage.to(device=device, dtype=dtype)
        return self

    @torch.no_grad()
    def condition(
        self,
        prompt: str | Sequence[str] | None = None,
        negative: str | Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        **options: Any,
    ) -> Condition:
        """Encode what guides; `negative`, if given, rides along as `.negative`."""
        if labels is not None:
            options["labels"] = labels
        prompts = [""] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        with self.at_work(self.conditioner):
            condition = self.conditioner(prompts, **options)
            if negative is not None:
                away = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
                condition.negative = self.conditioner.encode_negative(away, **options)
        return condition

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] → normalised latents: the mode, or with `noise` a sample."""
        self.codec.check_size(pixels.shape[-1], pixels.shape[-2])
        with self.at_work(self.codec):
            return self.codec.encode(self.codec_input(pixels), noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents → pixels, not clamped."""
        with self.at_work(self.codec):
            return self.codec.decode(self.codec_input(latents))

    def predict(self, x_t: Tensor, t: Tensor | float, condition: Condition) -> Tensor:
        """The network's answer at t in the theory's own time: scalar, [B], or one for each frame [B, F]."""
        x, clock, read = self._network_inputs(x_t, t)
        return read(self._network_answer(x, clock, condition, x_t.dtype))

    def predict_packed(
        self, x_t: Sequence[Tensor], t: Sequence[Tensor], conditions: Sequence[Condition]
    ) -> list[Tensor]:
        """`predict` of batches of different shapes, computed as one; for networks that pack."""
        asked = [self._network_inputs(x, one) for x, one in zip(x_t, t, strict=True)]
        xs, clocks = [x for x, _, _ in asked], [one for _, one, _ in asked]
        answers = self._network_answer(xs, clocks, list(conditions), x_t[0].dtype)
        return [read(answer) for (_, _, read), answer in zip(asked, answers, strict=True)]

    def _network_inputs(
        self, x_t: Tensor, t: Tensor | float
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """(x, clock, read): the network's inputs, and how its answer is read."""
        theory, read = self.theory, lambda out: out
        times = as_float64(t)  # times on the host stay there: what follows of them is a few numbers
        if self.trained is not None:
            x_t, times, read = translate_inputs(self.trained, self.theory, x_t, times)
            theory, times = self.trained, times.double()
        times = times.expand(len(x_t)) if times.ndim < 2 else times
        scale = upload(theory.input_scale(times).to(x_t.dtype), x_t.device)
        places = (-1, 1, times.shape[1]) if times.ndim == 2 else (-1, 1)
        x = x_t * scale.view(*places, *[1] * (x_t.ndim - len(places)))
        return x, upload(theory.clock(times).to(x_t.dtype), x_t.device), read

    def _network_answer(self, x: Any, clock: Any, condition: Any, dtype: torch.dtype) -> Any:
        """The network's own answer; as wide as its input where it computes narrower."""
        narrow = self.denoiser.compute_dtype
        if narrow is None:
            return self.denoiser(x, clock, condition)
        out = self.denoiser(x, clock, condition)
        return out.to(dtype) if isinstance(out, Tensor) else [one.to(dtype) for one in out]

    def retarget(self, theory: Theory) -> None:
        """Go on in another theory: the network answers as before, and what it says is translated.

        Where the theory reaches further than the network was trained (flow matching begins at pure noise), it
        ends at the network's own last time.

        Raises:
            Refused: the two have no times in common.
        """
        base = self.trained or self.theory
        last = base.angle(base.t_noise)
        if bool(theory.angle(theory.t_noise) > last):
            theory = replace(theory, t_noise=float(theory.time_of(last)))
        found = theory.check()
        if not found.ok:
            raise Refused(f'"{theory.name}" cannot go on from "{base.name}": {found.problems[0]}')
        self.theory, self.trained = theory, base
        self.sampling = None
