"""Law: what sfumato 0.1 wrote is read for ever, goes on as it would have gone on, and draws what it drew.

The fixtures in `0_1/` were written by sfumato 0.1 at commit 3c20ebd (`make_0_1.py` shows how) below
/proc/self/cwd, which is the current folder of whichever process says it: the only path in them, and one that
holds for a copy anywhere, if commands run in it. So they are read as they were written, byte for byte. The
tiny base is counted out of integers again, and weights that two fixtures share are kept once and put back
(`same.json`). What a store notes of its users (`uses/`), locks, pages and pictures drawn on the way are not
among the fixtures.

Bits depend on the processor and on torch's version. Where the canary (a hash of torch's own operations, no
part of sfumato) is the recorded one, what comes out must be the recorded bits; elsewhere weights may be off
by 2e-4 of their norm, the optimizer's state by 1e-3, and pixels by 2 of 255; the weights and state of `lokr`,
whose base is kept in bfloat16, by fifty times as much. Measured without vector instructions, as (weights,
state): `lora` (3.5e-5, 2.5e-4), `lokr` (8.8e-4, 1.9e-2), the other runs below 1e-4 in both; with oneDNN kept
to SSE4.1 too, 1.1e-4. The last test makes torch compute so for one run, so that this branch is walked
wherever the tests run.

Only public behaviour is asked: commands, `sfumato.load`, `Recipe.read`, and files.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sfumato
from sfumato.models.lora import lora_file
from sfumato.recipe import Recipe

from .material import HOME, PLACE, bits, canary, far, groups_of, make_base, summary

pytestmark = pytest.mark.skipif(not Path(PLACE).exists(), reason="the fixtures' paths are Linux's")
RUNS = ("scratch", "moving", "mine", "lora", "tokens", "lokr", "control")
PRETRAINED = ("lora", "tokens", "lokr")
MODELS = {"own": "scratch", "averaged": "moving", "merged": "lora", "guided": "control"}
LORAS = ("diffusers", "comfyui", "kohya")
NUMBERS, STATE, LEVELS = 2e-4, 1e-3, 2
"""How far weights and optimizer may be on another machine, as shares of their norms; and pixels, of 255."""
COARSE = {"lokr": 50}
"""How many times as far where a run computes in few bits."""

RENAMED = {
    "train.clip": "train.max_grad_norm", "train.weights": "train.weight_dtype",
    "data.weights": "data.set_repeats", "data.rate": "data.fps", "train.rates": "train.lr_multipliers",
    "train.warmup": "train.warmup_steps", "train.schedule": "train.lr_schedule",
    "train.times": "train.timestep_sampling", "train.stratified": "train.stratified_timesteps",
    "train.adaptive_times": "train.timestep_importance_sampling",
    "train.frame_times": "train.frame_timesteps", "train.context": "train.context_parallel",
    "train.pack": "train.sequence_packing", "train.checkpointing": "train.gradient_checkpointing",
    "train.accumulate": "train.gradient_accumulation", "train.keep": "train.keep_checkpoints",
    "train.known_first": "train.first_frame_share", "train.known_last": "train.last_frame_share",
    "train.held_out_every": "train.validate_every", "train.ema_snapshots": "train.ema_snapshot_every",
    "train.shard_within": "train.hsdp_shard_size", "train.virtual_ranks": "train.elastic_max_ranks",
    "model.tokens": "model.new_tokens", "model.train_text": "model.train_text_encoder",
    "model.text": "model.text_encoder", "model.text_options": "model.prompt_options",
    "model.text_waves": "model.pooled_fourier_terms", "model.start": "model.init_adapter",
    "model.preset": "model.merge_loras", "model.base_dtype": "model.base_quantization",
    "model.stride": "model.codec_stride", "model.time_stride": "model.codec_time_stride",
    "data.shorter": "data.short_clip_frames", "data.segments": "data.clips_per_video",
    "data.prior": "data.class_images", "data.prior_prompt": "data.class_prompt",
    "data.prior_pictures": "data.num_class_images", "data.prior_weight": "data.prior_loss_weight",
    "data.trigger": "data.trigger_words", "data.tag_orders": "data.tag_shuffles",
    "data.tags_kept": "data.keep_tags", "data.companions": "data.condition_columns",
    "data.dropout": "data.condition_dropout", "data.control": "data.control_image",
    "data.reference": "data.reference_image", "data.source": "data.source_image",
    "data.masks": "data.random_masks", "data.latents": "data.latent_sampling", "data.store": "data.cache_dir",
    "data.store_limit": "data.cache_limit", "sample.guidance_by": "sample.autoguidance_model",
    "sample.guidance_perturbed": "sample.pag_scale",
}  # fmt: skip
"""The keys of 0.1 that have other names in recipes of format 2."""


# ----------------------------------------------------------------------------- the fixtures, here


def moved(place: Path, base: Path) -> Path:
    """The fixtures at `place`; they are at home where it is the current folder."""
    shutil.copytree(HOME, place, symlinks=True)
    shutil.copytree(base, place / "base")
    for name, first in json.loads((HOME / "same.json").read_text()).items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(place / first, place / name)
    return place


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The tiny pipeline."""
    make_base(folder := tmp_path_factory.mktemp("base") / "base")
    return folder


@dataclass
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str


class House:
    """The fixtures in the current folder, in which commands run."""

    place = Path(PLACE)

    def __init__(self) -> None:
        self.trained: dict[str, Said] = {}

    def command(self, *words: object) -> Said:
        """`python -m sfumato …`, in this process."""
        before = sys.argv, sys.stdout, sys.stderr
        code: Any = 0
        with (
            Path("out.txt").open("w", encoding="utf-8") as stdout,
            Path("err.txt").open("w", encoding="utf-8") as stderr,
        ):
            try:
                sys.argv, sys.stdout, sys.stderr = ["sfumato", *map(str, words)], stdout, stderr
                runpy.run_module("sfumato", run_name="__main__")
            except SystemExit as end:
                code = end.code
            finally:
                sys.argv, sys.stdout, sys.stderr = before
        return Said(
            int(code or 0),
            Path("out.txt").read_text(encoding="utf-8"),
            Path("err.txt").read_text(encoding="utf-8"),
        )

    def stored(self, name: str) -> set[str]:
        """The entries and codecs of a case's store."""
        store = self.place / name / "store"
        return {str(file.relative_to(store)) for part in ("pixels", "text", "codecs", "priors")
                for file in (store / part).rglob("*") if file.is_file()}  # fmt: skip

    def finished(self, name: str) -> Path:
        """A case's run, gone on with to its end by the command it was begun with."""
        if name not in self.trained:
            self.trained[name] = self.command("train", self.place / name / "recipe.toml", "--json")
        said = self.trained[name]
        assert said.code == 0 and json.loads(said.out)["step"] == 8, said.err
        return self.place / name / "run"


@pytest.fixture(scope="module")
def shared(base, tmp_path_factory) -> tuple[Path, House]:
    """The fixtures, for tests that need not begin anew."""
    return moved(tmp_path_factory.mktemp("house") / "at", base), House()


@pytest.fixture
def house(shared, monkeypatch) -> House:
    """The fixtures that tests share, in the current folder."""
    torch.set_num_threads(1)
    monkeypatch.chdir(shared[0])
    return shared[1]


@pytest.fixture
def anew(base, tmp_path, monkeypatch) -> House:
    """The fixtures for one test alone."""
    torch.set_num_threads(1)
    monkeypatch.chdir(moved(tmp_path / "at", base))
    return House()


# ----------------------------------------------------------------------------- what is compared


@pytest.fixture(scope="module")
def here() -> bool:
    """Whether this machine rounds as the one did that made the fixtures."""
    torch.set_num_threads(1)
    return canary() == json.loads((HOME / "canary.json").read_text())["canary"]


def same_diffusers() -> bool:
    """Whether diffusers is the version that the fixtures were made with."""
    return diffusers.__version__ == json.loads((HOME / "canary.json").read_text())["diffusers"]


def golden(name: str) -> dict[str, Any]:
    return json.loads((HOME / name / "golden.json").read_text())


def pixels(drawn: Any) -> np.ndarray:
    """Pictures or clips, all below each other."""
    arrays = [np.asarray(one) for one in drawn]
    return np.concatenate([one.reshape(-1, *one.shape[-2:]) for one in arrays])


def draw(model: Any, name: str, place: Path) -> np.ndarray:
    """What the case asks of a model."""
    asked = golden(name)["asked"]
    if name == "control":
        asked["control"] = [str(place / "pictures" / "outline-1.png")]
    return pixels(model.generate(**asked, seed=0, steps=3))


def same_pixels(drawn: np.ndarray, file: Path, exact: bool) -> None:
    """The drawing is the recorded one, to the pixel where bits are comparable."""
    apart = np.abs(drawn.astype(int) - np.asarray(Image.open(file)).astype(int)).max()
    assert apart <= (0 if exact else LEVELS), f"{file.parent.name}/{file.name}: off by {apart} of 255"


def same_weights(folder: Path, name: str, exact: bool) -> None:
    """A checkpoint's tensors are the recorded ones: the bits, or the numbers."""
    found, then = groups_of(folder), golden(name)
    assert {"model", "optimizer"} <= found.keys() == then["bits"].keys()
    off = {group: far(summary(tensors), then["numbers"][group]) for group, tensors in found.items()}
    most = {group: COARSE.get(name, 1) * (STATE if group == "optimizer" else NUMBERS) for group in off}
    assert all(off[group] <= most[group] for group in off), (off, most)
    if exact:
        assert {group: bits(tensors) for group, tensors in found.items()} == then["bits"], off


# ----------------------------------------------------------------------------- runs


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_ends_with_the_weights_it_would_have_ended_with(name, house, here):
    """Law: the command that 0.1 was given goes on from its checkpoint and finds nothing changed.

    Nor does it encode anything again, or train a codec again: the keys of a store do not change.
    """
    before = house.stored(name)
    run = house.finished(name)
    said = house.trained[name].err
    assert "Going on from step-000004" in said and "not bit for bit" not in said, said
    assert "Training the codec" not in said
    assert house.stored(name) == before or (name in PRETRAINED and not same_diffusers())
    same_weights(run / "checkpoints" / "step-000008", name, here)
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    losses = {str(one["step"]): one["loss"] for one in lines if one["kind"] == "step"}
    assert losses == pytest.approx(golden(name)["losses"], rel=0 if here else 1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_draws_what_it_drew(name, house, here):
    """Law: the finished run's picture from seed 0 is the one that 0.1 drew."""
    same_pixels(draw(sfumato.load(house.finished(name)), name, house.place), HOME / name / "drawn.png", here)


@pytest.mark.parametrize("name", RUNS)
def test_nothing_that_was_encoded_is_encoded_again(name, anew):
    """Law: `sfumato encode` finds every picture and caption that 0.1 stored.

    What a pretrained codec encodes has diffusers' version in its key (0.1 hashed all of its config), so under
    another one it is encoded again.
    """
    if name in PRETRAINED and not same_diffusers():
        pytest.skip("keys of pretrained codecs name the version of diffusers")
    before = anew.stored(name)
    said = anew.command("encode", anew.place / name / "recipe.toml", "--json")
    assert said.code == 0, said.err
    counts = json.loads(said.out)
    assert counts["pictures_encoded"] == 0 == counts.get("captions_encoded", 0) and counts["samples"] > 0
    assert counts["pictures_stored_before"] > 0
    assert "Training the codec" not in said.err and anew.stored(name) == before


@pytest.mark.parametrize(("name", "key"), [("scratch", "train.clip=0.25"), ("lora", "data.prior_weight=2")])
def test_a_run_is_not_gone_on_with_under_another_recipe(name, key, anew):
    """Law: what 0.1 wrote into effective.toml still binds the run; old names serve on the command line."""
    said = anew.command("train", anew.place / name / "recipe.toml", key)
    value = {"train.clip=0.25": "0.5", "data.prior_weight=2": "0.5"}[key]
    assert said.code == 2 and "was begun with" in said.err and value in said.err, said.err


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_is_a_model_and_has_a_page(name, house):
    """Law: before anything goes on, the run of 0.1 is loaded, and its page is written from its events."""
    place = house.place / f"{name}-page"
    if not place.exists():
        shutil.copytree(HOME / name / "run", place)
    said = house.command("report", place)
    assert said.code == 0, said.err
    assert (place / "report.html").stat().st_size > 5000


def test_an_average_chosen_afterwards_is_the_one_that_was_chosen(house, here):
    """Law: snapshots of 0.1 and later ones make the average that 0.1's snapshots made."""
    out = house.place / "average"
    said = house.command("ema", house.finished("moving"), "--length", 0.07, "--out", out)
    assert said.code == 0, said.err
    now, then = (groups_of(one / "denoiser")["weights"] for one in (out, house.place / "averaged"))
    assert far(summary(now), summary(then)) <= NUMBERS
    assert not here or bits(now) == bits(then)


# ----------------------------------------------------------------------------- models and files


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_draws_what_it_drew(name, house, here):
    """Law: a folder that `model.save` or `sfumato ema` of 0.1 wrote is the model it was."""
    model = sfumato.load(house.place / name)
    same_pixels(draw(model, MODELS[name], house.place), HOME / "drawn" / f"{name}.png", here)


@pytest.mark.parametrize("to", LORAS)
def test_a_lora_file_is_read_and_written_as_it_was(to, house, here):
    """Law: a LoRA that 0.1 wrote draws on its base what the run drew; what is written now has its tensors."""
    (file,) = (HOME / "lora" / to).glob("*.safetensors")
    said = house.command(
        "generate", house.place / "base", "-p", "a red thing", "--lora", file, "--guidance", 3, "--steps", 3,
        "--seed", 0, "--width", 32, "--height", 32, "--device", "cpu", "--out", house.place / to, "--json",
    )  # fmt: skip
    assert said.code == 0, said.err
    drawn = np.asarray(Image.open(json.loads(said.out)["pictures"][0]["file"]))
    same_pixels(drawn, HOME / "drawn" / f"with-{to}.png", here)
    out = house.place / f"export-{to}"
    said = house.command("export", house.finished("lora"), "--to", to, "--out", out)
    assert said.code == 0, said.err
    (now,), (then,) = (groups_of(folder).values() for folder in (out, file.parent))
    assert now.keys() == then.keys()
    if to == "diffusers":  # 0.1 wrote its scale beside the weights, where few look; it is in them now
        (newer,) = out.glob("*.safetensors")
        now, then = (
            {name: one.whole() for name, one in lora_file.read(one)[0].items()} for one in (newer, file)
        )
    assert all(torch.allclose(now[key].double(), then[key].double(), rtol=1e-3, atol=1e-4) for key in then)
    assert not here or to == "diffusers" or bits(now) == bits(then)


# ----------------------------------------------------------------------------- recipes


TABLES = {"model.tokens", "model.preset", "model.text_options", "train.rates", "data.dropout"}
"""Lists of NAME=VALUE words that format 2 reads as tables."""
SEPARATORS = {"model.preset": ":"}


def number(text: Any) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def meant(key: str, value: Any) -> Any:
    """What a value of a key (named as 0.1 did) means, however it is written."""
    if key == "data.curriculum":
        said = [one.split(":") if isinstance(one, str) else (one.resolution, one.until) for one in value]
        return [(int(side), int(until)) for side, until in said]
    if key in TABLES:
        if not isinstance(value, Mapping):
            cut, by = str.partition if key == "model.tokens" else str.rpartition, SEPARATORS.get(key, "=")
            value = dict(cut(word, by)[::2] if by in word else (word, 1.0) for word in value)
        return {name: number(one) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def read(file: Path, overrides: Any = ()) -> dict[str, Any]:
    """What is read, as {key of 0.1: value}; the keys' names are those of 0.1 or of format 2."""
    values = Recipe.read(file, overrides).values()
    names = {new: old for old, new in RENAMED.items() if old not in values}
    return {names.get(name, name): value for name, value in values.items()}


@pytest.mark.parametrize("written", ["recipe.toml", "effective.toml"])
@pytest.mark.parametrize("name", ["everything", "nothing"])
def test_every_key_is_read_as_it_was_meant(name, written, anew):
    """Law: a recipe of 0.1 says, under whatever names, what it said; the file alone, or as a run keeps it."""
    if (name, written) == ("nothing", "recipe.toml"):
        pytest.skip("what is not said may come to mean something better")
    place = anew.place / "recipes" / name
    then = json.loads((place / "values.json").read_text())
    now = read(place / written)
    assert len(then) == 125 and then.keys() <= now.keys(), sorted(then.keys() - now.keys())
    assert {key: meant(key, now[key]) for key in then if key != "format"} == {
        key: meant(key, value) for key, value in then.items() if key != "format"
    }


def test_every_key_serves_on_the_command_line(anew):
    """Law: `key=value` with any name of 0.1 is understood."""
    place = anew.place / "recipes"
    then = json.loads((place / "everything" / "values.json").read_text())
    words = [f"{key}={json.dumps(value)}" for key, value in then.items() if key != "format"]
    now = read(place / "nothing" / "recipe.toml", words)
    assert {key: meant(key, now[key]) for key in then if key != "format"} == {
        key: meant(key, value) for key, value in then.items() if key != "format"
    }


def test_each_key_of_a_run_is_said_where_it_came_from(anew):
    """Law: a value said under its old name is no default."""
    file = anew.place / "recipes" / "everything" / "recipe.toml"
    recipe = Recipe.read(file)
    names = json.loads((file.parent / "values.json").read_text())
    origins = {recipe.origin(RENAMED.get(name, name)) for name in names if name != "format"}
    assert origins == {"recipe.toml"}


def test_fixtures_name_no_place_but_one():
    """Law: no path of the machine they were made on is in them, and they are small."""
    strange = re.compile(rb"/(?:home|root|work|usr|tmp|mnt|opt)/[\w./-]*")
    for file in HOME.rglob("*"):
        if file.is_file():
            found = file.read_bytes()
            assert not strange.search(found), (file, strange.search(found))
    packed = (len(zlib.compress(file.read_bytes())) for file in HOME.rglob("*") if file.is_file())
    assert sum(packed) < 1_000_000, "as git keeps them"


# ----------------------------------------------------------------------------- another processor

ELSEWHERE = """
import os, sys, torch
torch.set_num_threads(1)
from pathlib import Path
import sfumato
from upgrade import test_0_1 as law
from upgrade.material import canary, HOME
place, name = Path(sys.argv[1]), "mine"
os.chdir(law.moved(place / "at", Path(sys.argv[2])))
house = law.House()
run = house.finished(name)
law.same_weights(run / "checkpoints" / "step-000008", name, False)
law.same_pixels(law.draw(sfumato.load(run), name, house.place), HOME / name / "drawn.png", False)
print(canary())
"""


def test_on_another_processor_the_numbers_hold(here, base, tmp_path):
    """Law: where torch rounds otherwise, the canary says so, and the numbers agree to the tolerance.

    torch is told to use no vector instructions, as on a processor that has none.
    """
    paths = [str(Path(__file__).parents[1]), *filter(None, sys.path)]
    known = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), str(base)]
    done = subprocess.run(command, env=known, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    recorded = json.loads((HOME / "canary.json").read_text())["canary"]
    assert not here or done.stdout.split()[-1] != recorded
