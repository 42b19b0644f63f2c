"""Laws of LoRA files as material: what is made of them does what they did, as others load it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sfumato
from sfumato.cli import app
from sfumato.errors import Refused
from sfumato.models.lora import adapter, key_conversion
from sfumato.workflow.lora_files import extract, lora_info, merge
from sfumato.workflow.lora_files.low_rank import LowRank, of_matrix

from .test_training import make_base

RANK = 3
NAMES = ("flux-dev", "stable-diffusion-1.5")
QUICK = (("flux-dev", "diffusers"), ("flux-dev", "comfyui"), ("stable-diffusion-1.5", "kohya"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny pipelines, each with two LoRAs of it in diffusers' names: (folder, [file, file])."""
    made = {}

    def of(name: str):
        if name not in made:
            home = tmp_path_factory.mktemp(name)
            base = make_base(name, home)
            made[name] = (
                base,
                [write(sfumato.load(base), home / f"{seed}.safetensors", seed) for seed in (1, 2)],
            )
        return made[name]

    return of


def write(model, file, seed: int):
    """A LoRA of some layers, with an alpha that is not its rank, of the text encoder too."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    network = model.denoiser.family.network
    homes = {network: adapter.peft_target(model.denoiser), "text_encoder": model.origin.text_encoder}
    for home, one in homes.items():
        layers = [
            (name, layer)
            for name, layer in one.named_modules()
            if isinstance(layer, torch.nn.Linear) and name.endswith(("to_q", "to_v", "to_k", "q_proj"))
        ]
        for name, layer in layers[seed % 2 :]:
            rows, columns = layer.weight.shape
            tensors[f"{home}.{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw)
            tensors[f"{home}.{name}.lora_B.weight"] = 0.1 * torch.randn(rows, RANK, generator=draw)
            tensors[f"{home}.{name}.alpha"] = torch.tensor(1.5)
    save_file(tensors, file, {"modelspec.trigger_phrase": "sks, toy", "steps": "7"})
    return file


def weights(model) -> dict[str, torch.Tensor]:
    """Every matrix that a LoRA may change."""
    networks = key_conversion.networks(model)
    return {
        f"{home}.{name}": layer.weight.detach().float()
        for home, one in networks.items()
        for name, layer in key_conversion.layers_of(one).items()
    }


def with_loras(base, *files) -> dict[str, torch.Tensor]:
    model = sfumato.load(base)
    for file, amount in files:
        model.add_lora(file, amount)
    return weights(model)


def apart(one, other) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        pytest.param(name, to, marks=[pytest.mark.slow] * ((name, to) not in QUICK))
        for name in NAMES
        for to in ("diffusers", "comfyui", "kohya")
    ],
)
def test_a_sum_of_files_makes_the_weights_that_the_files_make_one_after_the_other(name, to, bases, tmp_path):
    """Law: exactly, in every program's names; without a rank no change is lost."""
    base, (one, two) = bases(name)
    done = merge([(one, 0.5), (two, -2.0)], base, to, tmp_path / "sum")
    (file,) = done.files
    assert done.kept == pytest.approx(1.0) and done.apart < 1e-5 and max(done.ranks) >= 2 * RANK
    assert apart(with_loras(base, (file, 1.0)), with_loras(base, (one, 0.5), (two, -2.0))) < 1e-5
    if to == "diffusers":
        pipe = sfumato.load(base).origin
        pipe.load_lora_weights(file)
        pipe.fuse_lora()
        network = getattr(pipe, sfumato.load(base).denoiser.family.network)
        found = {f".{n}": layer.weight.float() for n, layer in key_conversion.layers_of(network).items()}
        expected = with_loras(base, (one, 0.5), (two, -2.0))
        assert apart(found, {n: w for n, w in expected.items() if n in found}) < 1e-5


def test_a_smaller_rank_is_the_nearest_there_is():
    """Law: of the factors what the singular values of the whole matrix give; energy keeps what it says."""
    draw = torch.Generator().manual_seed(0)
    change = LowRank(
        torch.randn(40, 8, generator=draw),
        torch.randn(8, 3 * 3 * 5, generator=draw),
        torch.Size([40, 5, 3, 3]),
    )
    whole = change.whole().flatten(1).double()
    values = torch.linalg.svdvals(whole)
    for rank in (1, 4, 8, 20):
        small = change.reduced(rank)
        assert small.rank == min(rank, 8) and small.shape == change.shape
        missed = (small.whole().flatten(1).double() - whole).norm()
        torch.testing.assert_close(missed, values[rank:].norm(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            of_matrix(change.whole(), rank, None).whole(), small.whole(), atol=1e-4, rtol=1e-3
        )
    shares = values.square().cumsum(0) / values.square().sum()
    for energy in (0.3, 0.7, 0.95, 1.0):
        rank = change.reduced(energy=energy).rank
        assert shares[rank - 1] >= energy - 1e-9 and (rank == 1 or shares[rank - 2] < energy)
    assert change.norm() == pytest.approx(float(whole.norm()), rel=1e-5)


def test_what_a_fine_tuned_model_learned_is_extracted(bases, tmp_path):
    """Law: at its own rank the difference comes back; layers that are no matrices are named."""
    base, (one, _) = bases("stable-diffusion-1.5")
    model = sfumato.load(base)
    model.add_lora(one, 1.0)
    norm = next(n for n, _ in model.denoiser.network.named_modules() if n.endswith("conv_norm_out"))
    with torch.no_grad():
        model.denoiser.network.get_submodule(norm).weight += 0.5
    model.save(tmp_path / "tuned")
    done = extract(tmp_path / "tuned", base, "comfyui", tmp_path / "out", rank=RANK)
    assert done.kept == pytest.approx(1.0, abs=1e-4) and set(done.ranks) == {RANK} and norm in done.notes[0]
    assert apart(with_loras(base, (done.files[0], 1.0)), with_loras(base, (one, 1.0))) < 1e-4
    with pytest.raises(Refused, match="nothing to extract"):
        extract(base, base, "comfyui", tmp_path / "no", rank=2)


def test_a_file_says_what_it_is(bases):
    """Law: kinds, ranks, scales and words are the file's; norms are those of its products."""
    base, (one, _) = bases("flux-dev")
    found = lora_info(one)
    tensors = load_file(one)
    layers = {name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")}
    assert found.kinds == {"lora": len(layers)} and found.ranks == {RANK: len(layers)}
    assert found.scales == {0.5: len(layers)} and found.words == ["sks", "toy"] and found.told["steps"] == "7"
    square = sum(
        float((0.5 * tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"]).square().sum())
        for n in layers
    )
    assert sum(norm**2 for norm in found.blocks.values()) == pytest.approx(square, rel=1e-5)
    beside = lora_info(one, base)
    before, after = weights(sfumato.load(base)), with_loras(base, (one, 1.0))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    block = [name for name in changed if name.startswith(".transformer_blocks.0.")]
    share = sum(float((after[n] - before[n]).square().sum()) for n in block) ** 0.5
    share /= sum(float(before[n].square().sum()) for n in block) ** 0.5
    assert beside.relative["transformer_blocks.0"] == pytest.approx(share, rel=1e-4)


def test_the_commands_write_what_python_writes(bases, tmp_path, monkeypatch):
    base, (one, two) = bases("flux-dev")
    monkeypatch.chdir(tmp_path)

    def answer(*words: object):
        found = CliRunner().invoke(app, ["lora", *map(str, words)])
        assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
        return found

    done = answer(
        "merge", f"{one}:0.5", f"{two}:0.25", "--base", base, "--to", "kohya", "--rank", 2, "--json"
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["kept"] < 1 and set(map(int, found["ranks"])) <= set(range(1, 7))
    assert answer("info", found["files"][0]).stdout.count("\n") > 5
    assert answer("convert", one, "--base", base, "--to", "comfyui").exit_code == 0
    assert answer("resize", one, "--base", base, "--energy", "0.9").exit_code == 0
    for words, why in (
        (("resize", one, "--base", base), "how small"),
        (("merge", one, "--base", base, "--energy", "2"), "at most 1"),
        (("merge", one, "--base", base, "--rank", "0"), "rank 1 at least"),
        (("convert", one, "--base", base, "--to", "forge"), "forge"),
        (("info", tmp_path / "none.safetensors"), "does not exist"),
        (("merge", f"{one}:x", "--base", base), "no weight"),
    ):
        refused = answer(*words)
        assert refused.exit_code == 2 and why in refused.stderr, (words, refused.stderr)


def test_what_is_no_product_needs_a_rank(bases, tmp_path):
    """Law: LoHa and DoRA become LoRA as near as the rank allows, and are refused without one."""
    base, _ = bases("stable-diffusion-1.5")
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    side = sfumato.load(base).denoiser.network.get_submodule(layer).weight.shape[0]
    draw = torch.Generator().manual_seed(3)
    key = f"lycoris_{layer.replace('.', '_')}"
    parts = {
        f"{key}.hada_{one}": 0.3 * torch.randn((side, 2) if one.endswith("a") else (2, side), generator=draw)
        for one in ("w1_a", "w1_b", "w2_a", "w2_b")
    }
    save_file(parts, tmp_path / "loha.safetensors")
    with pytest.raises(Refused, match="--rank"):
        merge([(tmp_path / "loha.safetensors", 1.0)], base, "kohya", tmp_path / "no")
    done = merge([(tmp_path / "loha.safetensors", 1.0)], base, "kohya", tmp_path / "out", rank=4)
    same = with_loras(base, (tmp_path / "loha.safetensors", 1.0))  # the product of two of rank 2 has rank 4
    assert apart(with_loras(base, (done.files[0], 1.0)), same) < 1e-5
