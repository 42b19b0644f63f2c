"""Laws of LoRA files of strangers: each is read, or refused in one sentence, at once and in little memory."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato.errors import Refused
from sfumato.models.lora import adapter, init_from_file, lora_file
from sfumato.models.lora.lora_file import METADATA

from .test_training import make_base

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = f"unet.{LAYER}"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_base("stable-diffusion-1.5", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sides(folder):
    """(numbers in, numbers out) of the layer."""
    layer = adapter.peft_target(sfumato.load(folder).denoiser).get_submodule(LAYER)
    return layer.in_features, layer.out_features


def lora(sides, rank=2, **more):
    """The file of one layer."""
    draw = torch.Generator().manual_seed(0)
    found = {
        f"{KEY}.lora_A.weight": torch.randn(rank, sides[0], generator=draw),
        f"{KEY}.lora_B.weight": torch.randn(sides[1], rank, generator=draw),
    }
    return found | {f"{KEY}.{name}": tensor for name, tensor in more.items()}


def nearly(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


def full(*shape):
    return torch.ones(*shape)


def metadata(**known):
    return {METADATA: json.dumps({f"unet.{name}": value for name, value in known.items()})}


def of(A=None, B=None, **parts):
    """Tensors of the layer: A and B by peft's names, the others by their own."""
    named = {"lora_A.weight": A, "lora_B.weight": B} | {
        f"{name}.weight" if name in ("lora_down", "lora_mid", "lora_up") else name: one
        for name, one in parts.items()
    }
    return {f"{KEY}.{name}": one for name, one in named.items() if one is not None}


def loha(rows, ranks, columns):
    """A LoHa whose two factors are of these shapes."""
    return of(
        **{
            f"hada_w{n}_{end}": full(*shape)
            for n in (1, 2)
            for end, shape in (("a", (rows[n - 1], ranks[0])), ("b", (ranks[1], columns)))
        }
    )


def tucker_lokr():
    """A LoKr whose kernel has another rank than its factors."""
    return of(lokr_w1=full(2, 2), lokr_w2_a=full(3, 4), lokr_w2_b=full(2, 4), lokr_t2=full(2, 2, 1, 1))


def large_kernel(o):
    """Half a megabyte that would become 64 GB."""
    return of(lora_down=full(1, 100_000), lora_mid=full(160_000, 1), lora_up=full(o, 160_000))


def outside(i, o):
    return {key.replace(LAYER, "../../etc/passwd"): one for key, one in lora((i, o)).items()}


TENSORS = {
    "a NaN": (lambda i, o: of(nearly(full(2, i), NAN), full(o, 2)), "lora_A.weight.* not finite"),
    "an infinity": (lambda i, o: of(full(2, i), nearly(full(o, 2), INF)), "lora_B.weight.* not finite"),
    "a NaN alpha": (lambda i, o: lora((i, o), alpha=torch.tensor(NAN)), "alpha.* not finite"),
    "five alphas": (lambda i, o: lora((i, o), alpha=full(5)), "an alpha is one number"),
    "no alpha": (lambda i, o: lora((i, o), alpha=full(0)), "an alpha is one number"),
    "complex": (lambda i, o: of(full(2, i).to(torch.complex64), full(o, 2)), "complex numbers"),
    "rank 0": (lambda i, o: lora((i, o), rank=0), "is of shape"),
    "no axes": (lambda i, o: of(torch.tensor(1.0), torch.tensor(1.0)), "is of shape"),
    "other ranks": (lambda i, o: of(full(3, i), full(o, 2)), "up is of shape"),
    "another width": (lambda i, o: lora((i + 1, o)), "of another base"),
    "lengths": (lambda i, o: lora((i, o), dora_scale=full(o + 3, 1)), "DoRA has"),
    "a bias": (lambda i, o: lora((i, o), diff_b=full(o + 1)), "the bias is of shape"),
    "a bias without axes": (lambda i, o: lora((i, o), diff_b=torch.tensor(1.0)), "the bias is of shape"),
    "324 TB": (lambda i, o: of(lokr_w1=full(3000, 3000), lokr_w2=full(3000, 3000)), "of another base"),
    "64 GB": (lambda i, o: large_kernel(o), "its kernel would have"),
    "half a LoHa": (lambda i, o: of(hada_w1_a=full(o, 2)), "no LoRA that is known"),
    "LoHa of two shapes": (lambda i, o: loha((o, o + 1), (2, 2), i), "different shapes"),
    "LoHa of two ranks": (lambda i, o: loha((o, o), (3, 2), i), "hada_w1_a is of shape"),
    "Tucker of other ranks": (lambda i, o: tucker_lokr(), "lokr_t2 is of shape"),
    "names that steer": (lambda i, o: {"\x1b]0;PWNED\x07": full(1)}, r"\\x1b\]0;PWNED\\x07"),
    "a place outside": (outside, "of another base"),
}
HEADERS = {
    "no JSON": ({METADATA: "{not json"}, "is damaged"),
    "a list": ({METADATA: "[1]"}, "no JSON object"),
    "nested": ({METADATA: "[" * 100_000 + "]" * 100_000}, "is damaged"),
    "an alpha in words": (metadata(lora_alpha="x"), "which is no number"),
    "an alpha of NaN": (metadata(lora_alpha=NAN, r=2), "which is no number"),
    "an alpha too large": (metadata(lora_alpha=10**400), "which is no number"),
    "patterns as a list": (metadata(lora_alpha=4, alpha_pattern=["a"]), "alpha_pattern is no JSON object"),
    "an open bracket": (metadata(lora_alpha=4, r=2, alpha_pattern={"(": 3}), "is no regular expression"),
    "counted": (
        metadata(lora_alpha=4, alpha_pattern={"((a{1,99}){1,99}){1,99}" * 4: 3}),
        "no regular|too long",
    ),
    "a pattern's alpha": (metadata(lora_alpha=4, alpha_pattern={LAYER: None}), "which is no number"),
    "an alpha in the header": ({"alpha": "many"}, "which is no number"),
    "an infinite alpha in the header": ({"alpha": "inf"}, "which is no number"),
}


@pytest.fixture(scope="module")
def model(folder):
    """The model that all files are read into; what is refused changes nothing of it."""
    return sfumato.load(folder)


def refused(model, file, words):
    """The sentence about a file, wherever it is read: soon, on one line."""
    for read in (lambda model: model.add_lora(file), lambda model: init_from_file.read(model, file)):
        began = time.monotonic()
        before = {name: one.clone() for name, one in model.denoiser.state_dict().items()}
        with pytest.raises(Refused, match=words) as refusal:
            read(model)
        assert time.monotonic() - began < 10
        assert str(refusal.value).isprintable()
        assert all(torch.equal(one, before[name]) for name, one in model.denoiser.state_dict().items())


@pytest.mark.parametrize("how", list(TENSORS))
def test_tensors_that_are_no_lora_are_refused(how, model, sides, tmp_path):
    """Law: the sentence names the tensor; nothing is added, nothing large is allocated."""
    make, words = TENSORS[how]
    save_file(make(*sides), tmp_path / "odd.safetensors")
    refused(model, tmp_path / "odd.safetensors", words)


@pytest.mark.parametrize("how", list(HEADERS))
def test_headers_that_say_nothing_are_refused(how, model, sides, tmp_path):
    """Law: also what would be computed for ever."""
    header, words = HEADERS[how]
    save_file(lora(sides), tmp_path / "odd.safetensors", metadata=header)
    refused(model, tmp_path / "odd.safetensors", words)


FOR_EVER = ("([a-z_.0-9]+)+!", "(a|a)*b", "(.*)*(.*)*(.*)*!", "(([a-z_.0-9]|[a-z]|\\\\w|_)+)+[!?]")


@pytest.mark.parametrize("pattern", FOR_EVER)
def test_no_pattern_runs_for_ever(pattern, sides, tmp_path):
    """Law: a regular expression of a stranger is refused, or means nothing, in seconds."""
    tensors, began = lora(sides), time.monotonic()
    header = metadata(lora_alpha=4, r=2, alpha_pattern={pattern: 3})
    save_file(tensors, tmp_path / "odd.safetensors", metadata=header)
    try:
        (change,) = lora_file.read(tmp_path / "odd.safetensors")[0].values()
        assert change.scale == 2
    except Refused as refusal:
        assert "takes too long" in str(refusal)
    assert time.monotonic() - began < 10


def test_patterns_have_one_time_for_all_layers(tmp_path, monkeypatch):
    """Law: what takes too long is refused by its name, however many layers ask."""
    patterns = lora_file.Patterns("here")
    monkeypatch.setattr(patterns.bounded, "left", 0.0)
    slow = "(([a-z]|[a-y]|\\w)+)+[!?]"
    with pytest.raises(Refused, match=r"the pattern .* takes too long"):
        patterns.value({"alpha_pattern": {slow: 1}}, "alpha_pattern", "abcdefgh" * 30, 2)


SETTINGS = ("{not json", "[1]", "[" * 100_000, '{"lora_alpha": "x"}', "\x00\xff")


@pytest.mark.parametrize("text", SETTINGS, ids=range(len(SETTINGS)))
def test_pefts_settings_beside_a_file_are_no_more_trusted(text, model, sides, tmp_path):
    """Law: adapter_config.json is a stranger's too."""
    tensors = {key.replace("unet.", "base_model.model."): one for key, one in lora(sides).items()}
    save_file(tensors, tmp_path / "odd.safetensors")
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    refused(model, tmp_path / "odd.safetensors", r"is damaged|no number")


def weight(folder, file):
    """How far the layer moves."""
    model = sfumato.load(folder)
    layer = adapter.peft_target(model.denoiser).get_submodule(LAYER)
    before = layer.weight.clone()
    model.add_lora(file)
    return layer.weight - before


@pytest.mark.parametrize("name", ["alpha", "lora_alpha", "network_alpha"])
def test_an_alpha_that_only_the_header_has_is_read(name, folder, sides, tmp_path):
    """Law: ΔW = alpha/rank · B·A, where the alpha stands beside no tensor; elsewhere nothing changes."""
    tensors = lora(sides)
    save_file(tensors, tmp_path / "plain.safetensors")
    plain = weight(folder, tmp_path / "plain.safetensors")
    a, b = tensors.values()
    torch.testing.assert_close(plain, b @ a, atol=1e-5, rtol=1e-4)
    save_file(tensors, tmp_path / "header.safetensors", metadata={name: "1.0", "ss_network_alpha": "64"})
    torch.testing.assert_close(
        weight(folder, tmp_path / "header.safetensors"), plain / 2, atol=1e-5, rtol=1e-4
    )
    own = tensors | {f"{KEY}.alpha": torch.tensor(4.0)}
    save_file(own, tmp_path / "both.safetensors", metadata={name: "1.0"})
    torch.testing.assert_close(weight(folder, tmp_path / "both.safetensors"), 2 * plain, atol=1e-5, rtol=1e-4)
    said = metadata(lora_alpha=6, r=2) | {name: "1.0"}
    save_file(tensors, tmp_path / "peft.safetensors", metadata=said)
    torch.testing.assert_close(weight(folder, tmp_path / "peft.safetensors"), 3 * plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern", ["attn1.to_q", r"down_blocks\.\d+\..*to_q", "(down|up)_blocks.*"])
def test_patterns_of_peft_mean_what_they_meant(pattern, sides, tmp_path):
    """Law: ends of names and regular expressions choose the alpha of a layer."""
    save_file(
        lora(sides),
        tmp_path / "a.safetensors",
        metadata=metadata(lora_alpha=4, r=2, alpha_pattern={pattern: 8}),
    )
    (change,) = lora_file.read(tmp_path / "a.safetensors")[0].values()
    assert change.scale == 4
    save_file(
        lora(sides),
        tmp_path / "a.safetensors",
        metadata=metadata(lora_alpha=4, r=2, alpha_pattern={"to_v": 8}),
    )
    (change,) = lora_file.read(tmp_path / "a.safetensors")[0].values()
    assert change.scale == 2


def test_a_weight_that_is_no_number_is_refused(folder, sides, tmp_path):
    """Law: of a LoRA as of everything else."""
    save_file(lora(sides), tmp_path / "a.safetensors")
    with pytest.raises(Refused, match="is no weight"):
        sfumato.load(folder).add_lora(tmp_path / "a.safetensors", NAN)
