"""Grids: each cell is what one call draws alone; what is refused is refused before a model is loaded."""

from itertools import product

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sfumato as package
from sfumato.errors import Refused
from sfumato.generation import files
from sfumato.generation.grid import parse_grid
from sfumato.models.lora import key_conversion
from sfumato.workflow.drawings import tables_of

from .world import one_sentence, sfumato, write_recipe

LORA = """
output = "lora"
[model]
base = "run"
train = "lora"
rank = 2
[data]
train = "pictures"
resolution = 16
held_out = 0
cache_dir = "store"
[train]
steps = 4
batch = 4
learning_rate = 1.0
warmup_steps = 0
save_every = 2
validate_every = 0
[sample]
every = 0
steps = 2
"""
QUICK = ("model.codec=pixels", "model.patch=4", "train.steps=2", "sample.every=0", "train.validate_every=0")
PROMPT = "a red thing"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with `run`, trained whole, `lora`, a LoRA of it, and `file.safetensors`, a LoRA of others."""
    folder = tmp_path_factory.mktemp("grids")
    answer = sfumato("train", write_recipe(folder), *QUICK)
    assert answer.code == 0, answer.err
    (folder / "lora.toml").write_text(LORA)
    answer = sfumato("train", folder / "lora.toml")
    assert answer.code == 0, answer.err
    model, tensors = package.load(folder / "run"), {}
    torch.manual_seed(5)
    layers = key_conversion.layers_of(key_conversion.networks(model)[""])
    for name in [name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)][-4:]:
        out, into = layers[name].weight.shape
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(2, into)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 2)
    save_file(tensors, folder / "file.safetensors")
    return folder


def bits(drawn):
    return drawn.tobytes()


def weights(model):
    return {name: one.clone() for name, one in model.denoiser.state_dict().items()}


GRIDS = {
    "a run's own LoRA": ("lora", {"lora": [0, 0.5, 2], "seed": [1, 2], "checkpoint": [2, 4]}),
    "checkpoints of all weights": ("run", {"seed": [3], "checkpoint": ["all"], "guidance": [1, 3.0]}),
    "how it is drawn": ("run", {"solver": ["auto", "euler"], "steps": [1, 3], "size": [(16, 16), (24, 16)]}),
    "what is drawn": (
        "run",
        {"prompt": [PROMPT, "a blue thing"], "negative": [None, "black"], "seed": [0, 9]},
    ),
}


@pytest.mark.parametrize("run, axes", GRIDS.values(), ids=GRIDS)
def test_a_cell_is_what_one_call_draws_with_its_settings(world, run, axes):
    """Law, bit for bit; afterwards the model is as it was."""
    model = package.load(world / run)
    before, usual = weights(model), {"steps": 2, "prompt": PROMPT}
    usual = {name: value for name, value in usual.items() if name not in axes}
    cells = list(model.grid(axes, **usual))
    assert all(torch.equal(one, before[name]) for name, one in weights(model).items())
    counts = [len({cell.values[name] for cell in cells}) for name in axes]
    assert sorted(cell.at for cell in cells) == list(product(*map(range, counts)))
    alone = package.load(world / run)
    for cell in cells:
        if step := cell.values.get("checkpoint"):
            name = f"step-{step:06d}" if isinstance(step, int) else step
            alone = package.load(world / run / "checkpoints" / name)
        if "lora" in cell.values:
            alone.set_lora_scale(cell.values["lora"])
        given = {name: one for name, one in cell.values.items() if name not in ("lora", "checkpoint", "size")}
        width, height = cell.values.get("size", (None, None))
        (drawn,) = alone.generate(**{"width": width, "height": height, **usual, **given})
        assert bits(drawn) == bits(cell.drawn), cell.values
    assert len({bits(cell.drawn) for cell in cells}) > 1


@pytest.mark.parametrize("run", ["run", "lora"])
def test_a_files_strength_is_changed_as_if_it_had_been_added_so(world, run):
    """Law: W + s·w·ΔW is the same whether s came first or last, also over checkpoints; s = 0 is the base."""
    model = package.load(world / run)
    model.add_lora(world / "file.safetensors", 0.5, keep_base=True)
    axes = {"lora": [0, 1, 1.5], "checkpoint": [2] if run == "run" else [2, 4]}
    cells = list(model.grid(axes, prompt=PROMPT, steps=2, seed=1))
    for cell in cells:
        alone = package.load(world / run / "checkpoints" / f"step-{cell.values['checkpoint']:06d}")
        alone.add_lora(world / "file.safetensors", 0.5 * cell.values["lora"])
        if run == "lora":
            alone.set_lora_scale(cell.values["lora"])
        (drawn,) = alone.generate(PROMPT, steps=2, seed=1)
        assert bits(drawn) == bits(cell.drawn), cell.values
    assert bits(cells[0].drawn) == bits(package.load(world / "run").generate(PROMPT, steps=2, seed=1)[0])


def test_the_command_draws_the_same_grid_and_says_all_that_it_was_drawn_with(world, tmp_path):
    words = ("--grid", "lora=0,0.5 × seed=4..5 × guidance=1,2", "--steps", 2, "--out", tmp_path / "out")
    answer = sfumato("generate", world / "lora", "-p", PROMPT, *words, "--json")
    assert answer.code == 0, answer.err
    found = answer.json()
    assert [tuple(one["values"].values()) for one in found["pictures"]] == list(
        product([0, 0.5], [4, 5], [1, 2])
    )
    model = package.load(world / "lora")
    for one in found["pictures"]:
        model.set_lora_scale(one["values"]["lora"])
        (drawn,) = model.generate(PROMPT, seed=one["seed"], steps=2, guidance=one["values"]["guidance"])
        said = files.read_metadata(one["file"])
        assert bits(Image.open(one["file"])) == bits(drawn)
        assert said == {
            "prompt": PROMPT, "model": "lora", "lora_scale": one["values"]["lora"], "steps": 2,
            "solver": "auto", "guidance": one["values"]["guidance"], "width": 16, "height": 16,
            "seed": one["seed"],
        }  # fmt: skip
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert (
        page.count("<img src=") == 8
        and page.count("<span>LoRA 0.5</span>") == 2
        and "guidance 2</h3>" in page
    )
    assert Image.open(found["sheet"]).size[0] > 2 * 128


def test_a_single_call_scales_as_a_grid_does_and_its_file_says_the_defaults(world, tmp_path):
    words = ("-p", PROMPT, "--lora-scale", 0.5, "--lora", f"{world / 'file.safetensors'}:0.4", "--json")
    answer = sfumato("generate", world / "lora", *words, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    (one,) = answer.json()["pictures"]
    model = package.load(world / "lora")
    model.add_lora(world / "file.safetensors", 0.4 * 0.5)
    model.set_lora_scale(0.5)
    assert bits(Image.open(one["file"])) == bits(model.generate(PROMPT)[0])
    said = files.read_metadata(one["file"])
    assert said["steps"] == 2 and said["guidance"] == 3.0 and said["solver"] == "auto"
    assert said["loras"] == ["file.safetensors:0.4"] and said["lora_scale"] == 0.5
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "file.safetensors:0.4" in page and "<dt>steps</dt><dd>2</dd>" in page


def test_prompts_share_seeds_where_that_is_asked_for(world, tmp_path):
    words = (
        "generate",
        world / "run",
        "-p",
        PROMPT,
        "-p",
        "a blue thing",
        "--count",
        2,
        "--seed",
        7,
        "--json",
    )
    seeds = [
        [one["seed"] for one in sfumato(*words, *more).json()["pictures"]] for more in ([], ["--same-seeds"])
    ]
    assert seeds == [[7, 8, 9, 10], [7, 8, 7, 8]]


@pytest.mark.parametrize("times", ["karras", "1,0.6,0.2,0"])
def test_times_are_a_name_or_numbers(world, times):
    answer = sfumato("generate", world / "run", "-p", PROMPT, "--times", times, "--steps", 3, "--json")
    (one,) = answer.json()["pictures"]
    asked = [float(one) for one in times.split(",")] if "," in times else times
    assert bits(Image.open(one["file"])) == bits(
        package.load(world / "run").generate(PROMPT, times=asked, steps=3)[0]
    )
    assert files.read_metadata(one["file"])["steps"] == 3


REFUSED = {
    "no prompt": ("run", [], "Say what to draw"),
    "no such LoRA": ("run", ["-p", "a", "--lora", "none.safetensors:0.5"], "none.safetensors does not exist"),
    "no LoRA to scale": ("run", ["-p", "a", "--grid", "lora=0,1"], "no LoRA of its own"),
    "no such axis": (
        "run",
        ["-p", "a", "--grid", "lora=0 × sede=1"],
        '"sede" is no axis. Did you mean "seed"',
    ),
    "no such checkpoint": ("run", ["-p", "a", "--grid", "checkpoint=2,77"], "no checkpoint 77. It has 2"),
    "no number": ("run", ["-p", "a", "--grid", "guidance=1,two"], '"two" is no guidance'),
    "no such solver": ("run", ["-p", "a", "--grid", "solver=eular"], 'Did you mean "euler"'),
    "no such times": ("run", ["-p", "a", "--times", "karas"], 'Did you mean "karras"'),
    "no times": ("run", ["-p", "a", "--times", "1,x,0"], "falling times"),
    "said twice": ("run", ["-p", "a", "--steps", "3", "--grid", "steps=3,4"], "says steps, and so does"),
    "no values": ("run", ["-p", "a", "--grid", "seed="], '"" is no seed'),
    "too many": ("run", ["-p", "a", "--grid", "seed=1..5000 × steps=1..5"], "25,000 cells"),
    "no such kind": ("run", ["-p", "a", "--format", "pgn"], 'Did you mean "png"'),
    "a bad folder": ("run", ["-p", "a", "--out", "/dev/null/x"], "nothing can be written"),
}


@pytest.mark.parametrize("run, words, sentence", REFUSED.values(), ids=REFUSED)
def test_what_can_be_seen_to_be_wrong_is_refused_before_a_model_is_loaded(
    world, monkeypatch, run, words, sentence
):
    monkeypatch.setattr("sfumato.models.io.model.load", lambda *_, **__: pytest.fail("a model was loaded"))
    answer = sfumato("generate", world / run, *words)
    assert answer.code == 2
    one_sentence(answer, sentence)


@pytest.mark.parametrize(
    "text, axes",
    [
        ("lora=0,0.5,1 × seed=1..4", {"lora": [0, 0.5, 1], "seed": [1, 2, 3, 4]}),
        ("lora=0*seed=3..1", {"lora": [0], "seed": [3, 2, 1]}),
        ("size=16x24,8x8 x steps=2", {"size": [(16, 24), (8, 8)], "steps": [2]}),
        (
            "prompt=a cat x dog, small|b * c x seed=-1",
            {"prompt": ["a cat x dog, small", "b * c"], "seed": [-1]},
        ),
        ("prompt x guidance-rescale=0,.5", {"prompt": ["p", "q"], "guidance_rescale": [0, 0.5]}),
        ("seed=1 × prompt", {"seed": [1], "prompt": ["p", "q"]}),
        ("negative=|ugly, bad", {"negative": ["", "ugly, bad"]}),
        ("checkpoint=500,best,all", {"checkpoint": [500, "best", "all"]}),
    ],
)
def test_a_grid_is_read_as_it_is_written(text, axes):
    assert parse_grid(text, {"prompt": ["p", "q"]}) == axes


@pytest.mark.parametrize(
    "text", ["", "seed", "seed=1,1", "seed=1 × seed=2", "lora=nan", "size=3", "steps=1.5"]
)
def test_a_grid_that_says_nothing_clear_is_refused(text):
    with pytest.raises(Refused, match="grid"):
        parse_grid(text)


@pytest.mark.parametrize("lengths", [(3,), (2, 3), (2, 3, 2), (2, 2, 2, 2)])
def test_each_cell_stands_once_in_the_tables(lengths):
    axes = {
        name: list(range(n)) for name, n in zip(("seed", "steps", "lora", "guidance"), lengths, strict=False)
    }
    tables = tables_of(axes)
    places = [at for *_, rows in tables for row in rows for at in row]
    assert sorted(places) == list(product(*map(range, lengths)))
    assert all(len(table[1]) == len(table[3]) and len(table[2]) == len(table[3][0]) for table in tables)
