"""Laws of LyCORIS files of others: LoHa, LoKr and their kin are drawn with, and gone on from."""

import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato.errors import Refused
from sfumato.models.lora import adapter, lora_file
from sfumato.workflow.export import export

from .test_export import raw, runs
from .test_init_adapter import begun
from .zoo import ZOO

__all__ = ["runs"]
NAMED = {"lycoris": "lycoris_", "kohya": "lora_unet_", "comfyui": "diffusion_model."}


def written(run, file, style):
    """A run's LoHa or LoKr under the keys that LyCORIS writes, with its alphas."""
    network, alpha = adapter.peft_target(sfumato.load(run).denoiser), 3.0
    tensors = {}
    for key, tensor in adapter.state(network).items():
        layer, _, part = key.rpartition(".")
        name = NAMED[style] + (layer if style == "comfyui" else layer.replace(".", "_"))
        tensors[f"{name}.{part}"] = tensor.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    for key in [key for key in tensors if key.endswith(".lokr_w1")]:
        if key.replace("w1", "w2") in tensors:  # both whole: LyCORIS then knows no alpha
            tensors[key] = tensors[key] * alpha / 2
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("name", "kind", "style"),
    [
        pytest.param("stable-diffusion-1.5", "loha", "lycoris", marks=pytest.mark.slow),
        pytest.param("stable-diffusion-1.5", "lokr", "kohya", marks=pytest.mark.slow),
        ("flux-dev", "lokr", "comfyui"),
    ],
)
def test_files_of_lycoris_answer_as_peft_and_training_goes_on_there(name, kind, style, runs, tmp_path):
    """Law: merged into the weights, and as the beginning of a run, the file answers as peft's own layers."""
    run = runs(name, kind=kind, **({"both": True, "divisor": 4} if name == "flux-dev" else {}))
    file, there = written(run, tmp_path / "style.safetensors", style), sfumato.load(run)
    there.info |= {"resolution": 16, "height": 16, "width": 16}
    fresh = sfumato.load(sfumato.models.io.adapter_run.read_base(run / "model")[0])
    fresh.info = there.info
    assert fresh.add_lora(file)
    torch.testing.assert_close(raw(fresh), raw(there), atol=1e-4, rtol=1e-3)
    model = begun(name, tmp_path, run, [f"model.init_adapter={file}", f"model.train={kind}"]).model()
    there.info = model.info
    torch.testing.assert_close(raw(model), raw(there), atol=1e-4, rtol=1e-3)
    with pytest.raises(Refused, match=f'say model.train = "{kind}", or name it as model.merge_loras'):
        begun(name, tmp_path / "b", run, [f"model.init_adapter={file}"])


@pytest.mark.parametrize(
    ("name", "kind", "to"), [("flux-dev", "lokr", "comfyui"), ("pixart-sigma", "loha", "comfyui")]
)
def test_what_is_trained_so_leaves_as_lycoris_reads_it(name, kind, to, runs, tmp_path):
    """Law: LoHa and LoKr go to ComfyUI and come back with the run's answer; diffusers is refused."""
    run = runs(name, kind=kind)
    done = export(run, to, tmp_path / "out")
    assert done.difference < 1e-3 < done.effect
    with pytest.raises(Refused, match="diffusers reads LoRA only"):
        export(run, "diffusers", tmp_path / "no")


def test_tucker_kernels_columns_and_whole_differences_are_read(tmp_path):
    """Law: ΔW of a Tucker LoCon, LoHa and LoKr, of DoRA by columns and of whole differences is LyCORIS's."""
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))  # noqa: E731
    down, mid, up = draw(3, 8, 1, 1), draw(3, 3, 3, 3), draw(6, 3, 1, 1)
    kernel, a, b = draw(2, 2, 3, 3), draw(2, 3), draw(2, 4)
    file = tmp_path / "odd.safetensors"
    tensors = {
            "a.lora_down.weight": down, "a.lora_mid.weight": mid, "a.lora_up.weight": up,
            "a.alpha": torch.tensor(6.0), "b.lokr_w1": draw(2, 2), "b.lokr_t2": kernel, "b.lokr_w2_a": a,
            "b.lokr_w2_b": b, "c.hada_t1": kernel, "c.hada_w1_a": a, "c.hada_w1_b": b, "c.hada_t2": kernel,
            "c.hada_w2_a": a, "c.hada_w2_b": b, "c.alpha": torch.tensor(1.0), "d.diff": draw(5),
            "d.diff_b": draw(5), "e.lora_down.weight": draw(2, 4), "e.lora_up.weight": draw(5, 2),
            "e.dora_scale": torch.arange(1.0, 5)[None],
    }  # fmt: skip
    save_file({key: one.clone() for key, one in tensors.items()}, file)
    changes, _ = lora_file.read(file)
    tucker = torch.einsum("or,rskl,si->oikl", up[..., 0, 0], mid, down[..., 0, 0])
    torch.testing.assert_close(changes["a"].delta(torch.Size([6, 8, 3, 3])), 2 * tucker)
    small = torch.einsum("ijkl,ip,jr->prkl", kernel, a, b)
    kron = torch.kron(draw(2, 2)[..., None, None], small.contiguous())
    torch.testing.assert_close(changes["b"].delta(torch.Size([6, 8, 3, 3])), kron)
    assert changes["b"].sides(torch.Size([6, 8, 3, 3])) == (6, 72)
    torch.testing.assert_close(changes["c"].delta(torch.Size([3, 4, 3, 3])), small * small / 2)
    torch.testing.assert_close(changes["d"].delta(torch.Size([5])), draw(5))
    long = changes["e"].lengthened(draw(5, 4))
    torch.testing.assert_close(long.norm(dim=0), torch.arange(1.0, 5))


@pytest.mark.parametrize("how", [{"use_dora": True}, {"use_rslora": True}])
def test_ranks_and_alphas_by_pattern_are_read_as_peft_means_them(how, tmp_path):
    """Law: what diffusers' save_lora_weights writes, also of convolutions, answers as peft does."""
    import diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    ZOO["stable-diffusion-1.5"].make("patterns").save_pretrained(tmp_path / "base")
    model, fresh = sfumato.load(tmp_path / "base"), sfumato.load(tmp_path / "base")
    network = adapter.peft_target(model.denoiser)
    network.add_adapter(
        LoraConfig(
            r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_out.0", "conv1"],
            rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 3.0}, **how,
        )
    )  # fmt: skip
    draw = torch.Generator().manual_seed(1)
    for name, weight in network.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=draw)
    config = {
        k: sorted(v) if isinstance(v, set) else v for k, v in network.peft_config["default"].to_dict().items()
    }
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(network), unet_lora_adapter_metadata=config
    )
    fresh.add_lora(tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(raw(fresh), raw(model), atol=1e-4, rtol=1e-3)


def test_adapters_of_other_kinds_are_refused_by_name(tmp_path):
    """Law: OFT, GLoRA and IA³ are told from damage, and the way out is said."""
    save_file({"lora_unet_a.oft_blocks": torch.ones(2, 2, 2)}, tmp_path / "oft.safetensors")
    with pytest.raises(Refused, match=r"holds OFT .*Merge it into its base"):
        lora_file.read(tmp_path / "oft.safetensors")
