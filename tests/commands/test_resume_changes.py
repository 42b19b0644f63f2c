"""What changed between two halves of a run is said, and said of the right thing."""

import shlex
import shutil
import tomllib

import pytest
from PIL import Image

from sfumato.run_folder import RunFolder

from .world import COLORS, one_sentence, sfumato, write_recipe

QUICK = (
    "model.codec=pixels", "model.text_encoder=none", "data.captions=none", "sample.every=0",
    "train.validate_every=0", "train.sanity=false", "data.held_out=0",
)  # fmt: skip


def train(recipe, *words, steps=2):
    return sfumato("train", recipe, *QUICK, f"train.steps={steps}", *words)


def repaint(file, color=(1, 2, 3)):
    """Other pixels in a file of the same size in bytes and pixels."""
    picture = Image.open(file).convert("RGB")
    picture.putpixel((0, 0), color)
    picture.save(file)


@pytest.mark.parametrize("stream", ["false", "true"])
def test_pixels_that_changed_are_said_and_the_same_pixels_are_not(tmp_path, stream):
    recipe = write_recipe(tmp_path)
    words = (f"data.stream={stream}",)
    assert train(recipe, *words).code == 0
    answer = train(recipe, *words, steps=3)
    assert answer.code == 0 and "data changed" not in answer.err, answer.err
    Image.effect_noise((24, 20), 90).convert("RGB").save(tmp_path / "pictures" / "0.png")
    answer = train(recipe, *words, steps=4)
    assert answer.code == 0, answer.err
    assert "show other pixels" in answer.err and answer.err.count("data changed since") == 1
    notes = [event["text"] for event in RunFolder.open(tmp_path / "run").events() if event["kind"] == "note"]
    assert any("show other pixels" in note for note in notes)
    assert "data changed" not in train(recipe, *words, steps=5).err


def test_a_picture_more_is_said_once(tmp_path):
    recipe = write_recipe(tmp_path)
    assert train(recipe).code == 0
    shutil.copy(tmp_path / "pictures" / "1.png", tmp_path / "pictures" / "9.png")
    answer = train(recipe, steps=3)
    assert answer.code == 0 and answer.err.count("data changed since the run began") == 1, answer.err


def test_a_run_that_began_keeps_its_codec_when_pictures_change(tmp_path):
    """Law: weights that learned one codec's latents never meet another's."""
    recipe = write_recipe(tmp_path)
    words = ("model.codec=auto",)
    assert train(recipe, *words).code == 0
    codec = (tmp_path / "run" / "model" / "codec" / "weights.safetensors").read_bytes()
    repaint(tmp_path / "pictures" / "0.png")
    answer = train(recipe, *words, steps=3)
    assert answer.code == 0 and "Training the codec" not in answer.err, answer.err
    assert (tmp_path / "run" / "model" / "codec" / "weights.safetensors").read_bytes() == codec
    answer = sfumato("encode", recipe, *QUICK, *words, "--json")
    assert answer.json()["pictures_encoded"] == 0, answer


def classes(folder, names):
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(3):
            Image.new("RGB", (20, 20), list(COLORS.values())[index]).save(folder / name / f"{index}.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: classes(folder, ["bee"]), ["new:", '"bee"', "4 classes"]),
        (lambda folder: shutil.rmtree(folder / "ant"), ["missing:", '"ant"']),
        (lambda folder: (folder / "ant").rename(folder / "zebra"), ['"zebra"', '"ant"']),
    ],
)
def test_classes_that_changed_are_named(tmp_path, change, words):
    recipe = write_recipe(tmp_path)
    classes(tmp_path / "sorted", ["ant", "cat", "dog"])
    of_classes = ("model.text_encoder=labels", "data.captions=folder", "data.train=sorted")
    assert train(recipe, *of_classes).code == 0
    change(tmp_path / "sorted")
    answer = train(recipe, *of_classes, steps=3)
    assert answer.code == 2
    one_sentence(answer, *words)
    assert "[model]" not in answer.err


@pytest.mark.parametrize(
    ("first", "then", "name", "value"),
    [
        ('data.condition_columns=["mask"]', "data.condition_columns=[]", "data.condition_columns", ["mask"]),
        (
            'train.timestep_sampling="cosmap"',
            "train.timestep_sampling=mode",
            "train.timestep_sampling",
            "cosmap",
        ),
        ("data.flip=true", "data.flip=false", "data.flip", True),
        ("train.weight_decay=1e-05", "train.weight_decay=0", "train.weight_decay", 1e-05),
    ],
)
def test_what_a_refused_resume_suggests_can_be_typed(tmp_path, first, then, name, value):
    """Law: the words of the sentence, through a shell, are the value the run began with."""
    from sfumato.errors import Refused
    from sfumato.recipe import Recipe
    from sfumato.workflow.resume import check_resume

    recipe = write_recipe(tmp_path)
    begun = Recipe.read(recipe, [first])
    run = RunFolder.create(tmp_path / "run", begun.to_toml(), begun.to_toml(every=True))
    (run.path / "model").mkdir()
    with pytest.raises(Refused) as refused:
        check_resume(run, Recipe.read(recipe, [then]))
    suggested = str(refused.value).split("Go on with ")[1].split(", or give")[0]
    (typed,) = shlex.split(suggested)
    assert tomllib.loads(f"value = {typed.partition('=')[2]}")["value"] == value
    assert Recipe.read(recipe, [typed]).values()[name] == begun.values()[name]


def test_a_lower_rate_may_be_typed_on_the_way(tmp_path):
    recipe = write_recipe(tmp_path)
    assert train(recipe, "train.learning_rate=1e-4").code == 0
    answer = train(recipe, "train.learning_rate=5e-5", "train.lr_schedule=cosine", steps=4)
    assert answer.code == 0, answer.err
    assert answer.err.count("train.learning_rate was 0.0001 and is 5e-05") == 1
    assert 'train.lr_schedule was "constant" and is "cosine"' in answer.err
    rates = {
        e["step"]: e["learning_rate"]
        for e in RunFolder.open(tmp_path / "run").events()
        if e["kind"] == "step"
    }
    assert rates[2] == 1e-4 and rates[3] == pytest.approx(5e-5)


def test_a_complete_run_says_that_it_is(tmp_path):
    recipe = write_recipe(tmp_path)
    assert train(recipe, steps=3).code == 0
    answer = train(recipe, steps=3)
    assert answer.code == 0 and "is complete: 3 steps" in answer.err and "in all" not in answer.err
    answer = train(recipe, steps=2)
    assert answer.code == 0 and "has 3 steps already" in answer.err
    stop = [event for event in RunFolder.open(tmp_path / "run").events() if event["kind"] == "stop"][-1]
    assert (stop["reason"], stop["step"]) == ("done", 3)
    assert "Finished at step 3" in (tmp_path / "run" / "report.html").read_text()
