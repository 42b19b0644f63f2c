"""Laws of what a checkpoint was trained under: said by the file or by its scheduler, it is heard whole."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import sfumato
from sfumato.errors import Refused

from . import single_files
from .zoo import ZOO

SCHEDULERS = (
    "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler",
    "LMSDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DEISMultistepScheduler",
    "DPMSolverSinglestepScheduler",
)  # fmt: skip
STEPS = torch.tensor([0, 10, 200, 500, 800, 990, 998])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    ZOO["stable-diffusion-1.5"].make("snr").save_pretrained(folder)
    return folder


def with_scheduler(base, folder, name, **known):
    """A copy of the base whose scheduler is of this class."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | known
    made = getattr(diffusers, name).from_config(config)
    made.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["diffusers", name]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def snr(theory) -> torch.Tensor:
    """Signal over noise at some trained steps."""
    a, s = theory.data((STEPS.double() + 1) / 1000)
    return (a / s).square()


def rescaled(config) -> torch.Tensor:
    """The same of diffusers' own DDIM, whose table is rescaled."""
    kept = diffusers.DDIMScheduler.from_config({**config, "rescale_betas_zero_snr": True}).alphas_cumprod[
        STEPS
    ]
    return (kept / (1 - kept)).double()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_table_is_rescaled_whole_whoever_steps(name, base, tmp_path):
    """Law: with rescale_betas_zero_snr every step has the level of DDIM's table, and the last no signal."""
    known = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    model = sfumato.load(with_scheduler(base, tmp_path / "model", name, **known))
    torch.testing.assert_close(
        snr(model.theory), rescaled(model.origin.scheduler.config), rtol=2e-3, atol=1e-8
    )
    assert float(model.theory.data(torch.ones(1))[0]) == 0
    held = model.origin.scheduler.alphas_cumprod
    assert torch.allclose((held / (1 - held))[STEPS].double(), snr(model.theory), rtol=2e-3, atol=1e-6)
    (picture,) = model.generate(["a"], steps=3, height=16, width=16, guidance=1.0)
    assert picture.size == (16, 16)


@pytest.mark.parametrize("name", ["PNDMScheduler", "HeunDiscreteScheduler"])
def test_a_table_that_is_not_rescaled_stays(name, base, tmp_path):
    """Law: without the word nothing changes."""
    model = sfumato.load(with_scheduler(base, tmp_path / "model", name))
    plain = getattr(diffusers, name).from_config(model.origin.scheduler.config)
    assert torch.equal(model.origin.scheduler.alphas_cumprod, plain.alphas_cumprod)


EMPTY = torch.tensor([])
MARKERS = {
    "keys": ({"v_pred": EMPTY, "ztsnr": EMPTY}, {}, "v_prediction", True),
    "v alone": ({"v_pred": EMPTY}, {}, "v_prediction", False),
    "header": ({}, {"modelspec.prediction_type": "v"}, "v_prediction", False),
    "sd-scripts": (
        {},
        {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
        "v_prediction",
        True,
    ),
    "epsilon": ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon", False),
    "nothing": ({}, {}, "epsilon", False),
}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """(weights as one file has them, the folder that describes them)."""
    folder = tmp_path_factory.mktemp("sdxl") / "folder"
    pipe = ZOO["stable-diffusion-xl"].make("snr")
    pipe.save_pretrained(folder)
    return single_files.whole("stable-diffusion-xl", pipe), folder


@pytest.mark.parametrize("how", list(MARKERS))
def test_a_file_says_what_it_was_trained_under(how, sdxl, tmp_path):
    """Law: v_pred and ztsnr, as keys or in the header, are the theory that is trained and drawn with."""
    weights, folder = sdxl
    keys, header, answer, ends = MARKERS[how]
    save_file(weights | keys, tmp_path / "model.safetensors", metadata=header or None)
    model = sfumato.load(tmp_path / "model.safetensors", config=folder)
    assert model.theory.name == ("ddpm-velocity" if answer == "v_prediction" else "ddpm-epsilon")
    assert (float(model.theory.data(torch.ones(1))[0]) == 0) == ends
    config = model.origin.scheduler.config
    assert config.prediction_type == answer and bool(config.get("rescale_betas_zero_snr")) == ends
    if ends:
        torch.testing.assert_close(snr(model.theory), rescaled(config), rtol=2e-3, atol=1e-8)
        model.save(tmp_path / "saved")
        again = sfumato.load(tmp_path / "saved")
        assert again.theory.name == model.theory.name and float(again.theory.data(torch.ones(1))[0]) == 0
        assert float(model.sampling.times(4, (4, 8, 8))[0]) == 1  # drawing begins at pure noise


@pytest.mark.parametrize(
    ("keys", "header", "words"),
    [
        ({"edm_mean": torch.zeros(4)}, {}, "trained under EDM"),
        ({"edm_vpred.sigma_max": torch.zeros(())}, {}, "trained under EDM"),
        ({}, {"modelspec.prediction_type": "sigma"}, 'prediction_type is "sigma"'),
    ],
)
def test_a_theory_that_is_not_read_is_refused(keys, header, words, sdxl, tmp_path):
    """Law: a file that says another theory is not taken for epsilon."""
    weights, folder = sdxl
    save_file(weights | keys, tmp_path / "model.safetensors", metadata=header or None)
    with pytest.raises(Refused, match=words):
        sfumato.load(tmp_path / "model.safetensors", config=folder)
