"""Laws of what fits: the choice fits, nothing faster does, and the command says what it means."""

import pytest
import torch
from training_world import make

from sfumato.errors import Refused
from sfumato.models.build import new_denoiser
from sfumato.models.codecs.image import PixelCodec
from sfumato.models.condition import Condition
from sfumato.models.settings import ModelSettings
from sfumato.run_folder import RunFolder
from sfumato.settings import parse_bytes
from sfumato.theory import get
from sfumato.training.estimate import fit_memory
from sfumato.training.estimate import memory as memory_estimate
from sfumato.training.loop import loop as training_loop
from sfumato.training.settings import TrainSettings


@pytest.mark.parametrize(
    ("text", "wanted"), [("24GB", 24e9), ("24", 24e9), ("1.5 gb", 1.5e9), ("512MiB", 512 * 2**20)]
)
def test_sizes_are_read_as_people_write_them(text: str, wanted: float):
    assert parse_bytes(text) == wanted


@pytest.mark.parametrize("text", ["much", "24XB", "-3GB", "0", "1.2.3GB"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(Refused, match="24GB"):
        parse_bytes(text)


def counted(batch: int) -> memory_estimate.MemoryCount:
    codec = PixelCodec()
    words = ModelSettings(width=64, depth=4, heads=2, patch=2)
    network = new_denoiser(words, get("flow-matching"), codec, (8, 8))
    rows = [{"tokens": torch.ones(3, 8), "pooled": torch.ones(8)}] * batch
    inputs = torch.zeros(batch, codec.latent_channels, 16, 16), torch.ones(batch), Condition.stack(rows)
    return memory_estimate.count_memory(network, inputs)


def options(**changes: object) -> fit_memory.SearchSpace:
    known = {
        "train.gradient_accumulation",
        "train.gradient_checkpointing",
        "train.optimizer",
        "train.weight_dtype",
    }
    words = {"is_adapter": False, "on_gpu": False, "has_blocks": True, "has_8bit": True, "processes": 1}
    return fit_memory.SearchSpace(**{**words, "known": frozenset(known), **changes})


def test_the_choice_fits_and_nothing_faster_does():
    settings = TrainSettings(batch=16)
    found = fit_memory.memory_options(counted, settings, options())
    assert found[0].keys == {} and found[0].time == 1
    least = min(way.memory.peak for way in found)
    for share in (1.02, 0.9, 0.7):
        room = share * found[0].memory.peak / (1 - fit_memory.RESERVE)
        way, faster = fit_memory.fastest_fitting(found, room)
        assert way.memory.peak <= room
        assert all(one.memory.peak > room * (1 - fit_memory.RESERVE) for one in faster)
        assert len(way.reasons) == len(way.keys)
    with pytest.raises(Refused, match="Nothing fits"):
        fit_memory.fastest_fitting(found, 0.5 * least)


def test_a_frozen_base_is_narrowed_and_a_trained_one_is_not():
    settings = TrainSettings(batch=4)
    known = frozenset(
        {"train.gradient_accumulation", "model.base_quantization", "train.optimizer", "train.weight_dtype"}
    )
    adapter = fit_memory.memory_options(counted, settings, options(is_adapter=True, known=known))
    assert any("model.base_quantization" in way.keys for way in adapter)
    assert not any("train.optimizer" in way.keys for way in adapter)
    whole = fit_memory.memory_options(counted, settings, options(known=known))
    assert not any("model.base_quantization" in way.keys for way in whole)


def test_what_was_counted_once_is_known_until_something_changes():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    first = memory_estimate.count_memory(network, (torch.zeros(2, 4),))
    assert memory_estimate.count_memory(network, (torch.ones(2, 4),)) is first
    assert memory_estimate.count_memory(network, (torch.zeros(3, 4),)).kept > first.kept
    network[0].requires_grad_(False)
    assert memory_estimate.count_memory(network, (torch.zeros(2, 4),)).numbers == first.numbers / 2


def test_counting_copies_no_numbers():
    with torch.device("meta"):
        network = torch.nn.Sequential(torch.nn.Linear(1 << 17, 1 << 17, bias=False))
    assert memory_estimate.meta_copy(network)[0].weight.is_meta
    real = torch.nn.Linear(4, 4)
    assert memory_estimate.meta_copy(real).weight.is_meta and not real.weight.is_meta


def test_a_profile_names_every_part_of_a_step(tmp_path):
    objective, network, settings = make(steps=10)
    run = RunFolder.create(tmp_path / "run")
    training_loop.fit(objective, network, settings, run, 3, say=lambda _: None, profile=tmp_path / "profile")
    table = (tmp_path / "profile" / "table.txt").read_text()
    for name in ("data", "forward", "backward", "gradients", "optimizer", "averages", "the rest"):
        assert any(line.startswith(name) for line in table.splitlines()[:9]), table
    assert (tmp_path / "profile" / "trace.json").stat().st_size > 1000


def test_processes_divide_a_network_where_whole_copies_do_not_fit():
    settings = TrainSettings(batch=16)
    many = options(processes=4, known=frozenset({"train.parallel", "train.gradient_accumulation"}))
    found = fit_memory.memory_options(counted, settings, many)
    assert found[0].keys == {"train.parallel": "ddp"}
    divided = next(way for way in found if way.keys == {"train.parallel": "fsdp"})
    assert divided.memory.peak < 0.7 * found[0].memory.peak
    chosen, _ = fit_memory.fastest_fitting(found, divided.memory.peak / (1 - fit_memory.RESERVE) * 1.01)
    assert chosen.keys["train.parallel"] == "fsdp" and "divided" in " ".join(chosen.reasons)
    assert all(way.keys.get("train.gradient_accumulation", 1) * 4 <= 16 for way in found)
    nodes = fit_memory.memory_options(counted, settings, options(processes=4, shard_size=2, known=many.known))
    assert {way.keys["train.parallel"] for way in nodes} == {"ddp", "hsdp", "fsdp"}


def test_what_would_be_refused_is_not_proposed():
    known = frozenset(
        {"train.parallel", "train.gradient_accumulation", "train.weight_dtype", "train.optimizer"}
    )
    for way in fit_memory.memory_options(counted, TrainSettings(batch=16), options(processes=2, known=known)):
        narrow = {"train.weight_dtype", "train.optimizer"} & way.keys.keys()
        assert not (narrow and way.keys["train.parallel"] == "fsdp")
    muon = fit_memory.memory_options(
        counted, TrainSettings(batch=16, optimizer="muon"), options(processes=2, known=known)
    )
    assert {way.keys["train.parallel"] for way in muon} == {"ddp"}
