"""Laws of one's own code: a recipe and Python train the same bits, and a broken contract is named."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sfumato
from sfumato import user_code
from sfumato.errors import Failed, Refused
from sfumato.recipe import Recipe
from sfumato.run_folder import RunFolder
from sfumato.theory import get, integrate, oracle
from sfumato.training.distributed import processes
from sfumato.training.distributed.processes import Processes, run_folder_of_rank
from sfumato.training.loop import callbacks
from sfumato.workflow import sanity_checks

DOCS = Path(__file__).parents[2] / "docs" / "own-code.md"
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL))
RECIPE = """
output = "{output}"
[model]
codec = "pixels"
text = "none"
width = 32
depth = 1
heads = 2
patch = 4
[data]
train = "colors.py:Colors"
resolution = 16
held_out = 0.25
store = "store"
[train]
steps = 4
batch = 4
warmup_steps = 2
save_every = 2
validate_every = 2
log_every = 1
threads = 1
sanity = false
[sample]
every = 4
steps = 2
"""
LETTERS = "model.text_encoder=letters.py:Letters"
WORDS = {
    "theory": ("model.theory", "circle.py:circle"),
    "denoiser": ("model.denoiser", "net.py:Net"),
    "codec": ("model.codec", "halves.py:Halves"),
    "conditioner": ("model.text_encoder", "letters.py:Letters"),
    "dataset": ("data.train", "colors.py:Colors"),
    "loss": ("train.loss", "loss.py:huber"),
    "loss of a sample": ("train.loss", "loss.py:LateCounts"),
    "callbacks": ("train.callbacks", "progress.py:Progress"),
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with the examples of the docs and a recipe of squares."""
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(world: Path, output: str, *overrides: str, **objects: Any) -> Any:
    (world / "recipe.toml").write_text(RECIPE.format(output=output))
    return sfumato.train("recipe.toml", overrides, say=lambda sentence: None, **objects)


def picture(run: Any) -> bytes:
    """What a run draws, loaded again."""
    model = run.model()
    prompt = None if model.conditioner.kind == "none" else ["a red square"]
    return model.generate(prompt, seed=1, steps=2)[0].tobytes()


def weights(run: Any, step: int = 4) -> bytes:
    return (run.path / "checkpoints" / f"step-{step:06d}" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", WORDS)
def test_a_recipe_and_python_train_the_same_bits_with_ones_own(kind, world):
    """Law: file.py:name and the object of that name are one run; both act, are recorded and load again."""
    key, word = WORDS[kind]
    needs = [LETTERS] if kind == "denoiser" else []
    plain, said = train(world, "plain", *needs), train(world, "said", *needs, f"{key}={word}")
    found = user_code.load_named_object(word)
    handed = train(world, "handed", *needs, **{kind.split()[0]: [found] if kind == "callbacks" else found})
    assert weights(said) == weights(handed)
    assert (weights(said) == weights(plain)) == (kind in ("callbacks", "dataset"))
    codes = [event["hashes"] for event in said.events() if event["kind"] == "code"]
    assert codes[-1][key] == {str(world / word): user_code.code_hash(str(world / word))}
    assert picture(said) == picture(handed)


@pytest.mark.parametrize("kind", ["denoiser", "codec", "conditioner"])
def test_an_object_of_ones_own_class_loads_again(kind, world):
    """Law: what was handed over as an object is loaded by its class, and draws what it drew."""
    cls = user_code.load_named_object(WORDS[kind][1])
    made = cls(channels=3, width=8, text_width=26) if kind == "denoiser" else cls()
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    run = train(world, "run", *([LETTERS] if kind == "denoiser" else []), **{kind: made})
    assert all(torch.equal(made.state_dict()[name], weight) for name, weight in before.items())
    loaded = run.model()
    assert type(getattr(loaded, kind)).__name__ == cls.__name__
    assert picture(run) == picture(run)


def test_a_network_of_ours_may_be_handed_over(world):
    from sfumato.models.networks.dit import DiT

    run = train(world, "run", denoiser=DiT(3, width=32, depth=1, heads=2, patch=4, text_width=0))
    assert type(run.model().denoiser) is DiT


def test_callbacks_hear_everything_and_change_nothing(world):
    """Law: each hook hears of its events, in order; a run that is stopped and goes on keeps its bits."""
    heard: list[tuple[Any, ...]] = []

    class Hearing:
        def on_step(self, step, loss, network, run):
            torch.randn(3)
            network.eval()
            heard.append(("step", step, float(loss) > 0, torch.is_grad_enabled()))

        def on_validation(self, step, split, weights, loss, **rest):
            heard.append(("validation", step, split, weights, loss > 0, set(rest)))

        def on_preview(self, step, files):
            heard.append(("preview", step, all(Image.open(file).size == (16, 16) for file in files)))

        def on_checkpoint(self, folder):
            heard.append(("checkpoint", (folder / "model.safetensors").is_file()))

    plain = train(world, "plain")
    run = train(world, "run", "train.steps=2", callbacks=[Hearing()])
    run = train(world, "run", callbacks=[Hearing()])
    assert weights(run) == weights(plain)
    assert [one for one in heard if one[0] == "step"] == [("step", n, True, False) for n in (1, 2, 3, 4)]
    rest = {"error", "run", "network"}
    for step in (2, 4):
        for which in ("raw", "ema"):
            assert ("validation", step, "held_out", which, True, rest) in heard
    assert ("preview", 4, True) in heard and ("checkpoint", True) in heard


def test_other_processes_tell_those_callbacks_that_ask_for_it(world, monkeypatch):
    """Law: rank zero tells all; on the others one that has every_process is told the same."""
    heard: list[str] = []

    class Quietly:
        def on_validation(self, step):
            heard.append(f"{type(self).__name__} {step}")

    class Everywhere(Quietly):
        every_process = True

    def told_on(rank: int) -> list[str]:
        heard.clear()
        monkeypatch.setattr(processes, "current_processes", lambda: Processes(rank, 2))
        monkeypatch.setattr(callbacks, "current_processes", processes.current_processes)
        run = run_folder_of_rank(RunFolder.create(world / f"run-{rank}"))
        some = [callbacks.Callback(one.__name__, one()) for one in (Quietly, Everywhere)]
        with callbacks.listening(callbacks.Callbacks(some, run, torch.nn.Linear(1, 1))):
            run.event("validation", step=7, split="train", weights="raw", loss=1.0, error=0.0)
        run.event("validation", step=8, split="train", weights="raw", loss=1.0, error=0.0)
        return list(heard)

    assert told_on(0) == ["Quietly 7", "Everywhere 7"]
    assert told_on(1) == ["Everywhere 7"]
    assert not (world / "run-1" / "events.jsonl").exists()


def test_a_hook_that_fails_ends_the_run_by_name_and_the_run_goes_on_without_it(world):
    (world / "bad.py").write_text(
        "class Bad:\n    def on_step(self, step):\n"
        "        if step == 3:\n            raise ValueError('no room')\n"
    )
    with pytest.raises(
        Failed, match=r"on_step fails at step 3 in .*bad\.py:Bad, line 4: ValueError: no room"
    ):
        train(world, "run", "train.callbacks=bad.py:Bad")
    assert weights(train(world, "run")) == weights(train(world, "plain"))


def test_several_callbacks_of_one_class_are_each_told(world):
    class Counting:
        def __init__(self):
            self.count = 0

        def on_step(self):
            self.count += 1

    several = [Counting(), Counting()]
    train(world, "run", callbacks=several)
    assert [one.count for one in several] == [4, 4]


def test_code_that_changed_is_said_when_a_run_goes_on(world):
    train(world, "run", "train.loss=loss.py:huber", "train.steps=2")
    (world / "loss.py").write_text(EXAMPLES["loss.py"] + "\n# changed\n")
    said: list[str] = []
    sfumato.train("recipe.toml", ["train.loss=loss.py:huber"], say=said.append)
    assert any("train.loss" in one and "changed since the run began" in one for one in said)
    with pytest.raises(Refused, match=r"begun with train\.loss"):
        train(world, "run", "train.loss=loss.py:LateCounts")


def test_a_data_set_is_encoded_once_and_asked_no_more_than_it_must(world):
    """Law: with a fingerprint, pictures that are in the store are not asked for again."""
    data = user_code.load_named_object("colors.py:Colors")()
    asked: list[int] = []

    class Watched(type(data)):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "picture": lambda: asked.append(index) or item["picture"]()}

    first = sfumato.encode(recipe(world), dataset=Watched(), say=lambda sentence: None)
    assert sorted(asked) == list(range(16)) and len(first.train) + len(first.held_out) == 16
    asked.clear()
    sfumato.encode(recipe(world), dataset=Watched(), say=lambda sentence: None)
    assert asked == []


def recipe(world: Path) -> Path:
    (world / "recipe.toml").write_text(RECIPE.format(output="run"))
    return world / "recipe.toml"


FORMS = {
    "path": lambda image, folder: image.save(folder / "p.png") or folder / "p.png",
    "text": lambda image, folder: image.save(folder / "p.png") or str(folder / "p.png"),
    "image": lambda image, folder: image,
    "array": lambda image, folder: __import__("numpy").asarray(image),
    "function": lambda image, folder: lambda: image,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_picture_gives_the_same_latents(form, world):
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    items = [{"picture": FORMS[form](image, world), "caption": ["one", "two"], "split": "train"}]
    found = sfumato.encode(recipe(world), dataset=items, say=lambda sentence: None)
    latents = found.train.read([0], 0, 0).latents
    expected = sfumato.encode(
        recipe(world), dataset=[{"picture": image, "split": "train"}], say=lambda sentence: None
    )
    assert torch.equal(latents, expected.train.read([0], 0, 0).latents)


NET = """from torch import nn
from sfumato.models import Denoiser
class x(Denoiser):
    def __init__(self, **rest):
        super().__init__()
        self.layer = nn.Linear(1, 1)
    def forward(self, x, clock, condition):
        {}
        {}
    def config(self):
        return {{}}
"""
CODEC = """from sfumato.models import Codec
class x(Codec):
    kind, stride, latent_channels = "x", 2, 3
    def config(self): return {{}}
    def encode(self, pixels, noise=None):
        return {}
    def decode(self, latents):
        return {}
"""
TEXT = """import torch
from sfumato.models import Condition, Conditioner
class x(Conditioner):
    kind, width = "x", 3
    def config(self): return {{}}
    def forward(self, prompt, **options):
        return Condition({{"pooled": torch.zeros(len({}), 5)}})
    def encode_empty(self, count):
        return self([""] * count)
"""
BROKEN = {
    "a loss that is none": ({"train.loss": "x = 3"}, r"train\.loss: .* is a int\. A loss is called as"),
    "a loss of three": ({"train.loss": "def x(a, b, weight): return a"}, r"cannot be called so .*weight"),
    "a loss that is one number": (
        {"train.loss": "def x(a, b): return (a - b).mean()"},
        r"gives shape \[\] for an answer of \[4, 3, 16, 16\]\. A loss is called as",
    ),
    "a loss without a gradient": (
        {"train.loss": "def x(a, b): return (a - b).detach()"},
        "without a gradient",
    ),
    "callbacks without hooks": (
        {"train.callbacks": "class x: pass"},
        r"is a x without a hook\. A callback is",
    ),
    "a hook of something else": (
        {"train.callbacks": "class x:\n    def on_step(self, when): pass"},
        "on_step: missing a required argument: 'when'. A callback is",
    ),
    "data without a length": ({"data.train": "x = iter([])"}, r"is a list_iterator\. A data set has len"),
    "no data": ({"data.train": "x = []"}, "has no items"),
    "items that are pairs": ({"data.train": "x = [(1, 2)]"}, "item 0 of .* is a tuple .*A data set has len"),
    "items without a picture": ({"data.train": "x = [{'image': 1}]"}, "without `picture` .it has image"),
    "a strange picture": ({"data.train": "x = [{'picture': 1.5}]"}, r"picture of item 0 .* is a float"),
    "a strange caption": ({"data.train": "x = [{'picture': 'a.png', 'caption': 3}]"}, "caption of item 0"),
    "a strange split": ({"data.train": "x = [{'picture': 'a', 'split': 'all'}]"}, "say train or held_out"),
    "two of one name": ({"data.train": "x = [{'picture': 'a.png', 'name': 'n'}] * 2"}, 'have the name "n"'),
    "an item that fails": (
        {
            "data.train": "class x:\n"
            "    def __len__(self): return 1\n"
            "    def __getitem__(self, i): return 1 / i"
        },
        r"item 0 fails in .*own\.py:x, line 3: ZeroDivisionError",
    ),
    "a codec that is none": ({"model.codec": "x = dict"}, "here a Codec is needed"),
    "a denoiser without config": (
        {"model.denoiser": "from sfumato.models import Denoiser\nclass x(Denoiser): kind = 'x'"},
        r"lacks config\(\), forward\(\)\. A Denoiser is a class of `from sfumato\.models import Denoiser`",
    ),
    "a denoiser of torch alone": (
        {"model.denoiser": "from torch import nn\ndef x(**rest): return nn.Linear(1, 1)"},
        "but here a Denoiser is needed. A Denoiser is a class of `from sfumato.models import Denoiser`",
    ),
    "a denoiser that takes a mapping for an object": (
        {"model.denoiser": NET.format("condition.pooled", "return x")},
        r'forward fails in .*own\.py:x, line 8: AttributeError: a condition has no attribute "pooled"',
    ),
    "a denoiser of another shape": (
        {"model.denoiser": NET.format("0", "return x[:, :1]")},
        r"forward gives \[2, 1, 16, 16\], not \[2, 3, 16, 16\]\. A Denoiser is",
    ),
    "a codec of another stride": (
        {"model.codec": CODEC.format("pixels[..., ::4, ::4]", "latents")},
        r"encode gives \[2, 3, 4, 4\], not \[2, 3, 8, 8\]\. A Codec is",
    ),
    "a codec whose decoder fails": (
        {"model.codec": CODEC.format("pixels[..., ::2, ::2]", "latents.nothing")},
        r"decode fails in .*own\.py:x, line 8: AttributeError",
    ),
    "a text encoder of one for all": (
        {"model.text_encoder": TEXT.format("['a']")},
        r"it gives one of 1 for two prompts, not a Condition of two",
    ),
    "a text encoder of another width": (
        {"model.text_encoder": TEXT.format("prompt")},
        r'"pooled" is \[2, 5\], but its pooled_width is 3\. A Conditioner is',
    ),
    "a denoiser of other arguments": (
        {"model.denoiser": "def x(size): pass"},
        "A Denoiser is made by calling it with channels",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_contract_is_refused_and_named(name, world):
    (keys, words) = BROKEN[name]
    ((key, code),) = keys.items()
    (world / "own.py").write_text(code + "\n")
    with pytest.raises(Refused, match=words):
        train(world, "run", f"{key}=own.py:x")


def test_what_a_run_could_not_load_again_is_refused(world):
    class Local(user_code.load_named_object("halves.py:Halves")):
        pass

    for given in ({"codec": Local()}, {"codec": Local}, {"theory": get("flow-matching")}):
        with pytest.raises(Refused, match="no Python file names this"):
            train(world, "run", **given)
    train(world, "run", "train.steps=2", loss=lambda answer, target: (answer - target).abs())
    assert "test_own_code.py:<" in (RunFolder.open(world / "run").effective).read_text()
    with pytest.raises(Refused, match="hand it over again"):
        sfumato.train(world / "run", say=lambda sentence: None)


def test_stages_of_ones_own_beside_a_base_are_refused(world):
    with pytest.raises(Refused, match="for a model from scratch"):
        train(world, "run", "model.base=somewhere", codec=user_code.load_named_object("halves.py:Halves"))


def test_doctor_says_whether_a_batch_is_answered_as_each_alone(world):
    """Law: a mean over the batch is found; the docs' own stages have none."""
    words = [f"{key}={word}" for key, word in (WORDS["denoiser"], WORDS["codec"], WORDS["conditioner"])]
    read = Recipe.read(recipe(world), words)
    checks = {check.claim: check for check in sanity_checks.check_recipe(read)}
    own = [check for claim, check in checks.items() if claim.startswith("your ")]
    assert len(own) == 3 and all(check.holds for check in own), own
    (world / "own.py").write_text(NET.format("0", "return x + self.layer(x.mean(0)[..., :1])"))
    checks = sanity_checks.check_recipe(Recipe.read(recipe(world), ["model.denoiser=own.py:x"]))
    (mixing,) = [check for check in checks if check.claim.startswith("your denoiser")]
    assert not mixing.holds and "no means over the batch" in mixing.detail


def test_a_solver_of_ones_own_walks_as_ours_does(world):
    """Law: the docs' midpoint is our midpoint, under any theory; by its file and by itself."""
    mine = user_code.load_named_object("solver.py:midpoint")
    noise = torch.randn(5, 2, dtype=torch.float64)
    for name in ("flow-matching", "ddpm-velocity", "edm"):
        theory = get(name)
        denoise = oracle.mixture([[1.0, 0.0], [-1.0, 0.5]], [0.01, 0.02], [0.4, 0.6]).denoiser(theory)
        expected = integrate(denoise, noise, theory, 12, solver="midpoint")
        for solver in (mine, "solver.py:midpoint"):
            found = integrate(denoise, noise, theory, 12, solver=solver)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    model = train(world, "run", "train.steps=2").model()
    ours, own, named = (
        model.generate(None, seed=1, steps=4, solver=solver)[0].tobytes()
        for solver in ("midpoint", mine, "solver.py:midpoint")
    )
    assert own == named and max(abs(a - b) for a, b in zip(ours, own, strict=True)) <= 1


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 3", "is a int. A solver is called as"),
        ("def x(z): yield z", "cannot be called so"),
        ("def x(slope, z, angles): yield z", "yields 1 states for 4 steps"),
        ("def x(slope, z, angles):\n    for _ in angles[1:]: yield z[:1]", r"yields \[1, 2\] for \[5, 2\]"),
        ("def x(slope, z, angles):\n    yield 1 / 0", r"own\.py:x, line 2: ZeroDivisionError"),
    ],
)
def test_a_solver_that_breaks_its_contract_is_named(code, words, world):
    (world / "own.py").write_text(code)
    with pytest.raises((Refused, Failed), match=words):
        integrate(lambda x, t: x, torch.randn(5, 2), get("flow-matching"), 4, solver="own.py:x")
