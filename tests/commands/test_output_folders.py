"""What a command writes takes no place of what is there, and a place that cannot be is refused first."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from .world import one_sentence, sfumato, write_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run of prompts."""
    folder = tmp_path_factory.mktemp("trained")
    answer = sfumato(
        "train", write_recipe(folder), "train.steps=2", "sample.every=0", "train.validate_every=0"
    )
    assert answer.code == 0, answer.err
    return folder


def draw(trained, out, *words):
    return sfumato("generate", trained / "run", "--steps", 1, "--out", out, *words)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_nothing_that_was_drawn_is_replaced(trained, tmp_path):
    """Law: whatever is drawn into a folder, all that stood there stays, and all that is told is there."""
    out, calls = tmp_path / "out", [
        ("-p", "a red thing"),
        ("-p", "a red thing"),
        ("-p", "a red thing", "--guidance", "2"),
        ("-p", "another"),
        ("-p", "a red thing", "--count", "2"),
        ("-p", "a red thing", "--format", "webp", "--format", "png"),
    ]  # fmt: skip
    before: dict[str, bytes] = {}
    for words in calls:
        answer = draw(trained, out, *words, "--json")
        assert answer.code == 0, answer.err
        found = answer.json()
        now = contents(out)
        assert {name: now[name] for name in before} == before
        told = [*(file for one in found["pictures"] for file in one["files"]), found["sheet"], found["page"]]
        new = {str(Path(file).relative_to(out)) for file in told}
        assert new == now.keys() - before.keys()
        for file in told[:-1]:
            Image.open(file).verify()
        before = now
    assert {
        "000-a-red-thing-0.png",
        "index.html",
        "sheet.png",
        "000-a-red-thing-0-2.png",
        "index-2.html",
    } <= set(before)


def test_what_a_user_had_in_the_folder_stays(trained, tmp_path):
    for name in ("index.html", "sheet.png", "000-a-0.png"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "000-a-0-2.png").symlink_to(tmp_path / "nowhere")
    assert draw(trained, tmp_path, "-p", "a").code == 0
    assert {(tmp_path / name).read_text() for name in ("index.html", "sheet.png", "000-a-0.png")} == {"mine"}
    assert not (tmp_path / "nowhere").exists() and (tmp_path / "000-a-0-3.png").is_file()


BEGINNINGS = (
    "sfumato.generation.load",
    "sfumato.workflow.evaluate.evaluate_run.load",
    "sfumato.workflow.export.export_run.load",
    "sfumato.workflow.averaging.average",
    "sfumato.data.sources.folder.open_collection",
    "sfumato.theory.verify.verify",
    "sfumato.theory.verify.compare",
)
PLACES = {
    "a file": "file",
    "below a file": "file/below",
    "below a device": "/dev/null/x",
    "a dangling link": "link",
    "no place": "/proc/none",
    "a long name": "x" * 300,
}
COMMANDS = {
    "generate": lambda run: ("generate", run, "-p", "a"),
    "eval": lambda run: ("eval", run),
    "export": lambda run: ("export", run, "--to", "diffusers"),
    "data": lambda run: ("data", run.parent / "pictures"),
    "ema": lambda run: ("ema", run),
    "theory show": lambda run: ("theory", "show", "trigflow"),
    "theory check": lambda run: ("theory", "check", "trigflow"),
    "theory compare": lambda run: ("theory", "compare", "trigflow"),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_an_unusable_out_is_refused_before_anything_is_loaded(trained, tmp_path, monkeypatch, command, place):
    """Law: no model is loaded, no data read and nothing written for a place that cannot be."""

    def fail(*_, **__):
        raise AssertionError("something was begun")

    begun = [(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in BEGINNINGS]
    for module, name in begun:
        monkeypatch.setattr(module, name, fail)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "deep")
    answer = sfumato(*command(trained / "run"), "--out", place)
    assert answer.code == 2, answer
    one_sentence(answer, "--out")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "link"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_refused_command_leaves_no_folder(trained, tmp_path):
    answer = draw(trained, tmp_path / "a" / "b", "-p", "a", "--format", "gif")
    assert answer.code == 2 and not (tmp_path / "a").exists()


def test_a_folder_of_other_things_is_not_replaced_by_an_export(trained, tmp_path):
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "bought.safetensors").write_bytes(b"mine")
    answer = sfumato("export", trained / "run", "--to", "kohya", "--out", tmp_path / "loras")
    assert answer.code == 2
    one_sentence(answer, "bought.safetensors", "folder of its own")
    assert (tmp_path / "loras" / "bought.safetensors").read_bytes() == b"mine"


def test_a_negative_that_nobody_hears_is_refused(trained, tmp_path):
    for guidance in ("1", "1.0"):
        answer = draw(trained, tmp_path / "out", "-p", "a", "--negative", "ugly", "--guidance", guidance)
        assert answer.code == 2
        one_sentence(answer, "negative", "guidance 1")
    assert draw(trained, tmp_path / "out", "-p", "a", "--negative", "ugly", "--guidance", "2").code == 0
    assert draw(trained, tmp_path / "out", "-p", "a", "--guidance", "1").code == 0
    recipe = write_recipe(tmp_path)
    answer = sfumato("plan", recipe, "sample.negative=ugly", "sample.guidance=1")
    assert answer.code == 2
    one_sentence(answer, "[sample] negative")


def test_words_beyond_what_is_read_are_said_once(trained, tmp_path):
    long = " ".join(f"word{index}" for index in range(100))
    answer = draw(trained, tmp_path / "out", "-p", long, "--count", "3", "-p", "a red thing")
    assert answer.code == 0
    said = [line for line in answer.err.splitlines() if "this model reads 64" in line]
    assert len(said) == 1 and said[0].startswith('"word0 word1'), answer.err
    assert "reads" not in draw(trained, tmp_path / "out", "-p", "a red thing").err


def test_a_prompt_that_is_no_utf_8_is_refused(trained, tmp_path):
    answer = draw(trained, tmp_path / "out", "-p", b"caf\xe9".decode("utf-8", "surrogateescape"))
    assert answer.code == 2
    one_sentence(answer, "UTF-8")


@pytest.mark.parametrize("held_out", ["0", "0.5"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_training_pictures_are_measured(tmp_path, count, held_out):
    recipe = write_recipe(tmp_path)
    for index in range(count, 8):
        (tmp_path / "pictures" / f"{index}.png").unlink()
    rows = (tmp_path / "pictures" / "metadata.jsonl").read_text().splitlines()[:count]
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    quick = (
        "model.codec=pixels",
        "train.steps=2",
        "sample.every=0",
        "train.validate_every=0",
        "train.batch=1",
    )
    assert sfumato("train", recipe, *quick, f"data.held_out={held_out}").code == 0
    answer = sfumato("eval", tmp_path / "run", "--samples", 2, "--seeds", 1, "--steps", 1, "--json")
    assert answer.code == 0, answer.err
    metrics = answer.json()["metrics"]
    assert metrics.keys().isdisjoint({"latent_kernel_distance", "nearest_neighbor_accuracy"})
    first, second = answer.json()["notes"]
    assert "cannot be told" in first and "different captions" in first and "cannot be told" in second
    assert "loss_train" in metrics and "codec_psnr" in metrics
    assert json.loads((tmp_path / "runs" / "eval" / "metrics.json").read_text())["metrics"] == metrics


def test_a_still_of_a_model_of_clips_is_a_picture(tmp_path):
    import numpy

    from sfumato.workflow.drawings import Drawing, write_drawings

    still = numpy.full((1, 16, 16, 3), 200, numpy.uint8)
    write_drawings(tmp_path / "out", [Drawing(still, "a", 0, {})], "")
    assert numpy.asarray(Image.open(tmp_path / "out" / "000-a-0.png")).tolist() == still[0].tolist()
    assert not list((tmp_path / "out").glob("*.mp4"))
