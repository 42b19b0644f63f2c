"""Laws of a whole run on a GPU, as `sfumato.train` puts it together."""

import pytest
import torch

import sfumato
from families.test_training import write_recipe
from sfumato.errors import Refused
from sfumato.models.interface import Model, StagePlacement
from sfumato.recipe import Recipe
from sfumato.run_folder import RunFolder
from sfumato.training.estimate import probe
from sfumato.training.estimate.memory import MemoryBreakdown
from sfumato.workflow import train_run
from sfumato.workflow.planning.plan import device_bytes, plan, stage_bytes

KEYS = ("train.device=cuda", "train.steps=2", "train.warmup_steps=1", "train.log_every=1", "sample.steps=2")


def place(module) -> set[str]:
    return {one.device.type for one in (*module.parameters(), *module.buffers())}


@pytest.fixture(autouse=True)
def fast(monkeypatch) -> None:
    """How fast the device multiplies is not asked: a CPU would be busy for long."""
    monkeypatch.setattr(probe, "flops_per_second", lambda *given, **named: 1e12)


def test_a_plan_says_what_a_gpu_holds_in_each_part_of_a_run(gpu, tmp_path):
    """Law: codec and text encoders count where they work, blocks that are lent are not refused."""
    recipe = write_recipe("pixart-sigma", tmp_path, 'train = "lora"', "rank = 2")
    lent = ("train.offload=true", "train.gradient_checkpointing=1")
    found = plan(Recipe.read(recipe, [*KEYS, *lent]))
    assert found["device_gb"].keys() == {"encode", "steps", "draw"}
    model = sfumato.load(tmp_path / "base")
    both = stage_bytes(model.codec) + stage_bytes(model.conditioner)
    step = MemoryBreakdown(*[10] * 6)
    assert device_bytes(model, step, {}) == {"encode": both + 10, "steps": 60 + both, "draw": 30 + both}
    model.placement = StagePlacement(torch.device("cuda"))
    larger = max(stage_bytes(model.codec), stage_bytes(model.conditioner))
    assert device_bytes(model, step, {}) == {"encode": both, "steps": 60, "draw": 30 + larger}
    with pytest.raises(Refused, match="gradient_checkpointing = 1"):
        plan(Recipe.read(recipe, [*KEYS, "train.offload=true"]))


@pytest.mark.parametrize(
    ("base", "more"),
    [
        ("pixart-sigma", ("model.base_quantization=nf4",)),
        pytest.param(
            "flux-dev",
            ("train.offload=true", "train.gradient_checkpointing=1", "sample.every=1"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_each_stage_is_on_the_device_only_while_it_works(base, more, gpu, tmp_path, monkeypatch):
    """Law: while the network is trained the codec and the text encoders are in the host's memory; they come
    for encoding and for previews."""
    places, fit, encode = {}, train_run.fit, Model.codec_input

    def looked_at(objective, network, *given, **named):
        model = objective.model
        places["training"] = [place(one) for one in (model.codec, model.conditioner)]
        places["network"] = {one.device.type for one in network.parameters() if one.requires_grad}
        return fit(objective, network, *given, **named)

    def asked(model, tensor):
        found = encode(model, tensor)
        places.setdefault("codec at work", set()).add(found.device.type)
        return found

    monkeypatch.setattr(train_run, "fit", looked_at)
    monkeypatch.setattr(Model, "codec_input", asked)
    recipe = write_recipe(base, tmp_path, 'train = "lora"', "rank = 2")
    run = sfumato.train(recipe, [*KEYS, *more, f"output={tmp_path}/run"])
    assert places == {
        "training": [{"cpu"}, {"cpu"}],
        "network": {"cuda"},
        "codec at work": {"cuda"},
    }
    events = list(RunFolder.open(run.path).events())
    assert [one["step"] for one in events if one["kind"] == "step"] == [1, 2]
    assert any(one["kind"] == "pictures" for one in events)
