"""Laws of pretrained families: what a diffusers pipeline computes, we compute; each family by itself."""

import copy
import inspect
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import sfumato
from sfumato.errors import Refused
from sfumato.models.pretrained.families import families
from sfumato.theory import noise

from . import clips, pictures, zoo
from .zoo import NEGATIVE, PROMPT, ZOO, Case

CLOSE = 1e-4
STEPS = 4


@dataclass
class Drawn:
    """One guided picture by a pipeline, with what its network and its decoder saw."""

    case: Case
    folder: Any
    pipe: Any
    start: Tensor
    times: Tensor
    answers: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    pixels: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def guidance(self) -> float:
        return self.case.call.get(self.case.guidance, 1.0)


@pytest.fixture(scope="module", params=list(ZOO))
def drawn(request, tmp_path_factory):
    """The pipeline's own picture of a family."""
    case, folder = ZOO[request.param], tmp_path_factory.mktemp("zoo") / request.param
    with pictures.small():
        yield drawing(case, request.param, folder)


def drawing(case: Case, name: str, folder: Any) -> Drawn:
    """The pipeline's picture, with what was seen on the way."""
    torch.manual_seed(0)
    case.make(name).save_pretrained(folder)
    pipe: Any = opened(folder)
    pipe.set_progress_bar_config(disable=True)
    flow = walks_straight(pipe.scheduler)
    first_order(pipe)
    result = Drawn(case, folder, pipe, torch.zeros(0), torch.zeros(0))
    watch(pipe, result)
    call = dict(case.call) | {
        k: v for k, v in case.options.items() if k in inspect.signature(pipe.__call__).parameters
    }
    if case.prompt:
        call["prompt"] = [PROMPT]
    if case.negative:
        call["negative_prompt"] = [NEGATIVE]
    if name == "dit":
        call["class_labels"] = [3]
    with torch.no_grad():
        pipe(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(7), output_type="np")
    result.times = grid_of(pipe.scheduler, flow)
    return result


def walks_straight(scheduler: Any) -> bool:
    """Whether a scheduler's path is that of flow matching."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))


def first_order(pipe: Any) -> None:
    """Give the pipeline the first-order scheduler that is nearest to its own: DDIM, or FlowMatchEuler."""
    name, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    if walks_straight(pipe.scheduler):
        if not name.startswith("FlowMatch"):
            pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    elif not name.startswith("CogVideoX"):
        spacing = config.get("timestep_spacing", "leading")  # DDIM steps evenly, linspace does not
        spacing = "trailing" if spacing == "linspace" else spacing
        pipe.scheduler = diffusers.DDIMScheduler.from_config(
            config, clip_sample=False, timestep_spacing=spacing
        )


def opened(folder: Any) -> Any:
    """The pipeline by diffusers alone."""
    index = json.loads((folder / "model_index.json").read_text())
    by_hand = {}
    if "processor" in index:
        by_hand["processor"] = pictures.ByHand(
            transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
        )
    return diffusers.DiffusionPipeline.from_pretrained(folder, **by_hand)


def watch(pipe: Any, result: Drawn) -> None:
    """Record what the network answers, and the pixels the decoder gives."""
    network = getattr(pipe, "unet", None) or pipe.transformer

    def answered(module: Any, given: Any, out: Any) -> None:
        out = out[0]
        result.answers.append(torch.stack(list(out)) if isinstance(out, list) else out.detach())

    network.register_forward_hook(answered)
    if getattr(pipe, "vae", None) is None:
        return
    decode = pipe.vae.decode

    def decoded(*given: Any, **named: Any) -> Any:
        out = decode(*given, **named)
        result.pixels = (out[0] if isinstance(out, tuple) else out.sample).detach()
        return out

    pipe.vae.decode = decoded


def grid_of(scheduler: Any, flow: bool) -> Tensor:
    """The scheduler's times in ours: σ, or (step + 1)/1000 and what follows the last step."""
    if flow:
        sigmas = scheduler.sigmas.double()
        return 1 - sigmas if scheduler.config.get("invert_sigmas") else sigmas
    told = (torch.as_tensor(scheduler.timesteps).double() + 1) / 1000
    at_data = scheduler.config.get("set_alpha_to_one", True)
    return torch.cat([told, told.new_tensor([0.0 if at_data else 0.001])])


@pytest.fixture(scope="module")
def model(drawn: Drawn) -> Any:
    """Our model of the same folder."""
    return sfumato.load(drawn.folder)


def start_of(model: Any, drawn: Drawn) -> Tensor:
    """The noise the pipeline started from, in our layout."""
    call = drawn.case.call
    shape = model.latent_shape(call.get("width"), call.get("height"), call.get("num_frames"))
    if type(drawn.pipe).__name__.startswith("CogVideoX"):
        turned = (shape[1], shape[0], *shape[2:])
        return torch.randn(1, *turned, generator=torch.Generator().manual_seed(7)).transpose(1, 2)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(7))


def told(model: Any, drawn: Drawn) -> Any:
    """Our condition of the pipeline's prompts."""
    if not drawn.case.prompt:
        return model.condition(labels=[3]) if drawn.case.call else model.condition()
    return model.condition([PROMPT], NEGATIVE if drawn.case.negative else None, **options_of(model, drawn))


def options_of(model: Any, drawn: Drawn, drawing: bool = False) -> dict[str, Any]:
    """What our model is told beside the prompts: pictures, and where they go unless `generate` says so."""
    call, sees = drawn.case.call, model.conditioner.image_arguments
    seen = {name: [call[name]] for name in sees if name in call}
    places = {
        name: call[name] for name in ("height", "width", "num_frames") if model.conditioner.sizes_images
    }
    knobs = {name: call[name] for name in model.denoiser.guidance.options if name in call}
    return drawn.case.options | seen | (knobs if drawing else places)


def ours(model: Any, x: Tensor, t: Tensor, condition: Any, network: Any) -> Tensor:
    """The network's answer as the network gives it, asked through our model."""
    raw: list[Tensor] = []
    hook = network.register_forward_hook(lambda module, given, out: raw.append(out[0]))
    with torch.no_grad():
        out = model.predict(x, t, condition)
    hook.remove()
    assert out.shape == x.shape
    return torch.stack(list(raw[0])) if isinstance(raw[0], list) else raw[0]


def shown(pixels: Tensor) -> Tensor:
    """Pixels as a picture holds them, in [0, 1]."""
    return (pixels / 2 + 0.5).clamp(0, 1)


def test_the_network_answers_as_in_its_pipeline(drawn, model):
    """Law: the condition, the time and the layout reach the network as its pipeline sends them."""
    condition, network = told(model, drawn), model.denoiser.network
    condition = model.denoiser.guidance.embed_guidance(condition, drawn.guidance)
    first = ours(model, start_of(model, drawn), drawn.times[0], condition, network)
    expected = drawn.answers[0]
    if len(expected) == 1:
        assert torch.allclose(first, expected, atol=CLOSE), (first - expected).abs().max()
        return
    errors = [(first[0] - row).abs().max().item() for row in expected]  # pipelines differ in who comes first
    assert min(errors) < CLOSE, errors
    if condition.negative is not None:
        away = ours(model, start_of(model, drawn), drawn.times[0], condition.negative, network)
        other = expected[1 - errors.index(min(errors))]
        assert torch.allclose(away[0], other, atol=CLOSE), (away[0] - other).abs().max()


def test_latents_decode_to_what_was_encoded(drawn, model):
    """Law: decode ∘ encode is the autoencoder's own round trip.

    In float64: a network of random weights makes much of the rounding that normalising and back costs.
    """
    frames = drawn.case.call.get("num_frames")
    sides = (128, 192) if model.codec.stride > 16 else (64, 96)
    shape = (1, 3, frames, *sides) if frames else (1, 3, *sides)
    pixels = noise.uniform(1, range(math.prod(shape))).view(shape) * 2 - 1
    if getattr(drawn.pipe, "vae", None) is None:
        assert torch.equal(model.decode(model.encode(pixels)), pixels.float())
        return
    codec = copy.deepcopy(model.codec).double()
    with torch.no_grad():
        latents = codec.encode(pixels)
        assert latents.shape[1:] == model.latent_shape(pixels.shape[-1], pixels.shape[-2], frames)
        code = codec.network.encode(pixels.unsqueeze(2) if latents.ndim > pixels.ndim else pixels)
        raw = code.latent_dist.mode() if hasattr(code, "latent_dist") else code.latent
        again = codec.network.decode(raw).sample
        decoded = codec.decode(latents)
    assert torch.allclose(decoded, again, atol=CLOSE), (decoded - again).abs().max()


def test_a_family_draws_what_its_pipeline_draws(drawn, model, monkeypatch):
    """Law: the same noise, times and guidance give the same pixels."""
    if not drawn.pixels.numel():
        with torch.no_grad():
            images = drawn.pipe(
                num_inference_steps=STEPS, generator=torch.Generator().manual_seed(7), output_type="np"
            ).images
            drawn.pixels = torch.as_tensor(images).permute(0, 3, 1, 2) * 2 - 1
    seen: list[Tensor] = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda x, *pieces: seen.append(decode(x, *pieces)) or seen[-1])
    call = drawn.case.call
    who = {"prompt": [PROMPT]} if drawn.case.prompt else {"labels": [3]} if call else {}
    pictures = model.generate(
        **who,
        negative=NEGATIVE if drawn.case.negative else None,
        steps=STEPS,
        guidance=drawn.guidance,
        height=call.get("height"),
        width=call.get("width"),
        frames=call.get("num_frames"),
        times=drawn.times,
        solver="euler",
        latents=start_of(model, drawn),
        **options_of(model, drawn, drawing=True),
    )
    mine, theirs = (shown(pixels) for pixels in (seen[0], drawn.pixels))
    assert mine.numel() == theirs.numel()
    error = (mine.flatten() - theirs.flatten()).abs().max()
    print(f"{drawn.folder.name}: {error:.1e}")
    assert error < CLOSE
    assert np.asarray(pictures[0]).dtype == np.uint8


def test_defaults_come_from_the_pipeline(drawn, model):
    """Law: without a grid, the pipeline's own times; every theory is sound at them, be they one or fifty."""
    for steps in (1, 2, 50):
        grid = model.sampling.times(steps, model.latent_shape())
        assert len(grid) == steps + 1 and bool((grid.diff() < 0).all())
        assert model.theory.check(grid).ok, str(model.theory.check(grid))
    assert model.info["steps"] > 0 and model.denoiser.lora_targets


def test_every_family_is_in_the_zoo():
    """Law: a family that is listed is tested."""
    made = inspect.getsource(zoo) + inspect.getsource(clips) + inspect.getsource(pictures)
    for name, family in families().items():
        assert any(re.search(rf"D\.{pipeline}\b", made) for pipeline in family.pipelines), name


def test_an_unknown_pipeline_is_refused_with_the_nearest(tmp_path):
    """Law: a folder nobody reads says which one it may have meant."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDifusionPipeline"}')
    with pytest.raises(Refused, match='Did you mean "StableDiffusionPipeline"'):
        sfumato.load(tmp_path)
