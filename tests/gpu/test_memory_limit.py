"""Laws of drawing with less memory than the model takes: the same pictures, and never more on the device."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import sfumato
from families.test_training import make_base
from sfumato.cli import app
from sfumato.generation.memory_limit import BY_BLOCKS, COMES, STAYS, WORKING_SHARE, stage_bytes
from sfumato.models.interface import Codec
from sfumato.settings import parse_bytes

PROMPTS = ["a red circle", "a blue square"]
ASKED = {"steps": 2, "guidance": 2.0, "seed": 3, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base("pixart-sigma", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def expected(base):
    return [np.asarray(one) for one in sfumato.load(base).generate(PROMPTS, **ASKED)]


def close(pictures, expected) -> bool:
    return all(
        np.abs(np.asarray(one).astype(int) - other).max() <= 1
        for one, other in zip(pictures, expected, strict=True)
    )


def on_device(model) -> int:
    stages = (model.conditioner, model.denoiser, model.codec)
    tensors = [one for stage in stages for one in (*stage.parameters(), *stage.buffers())]
    return sum(one.nbytes for one in tensors if one.device.type == "cuda")


def ways_of(model) -> list[str]:
    return [model.placement.ways[name] for name in ("conditioner", "denoiser", "codec")]


def test_a_model_draws_within_any_memory_what_it_draws_in_plenty(gpu, base, expected):
    """Law: each arrangement is chosen where the one before does not fit, keeps its limit, draws the same."""
    whole = sfumato.load(base)
    c, d, v = (stage_bytes(one) for one in (whole.conditioner, whole.denoiser, whole.codec))
    enough = 1 / (1 - WORKING_SHARE)
    limits = {
        (STAYS, STAYS, STAYS): c + d + v,
        (COMES, STAYS, COMES): d + max(c, v),
        (COMES, COMES, COMES): max(c, d, v),
    }
    seen = []
    for ways, bytes_ in limits.items():
        said: list[str] = []
        limit = bytes_ * enough + 1
        model = sfumato.load(base, device="cuda", memory=limit, say=said.append)
        seen.append(tuple(ways_of(model)))
        assert (
            seen[-1] == ways and len(said) == (COMES in ways) and all("GB of memory" in one for one in said)
        )
        most = watched(model)
        assert close(model.generate(PROMPTS, **ASKED), expected)
        assert 0 < max(most) <= bytes_ and on_device(model) == bytes_of_staying(model)
    tiny = sfumato.load(base, device="cuda", memory=1.0)
    assert ways_of(tiny)[:2] == [BY_BLOCKS, BY_BLOCKS]
    most = watched(tiny)
    assert close(tiny.generate(PROMPTS, **ASKED), expected)
    assert max(most) <= max(v, *(tiny.placement._lent_bytes(one) for one in ("conditioner", "denoiser")))
    assert on_device(tiny) == 0 and tiny.device.type == "cuda"


def bytes_of_staying(model) -> int:
    ways, sizes = model.placement.ways, model.placement.sizes
    return sum(sizes[name] for name, way in ways.items() if way == STAYS)


def watched(model) -> list[int]:
    """The bytes of weights on the device whenever a layer is asked."""
    found: list[int] = []
    for stage in (model.conditioner, model.denoiser, model.codec):
        for part in stage.modules():
            if not list(part.children()):
                part.register_forward_pre_hook(lambda *_: found.append(on_device(model)))
    return found


def test_where_memory_is_out_after_all_less_is_on_the_device_and_the_codec_decodes_in_tiles(
    gpu, base, expected, monkeypatch
):
    """Law: what was drawn so far is drawn again, the same."""
    model = sfumato.load(base, device="cuda", memory="64GB")
    assert ways_of(model) == [STAYS, STAYS, STAYS]
    said: list[str] = []
    model.placement.say = said.append
    ask, asked = type(model.denoiser).forward, []

    def full(self, *given, **named):
        asked.append(ways_of(model)[1])
        if ways_of(model)[1] == STAYS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ask(self, *given, **named)

    monkeypatch.setattr(type(model.denoiser), "forward", full)
    assert close(model.generate(PROMPTS, **ASKED), expected)
    assert ways_of(model) == [COMES, COMES, COMES] and len(said) == 2
    monkeypatch.undo()
    decode = type(model.codec).decode

    def out(self, latents):
        if not getattr(self.network, "use_tiling", False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, latents)

    monkeypatch.setattr(type(model.codec), "decode", out)
    assert close(model.generate(PROMPTS, **ASKED), expected) and "tiles of 256" in said[-1]
    assert isinstance(model.codec, Codec)


def test_a_lora_that_is_added_later_is_heard_by_the_blocks_that_come(gpu, base, tmp_path):
    """Law: what waits in the host's memory is what the weights are now."""
    draw = torch.Generator().manual_seed(1)
    layer = "transformer_blocks.0.attn1.to_q"
    rows, columns = sfumato.load(base).denoiser.network.get_submodule(layer).weight.shape
    file = tmp_path / "lora.safetensors"
    save_file(
        {
            f"transformer.{layer}.lora_A.weight": torch.randn(4, columns, generator=draw),
            f"transformer.{layer}.lora_B.weight": torch.randn(rows, 4, generator=draw),
        },
        file,
    )
    model = sfumato.load(base, device="cuda", memory=1.0)
    before = model.generate(PROMPTS, **ASKED)
    other = sfumato.load(base)
    assert model.add_lora(file) == other.add_lora(file)
    after = model.generate(PROMPTS, **ASKED)
    assert close(after, [np.asarray(one) for one in other.generate(PROMPTS, **ASKED)])
    assert not close(after, [np.asarray(one) for one in before])


@pytest.mark.parametrize("said", [[], ["--memory", "1kB"], ["--dtype", "float32"]])
def test_the_command_draws_with_what_it_is_given(said, gpu, base, expected, tmp_path):
    """Law: by itself in bfloat16, whose pictures are those of float32 up to its eight bits."""
    words = [str(one) for name, value in ASKED.items() for one in (f"--{name}", value)]
    prompts = [one for prompt in PROMPTS for one in ("-p", prompt)]
    out = tmp_path / "out"
    given = ["generate", str(base), *prompts, *words, *said, "--device", "cuda", "--out", str(out)]
    answer = CliRunner().invoke(app, given)
    assert answer.exit_code == 0, (answer.stderr, answer.exception)
    assert ("block by block" in answer.stderr) == ("--memory" in said)
    found = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(out.glob("0*.png"))]
    most = max(np.abs(one.astype(int) - other).max() for one, other in zip(found, expected, strict=True))
    assert most <= 1 if "--dtype" in said else 0 < most < 16


def test_a_limit_that_is_none_is_refused(base):
    for memory, words in (("much", "no size"), ("8GB", "on the CPU")):
        with pytest.raises(sfumato.Refused, match=words):
            sfumato.load(base, memory=memory)
    assert parse_bytes("8GB") == 8e9
