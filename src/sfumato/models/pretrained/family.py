"""A family translates between our words and one pretrained network's.

A file in families/ subclasses Family and overrides what differs; everything else (loop, solvers, store,
tests) works with the words here. Families have no state: all they need is in the pipeline, the network or
the condition.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from sfumato.models.codecs.pretrained import statistics
from sfumato.models.condition import Condition
from sfumato.models.control.controlnet import ControlNetAdapter
from sfumato.models.control.ip_adapter import IPAdapterLayout
from sfumato.models.guidance_policy import GuidancePolicy, PipelineGuidance
from sfumato.models.lora.layer_names import LayerNames
from sfumato.models.pretrained import schedulers
from sfumato.models.pretrained.image_inputs import Encode, ImageCondition, Pictures
from sfumato.theory import Theory

WORD_WIDTHS = ("joint_attention_dim", "caption_channels", "text_dim", "cap_feat_dim", "text_embed_dim")
"""What networks' configs call the width of the words they read."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@cache
def called_with(pipeline: type) -> dict[str, Any]:
    """The defaults of a pipeline's call, by name."""
    parameters = inspect.signature(pipeline.__call__).parameters
    return {k: v.default for k, v in parameters.items() if v.default is not inspect.Parameter.empty}


class Family:
    """One network's dialect. The defaults fit a UNet with noise prediction and text."""

    pipelines: ClassVar[tuple[str, ...]] = ()
    """Names of diffusers pipelines whose folders hold this family."""
    network: ClassVar[str] = "transformer"
    """The pipeline's component that denoises."""
    timestep_input: ClassVar[str] = ""
    """What a flow network is told about time, one of schedulers.CLOCKS; empty for a table of betas."""
    sign: ClassVar[int] = 1
    """1 where a flow network answers x_T − x_0, −1 where it answers x_0 − x_T."""
    patch: ClassVar[int] = 2
    """Latent sides must be multiples of this."""
    normalizes: ClassVar[tuple[str, ...]] = ("factor",)
    """What of its autoencoder's config the pipeline heeds: factor, shift, channels (mean and deviation)."""
    even_sigmas: ClassVar[bool] = False
    """Whether the pipeline hands evenly spaced sigmas to its scheduler."""
    guidance: ClassVar[str] = "guidance_scale"
    """The argument of the pipeline's call that `generate(guidance=…)` means."""
    prompt_outputs: ClassVar[tuple[str, ...]] = ("tokens",)
    """Our names for what encode_prompt returns, in its order; empty for what is not kept."""
    prompt_only: ClassVar[tuple[str, ...]] = ()
    """Options of encode_prompt that the pipeline does not apply to a negative prompt."""
    weighted_tokens: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """The tokenizers of CLIP and T5 whose tokens prompt weights act on: blocks of `tokens`, one after the
    other, each of the tokenizers whose features stand side by side; empty where nothing reads weights."""
    video: ClassVar[bool] = False
    trains_micro_conditioning: ClassVar[bool] = False
    """Whether training tells the network how each picture was cut, as `time_ids`."""
    fps: ClassVar[float] = 8.0
    """Frames a second of the clips it was trained on, where its pipeline's call does not say."""
    image_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of the pipeline's call that show pictures."""
    image_size_arguments: ClassVar[tuple[str, ...]] = ()
    """Further arguments of the call that say how they are seen."""
    micro_conditioning_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of the call that tell of the picture's size and cut; `read` makes tensors of them."""
    requires_image: ClassVar[bool] = False
    unused_components: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    """Components that no stage of ours uses."""
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    layer_names: ClassVar[LayerNames] = LayerNames()
    """What its layers are called in the original code, ComfyUI and kohya's trainers."""
    comfyui_loads_whole: ClassVar[bool] = False
    """Whether ComfyUI loads its denoiser under diffusers' names."""
    controlnet: ClassVar[ControlNetAdapter | None] = None
    """How its ControlNets are made and called; None where diffusers has none that we can call."""
    ip_adapter: ClassVar[IPAdapterLayout | None] = None
    """How its IP-Adapters are made and fed; None where diffusers has none."""
    no_context_parallel: ClassVar[str] = ""
    """Why processes cannot share its samples, where diffusers has a plan that does not work."""
    micro_conditioning: ClassVar[str] = ""
    """The condition's tensor that says how a picture was cut from its file, where the network reads it."""

    def theory(self, scheduler: Any) -> Theory:
        """The theory this network was trained under."""
        return (
            schedulers.flow_theory(self.timestep_input, self.sign)
            if self.timestep_input
            else schedulers.table_theory(scheduler)
        )

    # ---------------------------------------------------------------- text

    def read(self, pipe: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Prompts → named tensors, by the pipeline's own encode_prompt; options are its arguments."""
        known = inspect.signature(pipe.encode_prompt).parameters
        usual = {
            "device": pipe.device,
            "do_classifier_free_guidance": False,
            "num_images_per_prompt": 1,
            "num_videos_per_prompt": 1,
        }
        given = {name: value for name, value in usual.items() if name in known}
        answer = pipe.encode_prompt(prompt=list(prompts), **given, **options)
        named = dict(zip(self.prompt_outputs, answer, strict=False))
        if "mask" in named:
            full = named["tokens"].new_ones(named["tokens"].shape[:2])
            named["mask"] = (full if named["mask"] is None else named["mask"]).bool()
        return {name: named[name] for name in named if name}

    def read_negative(
        self, pipe: Any, prompts: Sequence[str | None], options: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """What to lean away from; None where nobody asked for anything particular."""
        without = dict.fromkeys(self.prompt_only)
        return self.read(pipe, [prompt or "" for prompt in prompts], {**options, **without})

    # ---------------------------------------------------------------- pictures

    def encode_images(
        self, pipe: Any, shown: Mapping[str, Sequence[Pictures]], options: Mapping[str, Any], encode: Encode
    ) -> dict[str, Tensor]:
        """Named tensors of the pictures that are shown: `shown[argument][i]` are those of prompt i."""
        return {}

    def training_images(self, pipe: Any, encode: Encode) -> dict[str, ImageCondition]:
        """What training shows this network beside words, by the condition's names; `see` gives the same."""
        return {}

    as_trained: ClassVar[Mapping[str, Any]] = {}
    """Options of `see` with which a picture is seen as training shows it."""
    reads_pictures: ClassVar[bool] = False
    """Whether words are read beside the picture that is shown."""

    def mask_error(self, error: Tensor, condition: Condition) -> Tensor:
        """The part of the error [B, C, …] that training asks for; what is given is not."""
        return error

    def required_images(self, pipe: Any) -> tuple[str, ...]:
        """The arguments without whose pictures the network cannot be asked."""
        return ("image",) if self.requires_image else ()

    def output_size(self, pipe: Any, pictures: Pictures) -> tuple[int, int] | None:
        """(height, width) in pixels of what is drawn beside these pictures; None for the usual."""
        return None

    def finalize_latents(self, network: Any, x: Tensor, condition: Condition) -> Tensor:
        """Latents as they are decoded, after the last step."""
        return x

    # ---------------------------------------------------------------- the autoencoder

    def statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        """(shift, scale) that normalise latents, as `pretrained.statistics` reads them."""
        return statistics(vae, self.normalizes)

    # ---------------------------------------------------------------- the network

    more_channels: ClassVar[tuple[int, ...]] = ()
    """Channels that networks take beside the noise, where they are shown more: a number for each way."""

    def why_incompatible(self, network: Any, pipe: Any, channels: int) -> str:
        """Why the pipeline's parts are not of one model; empty where they may be. `channels`: of latents."""
        taken = network.config.get("in_channels")
        usual = (channels, channels * self.patch**2)  # as they are, or gathered in patches
        if taken and taken not in usual and taken - channels not in self.more_channels:
            return f"its {self.network} takes latents of {taken} channels, but its vae makes {channels}"
        read = next((network.config[name] for name in WORD_WIDTHS if network.config.get(name)), 0)
        widths = [
            part.get_input_embeddings().weight.shape[1]
            for name, part in pipe.components.items()
            if name.startswith("text_encoder") and part is not None and "CLIP" not in type(part).__name__
        ]
        if read and widths and all(read % width for width in widths):  # several layers may stand side by side
            said = ", ".join(map(str, widths))
            return f"its text encoder gives words of {said} numbers, its {self.network} reads {read}"
        return ""

    def custom_components(self, folder: Path) -> dict[str, Any]:
        """Components of the pipeline that are composed here instead of by diffusers."""
        return {}

    def get_denoiser(self, pipe: Any) -> nn.Module:
        """The network that denoises, taken from a pipeline."""
        return getattr(pipe, self.network)

    def set_denoiser(self, pipe: Any, network: nn.Module) -> None:
        """The inverse of `whole`: give the pipeline this network."""
        pipe.register_modules(**{self.network: network})

    def predict(self, network: Any, x: Tensor, clock: Tensor, condition: Condition) -> Tensor:
        """x [B, C, …], what the network is told about time [B], condition → its raw answer [B, C, …]."""
        raise TypeError(f"{type(self).__name__} does not say how its network is asked")

    def guidance_policy(self, network: Any) -> GuidancePolicy:
        """How this network is guided, as its pipeline does it."""
        return PipelineGuidance()

    # ---------------------------------------------------------------- sampling

    def shift(self, config: Mapping[str, Any], tokens: int, steps: int) -> float:
        """μ for a scheduler that shifts by picture."""
        return schedulers.shift_by_tokens(config, tokens)

    def sigmas(self, steps: int) -> list[float] | None:
        """Shares of noise handed to the scheduler, or None for its own."""
        return schedulers.line_of_sigmas(steps) if self.even_sigmas else None

    def prepared(self, scheduler: Any, steps: int, shape: Sequence[int]) -> Any:
        """The scheduler, ready for so many steps on latents of this shape (C, [F,] H, W)."""
        tokens = (shape[-1] // self.patch) * (shape[-2] // self.patch) * (shape[1] if len(shape) == 4 else 1)
        mu = self.shift(scheduler.config, tokens, steps)
        return schedulers.prepared(scheduler, steps, self.sigmas(steps), mu)

    def size(self, pipe: Any) -> tuple[int, int]:
        """(height, width) in pixels when nobody asks for one."""
        call = called_with(type(pipe))
        if call.get("height"):
            return call["height"], call["width"]
        known = getattr(pipe, self.network).config.get("sample_size") or 128
        side = int(getattr(pipe, "default_sample_size", known) * pipe.vae_scale_factor)
        return side, side

    def frames(self, pipe: Any) -> int | None:
        """Frames of a clip when nobody asks for a number; None for pictures."""
        return called_with(type(pipe)).get("num_frames") if self.video else None

    def info(self, pipe: Any) -> dict[str, Any]:
        """What a user expects a model to remember: size, steps, guidance, as the pipeline has them."""
        call = called_with(type(pipe))
        height, width = self.size(pipe)
        known = {
            "height": height,
            "width": width,
            "resolution": max(height, width),
            "steps": call["num_inference_steps"],
            "guidance": float(call.get(self.guidance) or 1.0),
        }
        if not self.video:
            return known
        return known | {"frames": self.frames(pipe), "fps": float(call.get("frame_rate") or self.fps)}
