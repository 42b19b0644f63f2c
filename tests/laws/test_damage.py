"""Law: a changed byte, a file that ends early and a planted pickle are found in every kind of file we read.

Either a sentence names the file, or what comes back is what was written (from an older checkpoint, or
computed anew); never something else, and nothing in a file is ever executed.
"""

import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_world import fingerprint, train

import sfumato
from sfumato import models
from sfumato.data.sources import folder as sources_folder
from sfumato.data.store.store import Store, key
from sfumato.errors import Failed, Refused
from sfumato.models import files, locate
from sfumato.models.files import read_tensors, save_sealed
from sfumato.models.io import fitted_times
from sfumato.models.lora import lora_file
from sfumato.models.settings import ModelSettings
from sfumato.recipe import Recipe
from sfumato.run_folder import RunFolder
from sfumato.theory.times import FittedGrid
from sfumato.training.state import checkpoint, posthoc_ema


class Bomb:
    """What runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"a.weight": torch.randn(6, 5, generator=draw), "b.bias": torch.randn(7, generator=draw)}


def told(found: Any) -> str:
    """Numbers and words of whatever was read, to compare."""
    if isinstance(found, dict):
        return str({key: told(found[key]) for key in sorted(found)})
    return str(found.tolist()) if isinstance(found, torch.Tensor | np.ndarray) else str(found)


# ----------------------------------------------------------------------------- the kinds of files


@dataclass(frozen=True)
class Kind:
    """make(folder) → the file that is damaged; read(folder) → what is read of it, as a user would."""

    make: Callable[[Path], Path]
    read: Callable[[Path], str]


def make_run(folder: Path) -> RunFolder:
    run = RunFolder.create(folder / "run")
    state = {"seconds": 1.0}
    for step in (1, 2):
        checkpoint.save(run, step, {"model": tensors(), "ema": tensors(), "optimizer": tensors()}, state)
    return run


def make_checkpoint(name: str) -> Callable[[Path], Path]:
    return lambda folder: make_run(folder).checkpoint_folder(2) / name


def read_checkpoint(folder: Path) -> str:
    said: list[str] = []
    whole = checkpoint.newest_intact(RunFolder(folder / "run"), said.append)
    assert whole is not None and (whole.name == "step-000002" or "step-000002" in said[0]), said
    checkpoint.read_state(whole)
    return told(files.read(whole, "model"))


def read_drawn(folder: Path) -> str:
    return told(read_tensors(locate.newest_weights(RunFolder(folder / "run"))))


def make_snapshot(folder: Path) -> Path:
    run = RunFolder.create(folder / "run")
    for step in (4, 8):
        groups = {f"power-{length:.3f}": tensors() for length in posthoc_ema.LENGTHS}
        checkpoint.write(run.path / "averages" / f"step-{step:06d}", groups, {"step": step})
    return run.path / "averages" / "step-000008" / "power-0.050.safetensors"


def read_snapshot(folder: Path) -> str:
    return told(posthoc_ema.reconstruct(RunFolder(folder / "run"), 0.07)[0])


KEYS = [key(str(number), "", "", "") for number in range(6)]


def make_shard(folder: Path) -> Path:
    store = Store(folder / "store")
    return store.commit("pixels", {one: tensors() for one in KEYS})


def read_shard(folder: Path) -> str:
    store = Store(folder / "store")
    damaged = store.verify("pixels", KEYS)
    store.drop("pixels", damaged)
    missing = set(KEYS) - store.has("pixels", KEYS)
    assert not missing or damaged, "nothing is lost unsaid"
    if missing:
        store.commit("pixels", {one: tensors() for one in missing})
    return told({one: store.get("pixels", one) for one in KEYS})


def make_index(folder: Path) -> Path:
    make_shard(folder)
    index = Store(folder / "store").index("pixels")
    index.merge()
    return index.file


def make_model(folder: Path) -> Path:
    settings = ModelSettings(text_encoder="none", width=32, depth=1, heads=2, codec="pixels")
    model = models.new_model(settings, models.new_codec(settings), models.new_conditioner(settings))
    models.save(model, folder / "model")
    return folder / "model" / "denoiser" / "weights.safetensors"


def read_model(folder: Path) -> str:
    state = sfumato.load(folder / "model").denoiser.state_dict()
    return f"{sum(float(one.double().abs().sum()) for one in state.values()):.12e}"


def make_lora(folder: Path) -> Path:
    layers = {"unet.x.lora_A.weight": torch.ones(2, 5), "unet.x.lora_B.weight": torch.full((6, 2), 0.5)}
    save_sealed(layers, folder / "lora.safetensors", {})
    return folder / "lora.safetensors"


def read_lora(folder: Path) -> str:
    changes, _ = lora_file.read(folder / "lora.safetensors")
    return told({name: [told(one.down), told(one.up)] for name, one in changes.items()})


def make_times(folder: Path) -> Path:
    return fitted_times.write_times(folder, FittedGrid((1.5, 0.7, 0.0), (0.0, 0.4, 1.0)))


def read_times(folder: Path) -> str:
    found = fitted_times.read_times(folder)
    assert found is not None
    return told(found.to_dict())


def make_events(folder: Path) -> Path:
    run = RunFolder.create(folder / "run")
    for step in range(1, 5):
        run.event("step", step=step, loss=0.5 / step)
    run.close()
    return run.events_file


def read_events(folder: Path) -> str:
    """The curve; a line that is lost is named, and made up here from what it was."""
    run = RunFolder(folder / "run")
    losses = {event["step"]: event["loss"] for event in run.events()}
    lost = {step for step in range(1, 5) if step not in losses}
    lines = run.events_file.read_bytes().count(b"\n")
    assert not lost or run.damaged_events() or lines < 4, "nothing is lost unsaid"
    return told({step: losses.get(step, 0.5 / step) for step in range(1, 5)} | {s: losses[s] for s in losses})


def make_npz(folder: Path) -> Path:
    pictures = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    np.savez_compressed(folder / "set.npz", pictures=pictures, captions=np.array(["one", "two", "three"]))
    return folder / "set.npz"


def read_npz(folder: Path) -> str:
    found = sources_folder.open_collection(folder / "set.npz", held_out=0)
    return told({one.name: [one.captions, told(np.asarray(one.source()))] for one in found.samples})


RECIPE = (
    'output = "runs/a"\nseed = 3\n[data]\ntrain = "shapes"\n[train]\nsteps = 1234\nlearning_rate = 3e-4\n'
)


def make_recipe(folder: Path) -> Path:
    (folder / "a.toml").write_text(RECIPE)
    return folder / "a.toml"


def read_recipe(folder: Path) -> str:
    return str(Recipe.read(folder / "a.toml").values())


KINDS = {
    "weights of a checkpoint": Kind(make_checkpoint("model.safetensors"), read_checkpoint),
    "average of a checkpoint": Kind(make_checkpoint("ema.safetensors"), read_drawn),
    "moments of a checkpoint": Kind(make_checkpoint("optimizer.safetensors"), read_checkpoint),
    "state of a checkpoint": Kind(make_checkpoint("state.json"), read_checkpoint),
    "manifest of a checkpoint": Kind(make_checkpoint("manifest.json"), read_checkpoint),
    "snapshot of an average": Kind(make_snapshot, read_snapshot),
    "shard of the store": Kind(make_shard, read_shard),
    "index of the store": Kind(make_index, read_shard),
    "weights of a model": Kind(make_model, read_model),
    "LoRA": Kind(make_lora, read_lora),
    "fitted times": Kind(make_times, read_times),
    "events": Kind(make_events, read_events),
    "npz": Kind(make_npz, read_npz),
}  # fmt: skip
FLIPS = 24


def flips(data: bytes) -> list[bytes]:
    """The data with one bit changed: at its ends, and at places that are drawn."""
    dice, found = random.Random(1), []
    places = [0, 8, 9, len(data) // 2, len(data) - 1, *(dice.randrange(len(data)) for _ in range(FLIPS))]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << dice.randrange(8)
        found.append(bytes(changed))
    return found


def truncations(data: bytes) -> list[bytes]:
    return [b"", data[:1], data[:7], data[: len(data) // 2], data[:-1]]


def try_all(kind: Kind, place: Path, changed: list[bytes], make: Callable[[Path], Path]) -> None:
    """Each of the changed files is found, by its name, or does no harm."""
    place.mkdir()
    make(place)
    before = kind.read(place)
    for number, data in enumerate(changed):
        here = place.with_name(f"{place.name}-{number}")
        here.mkdir()
        file = make(here)
        file.write_bytes(data)
        try:
            assert kind.read(here) == before, f"variant {number} came back as something else"
        except (Refused, Failed) as found:
            assert file.name in str(found) or file.parent.name in str(found), found


@pytest.mark.parametrize("name", KINDS)
def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path, name: str):
    kind = KINDS[name]
    (tmp_path / "first").mkdir()
    data = kind.make(tmp_path / "first").read_bytes()
    some = flips(data)[:: 4 if "weights of a model" in name else 1]
    try_all(kind, tmp_path / "flip", some, kind.make)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_ends_early_is_found(tmp_path, name: str):
    kind = KINDS[name]
    (tmp_path / "first").mkdir()
    try_all(kind, tmp_path / "cut", truncations(kind.make(tmp_path / "first").read_bytes()), kind.make)


@pytest.mark.parametrize("name", [*KINDS, "recipe"])
def test_a_planted_pickle_is_named_and_never_opened(tmp_path, name: str):
    kind = KINDS.get(name) or Kind(make_recipe, read_recipe)
    marker = tmp_path / "executed"
    archive = tmp_path / "torch.pt"
    torch.save({"weights": Bomb(marker)}, archive)
    bombs = [pickle.dumps(Bomb(marker)), archive.read_bytes()]
    if name == "recipe":
        for bomb in bombs:
            kind.make(tmp_path).write_bytes(bomb)
            with pytest.raises(Refused, match=r"a\.toml"):
                kind.read(tmp_path)
    else:
        try_all(kind, tmp_path / "bomb", bombs, kind.make)
    assert not marker.exists()


def test_an_array_of_pickled_objects_is_refused(tmp_path):
    marker = tmp_path / "executed"
    np.savez(tmp_path / "set.npz", pictures=np.array([Bomb(marker)], dtype=object))
    with pytest.raises(Refused, match=r"set\.npz is no \.npz of plain arrays"):
        read_npz(tmp_path)
    assert not marker.exists()


def test_a_recipe_with_any_changed_byte_is_a_recipe_or_refused_in_a_sentence(tmp_path):
    """A recipe is the user's own, so a changed number is one; but it never ends in a traceback."""
    file = make_recipe(tmp_path)
    data = file.read_bytes()
    for changed in [*flips(data), *truncations(data)]:
        file.write_bytes(changed)
        try:
            read_recipe(tmp_path)
        except Refused as refusal:
            assert len(str(refusal)) > 20


def test_a_run_says_which_lines_of_its_events_were_changed(tmp_path, capsys):
    train(tmp_path / "run", steps=4, save_every=2, validate_every=0)
    file = tmp_path / "run" / "events.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"kind": "step"', b'"kind":  "step"', 1))
    train(tmp_path / "run", steps=6, save_every=2, validate_every=0)
    assert "events.jsonl: line 2 is torn or was changed" in capsys.readouterr().err


def test_a_flipped_bit_in_the_newest_checkpoint_costs_the_steps_since_the_one_before(tmp_path, capsys):
    through = train(tmp_path / "through")
    train(tmp_path / "run")
    file = RunFolder.open(tmp_path / "run").checkpoint_folders()[-1] / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    again = train(tmp_path / "run")
    assert (again.step, again.resumed) == (through.step, 10)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "through")
    assert "model.safetensors does not have the checksum" in capsys.readouterr().err
