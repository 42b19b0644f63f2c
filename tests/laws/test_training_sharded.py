"""Laws of divided networks: each process holds some rows, and together they are the run of one process."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_processes import run_on
from training_world import fingerprint

from sfumato.errors import Failed, Refused
from sfumato.models import files
from sfumato.models.files import Rows
from sfumato.run_folder import RunFolder
from sfumato.training.distributed import strategy
from sfumato.training.distributed.processes import Processes
from sfumato.training.optim.optimizers import OPTIMIZERS
from sfumato.training.settings import TrainSettings
from sfumato.training.state import checkpoint, posthoc_ema

QUIET = {"validate_every": 0, "save_every": 100}


def groups(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the last checkpoint."""
    last = RunFolder.open(folder).checkpoint_folders()[-1]
    names = ("model", "ema", "optimizer", "power-0.050")
    return {f"{group} {name}": one for group in names for name, one in files.read(last, group).items()}


def distance(folder: Path, other: Path) -> float:
    """How far apart what two runs ended with is, relative to its size."""
    one, two = groups(folder), groups(other)
    assert one.keys() == two.keys() and len(one) > 20
    far = sum(float((one[name].double() - two[name].double()).square().sum()) for name in one)
    return (far / sum(float(tensor.double().square().sum()) for tensor in one.values())) ** 0.5


@pytest.mark.precisions("fp32", "bf16", "fp16")
def test_copies_and_divided_networks_are_the_run_of_one_process(tmp_path):
    """Also with a batch in parts, whose gradients are sent only once, and with a clipped norm."""
    changes = {**QUIET, "steps": 4, "max_grad_norm": 0.05}
    run_on(1, tmp_path / "one", gradient_accumulation=4, **changes)
    for name in ("ddp", "fsdp"):
        run_on(2, tmp_path / name, parallel=name, gradient_accumulation=2, **changes)
        assert distance(tmp_path / "one", tmp_path / name) < 1e-6
    last = RunFolder.open(tmp_path / "fsdp").checkpoint_folders()[-1]
    assert checkpoint.find_damage(last) is None
    assert len(list(last.glob("model-*-of-00002.safetensors"))) == 2
    halves = [load_file(file)["first.weight"] for file in sorted(last.glob("model-*"))]
    assert [len(half) for half in halves] == [8, 8]


@pytest.mark.slow
@pytest.mark.precisions("fp32", "bf16")
def test_hybrid_on_four_processes_is_the_run_of_one_process(tmp_path):
    run_on(1, tmp_path / "one", gradient_accumulation=4, **QUIET)
    run_on(4, tmp_path / "four", parallel="hsdp", hsdp_shard_size=2, **QUIET)
    assert distance(tmp_path / "one", tmp_path / "four") < 1e-6


@pytest.mark.slow
@pytest.mark.precisions("fp32", "bf16")
def test_a_run_moves_between_processes_and_strategies(tmp_path):
    """1 → 2 copies → 2 divided → 4 in two copies → 1, with measurements and snapshots on the way."""
    changes = {"validate_every": 3, "ema_snapshot_every": 4}
    run_on(1, tmp_path / "through", gradient_accumulation=4, **changes)
    ways = (
        (1, 3, "auto", 4),
        (2, 5, "ddp", 2),
        (2, 8, "fsdp", 2),
        (4, 9, "hsdp", 1),
        (2, 10, "fsdp", 2),
        (1, 12, "fsdp", 4),
    )
    for count, steps, name, parts in ways:
        more = {"parallel": name, "gradient_accumulation": parts, "hsdp_shard_size": 2 if count == 4 else 0}
        run_on(count, tmp_path / "moved", steps=steps, **more, **changes)
    assert distance(tmp_path / "through", tmp_path / "moved") < 1e-6
    found = posthoc_ema.snapshots(RunFolder.open(tmp_path / "moved"))
    assert {(one.step, one.length) for one in found} >= {(8, 0.05), (8, 0.10), (12, 0.05), (12, 0.10)}
    posthoc_ema.reconstruct(RunFolder.open(tmp_path / "moved"), 0.07)


@pytest.mark.parametrize("optimizer", ["lion", "ademamix", "schedule-free"])
@pytest.mark.slow
@pytest.mark.precisions("fp32", "bf16")
def test_every_elementwise_optimizer_moves_rows_as_it_moves_whole_weights(tmp_path, optimizer: str):
    if (package := OPTIMIZERS[optimizer].package) and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    changes = {**QUIET, "optimizer": optimizer, "steps": 4, "learning_rate": 1e-3}
    run_on(1, tmp_path / "one", gradient_accumulation=2, **changes)
    run_on(2, tmp_path / "two", parallel="fsdp", **changes)
    one, two = (
        files.read(RunFolder.open(tmp_path / n).checkpoint_folders()[-1], "model") for n in ("one", "two")
    )
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.precisions("fp32", "bf16")
def test_a_divided_run_goes_on_bit_for_bit(tmp_path):
    changes = {**QUIET, "parallel": "fsdp"}
    through = run_on(2, tmp_path / "through", steps=4, **changes)
    run_on(2, tmp_path / "parted", steps=2, **changes)
    run_on(2, tmp_path / "parted", steps=4, **changes)
    assert fingerprint(tmp_path / "parted") == through


# ----------------------------------------------------------------------------- pieces on the disk


def written(folder: Path) -> dict[str, Tensor]:
    """A group in three pieces, of which one tensor has rows in two; what the whole tensors are."""
    whole = {"a": torch.randn(7, 3), "b": torch.randn(5), "step": torch.tensor(3.0)}
    pieces = [
        ({"a": whole["a"][:4], "step": whole["step"]}, {"a": [0, 0], "step": []}),
        ({"a": whole["a"][4:6], "b": whole["b"][:2]}, {"a": [4, 0], "b": [0]}),
        ({"a": whole["a"][6:], "b": whole["b"][2:]}, {"a": [6, 0], "b": [2]}),
    ]
    for number, (held, firsts) in enumerate(pieces, 1):
        checkpoint.write_file(folder / f"model-{number:05d}-of-00003.safetensors", held, firsts)
    return whole


def test_any_rows_are_read_from_whichever_pieces_have_them(tmp_path):
    whole = written(tmp_path)
    for first in range(8):
        for count in range(8 - first):
            wanted = {"a": Rows(first, count)}
            found = files.read(tmp_path, "model", lambda name, shape, w=wanted: w.get(name))
            assert torch.equal(found["a"], whole["a"][first : first + count])
            assert torch.equal(found["b"], whole["b"]) and torch.equal(found["step"], whole["step"])


def test_a_missing_piece_is_seen(tmp_path):
    written(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match='rows 4 to 7 of "a"'):
        files.read(tmp_path, "model")


def test_torch_reads_the_pieces_too(tmp_path):
    """The headers are those of torch.distributed.checkpoint's safetensors storage."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    whole = written(tmp_path)
    found = {name: torch.zeros_like(tensor) for name, tensor in whole.items() if tensor.ndim}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in found.items():
        assert torch.equal(tensor, whole[name])


def test_a_lost_piece_makes_a_checkpoint_damaged(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    place = run.checkpoint_folder(1)
    place.mkdir()
    written(place)
    checkpoint.write_state_and_manifest(
        place, {"step": 1}, {file.name: checkpoint.checksum_entry(file) for file in place.iterdir()}
    )
    assert checkpoint.find_damage(place) is None
    (place / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in (checkpoint.find_damage(place) or "")
    with pytest.raises(Failed, match="no earlier checkpoint"):
        checkpoint.newest_intact(run)


# ----------------------------------------------------------------------------- the choice


def network(trained: int, frozen: int) -> nn.Module:
    """Two layers on no device, one of them frozen."""
    with torch.device("meta"):
        made = nn.ModuleList([nn.Linear(1000, trained, bias=False), nn.Linear(1000, frozen, bias=False)])
    made[1].requires_grad_(False)
    return made


@pytest.mark.parametrize(
    ("trained", "frozen", "gigabytes", "machine", "expected"),
    [
        (1000, 1, 10, 8, "ddp"),
        (1000, 100_000, 0.01, 8, "ddp"),
        (1_000_000, 1, 40, 8, "fsdp"),
        (1_000_000, 1, 40, 4, "hsdp"),
        (1_000_000, 1, 8, 4, "fsdp"),
    ],
)
def test_auto_copies_what_is_small_and_divides_what_is_large(
    monkeypatch, trained: int, frozen: int, gigabytes: float, machine: int, expected: str
):
    monkeypatch.setattr(strategy, "memory_of", lambda device: gigabytes * 1e9)
    monkeypatch.setattr(strategy, "processes_here", lambda count, network: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(machine))
    chosen = strategy.choose(TrainSettings(), network(trained, frozen), Processes(0, 8))
    assert chosen.name == expected and chosen.why
    assert strategy.choose(TrainSettings(), network(trained, frozen), Processes()).name == "one"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"exact_elastic": True}, "whole gradients"),
        ({"weight_dtype": "bf16"}, r"train\.weight_dtype"),
        ({"optimizer": "muon"}, "whole matrices"),
        ({"optimizer": "adamw-8bit"}, "whole matrices"),
        ({"offload": True}, r"train\.offload"),
        ({"parallel": "hsdp", "hsdp_shard_size": 3}, r"train\.hsdp_shard_size"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_a_sentence(changes: dict[str, object], told: str):
    settings = TrainSettings(**{"parallel": "fsdp", **changes})
    with pytest.raises(Refused, match=told):
        strategy.choose(settings, network(10, 1), Processes(0, 4))
