"""Bad input gets one sentence that names culprit, rule and way out, and loses nothing that was saved."""

import errno
import json
import os

import pytest

from sfumato import run_folder
from sfumato.run_folder import RunFolder

from .world import RECIPE, draw_pictures, one_sentence, sfumato, write_recipe


def test_an_empty_folder_is_refused(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "nothing").mkdir()
    for command in (["train", recipe, "data.train=nothing"], ["data", "nothing"]):
        answer = sfumato(*command)
        assert answer.code == 2
        one_sentence(answer, "nothing", "no pictures")


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    answer = sfumato("train", write_recipe(tmp_path), "data.train=nowhere")
    assert answer.code == 2
    one_sentence(answer, "nowhere", "does not exist")


def test_pictures_without_captions_are_refused_with_the_way_out(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "pictures" / "metadata.jsonl").unlink()
    answer = sfumato("train", recipe)
    assert answer.code == 2
    one_sentence(answer, "caption", 'data.captions = "folder"', '"none"')


def test_a_missing_column_is_refused_by_name(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "pictures" / "metadata.jsonl").unlink()
    (tmp_path / "pictures" / "metadata.csv").write_text("file_name,title\n0.png,a red thing\n")
    answer = sfumato("train", recipe)
    assert answer.code == 2
    one_sentence(answer, "metadata.csv", "title", "caption")


def test_captions_that_are_empty_or_not_utf8_are_set_aside_and_named(tmp_path):
    folder = draw_pictures(tmp_path / "pictures")
    (folder / "metadata.jsonl").unlink()
    for index in range(8):
        (folder / f"{index}.txt").write_text(f"thing {index}")
    (folder / "0.txt").write_text("  \n")
    (folder / "1.txt").write_bytes(b"caf\xe9 \xff\xfe")
    answer = sfumato("data", folder, "--json")
    assert answer.code == 0
    found = answer.json()
    aside = {one["file"]: one["reason"] for one in found["set_aside"]}
    assert found["samples"] == 6 and {"0.png", "1.png"} == aside.keys()
    assert "empty" in aside["0.png"] and "UTF-8" in aside["1.png"]


def test_a_path_that_leaves_the_data_folder_is_refused_and_the_rest_goes_on(tmp_path):
    folder = draw_pictures(tmp_path / "pictures")
    draw_pictures(tmp_path / "secret", 1)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "../secret/0.png", "caption": "not yours"}) + "\n")
    answer = sfumato("data", folder, "--json")
    assert answer.code == 0 and answer.json()["samples"] == 8
    assert {"file": "../secret/0.png", "reason": "refused: outside the data folder"} in answer.json()[
        "set_aside"
    ]
    assert {"samples", "captions", "sizes", "set_aside"} <= answer.json().keys()


def test_a_broken_picture_is_set_aside_and_training_goes_on(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "pictures" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    answer = sfumato("train", recipe, "train.steps=1", "sample.every=0")
    assert answer.code == 0, answer.err
    assert "set aside: 0.png" in answer.err and "1 set aside" in answer.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.resolution=20", ("data.resolution", "multiples of 8")),
        ("data.resolutoin=16", ("data.resolutoin", '"data.resolution"')),
        ("model.theory=flowmatching", ("flowmatching", '"flow-matching"')),
        ("model.denoiser=dti", ("model.denoiser", '"dit"')),
        ("train.steps=many", ("train.steps", "whole number")),
        ("output=", ("output", "runs/NAME")),
        ("train.batch=0", ("train.batch", "at least 1")),
        ("train.optimizer=adamw-paged", ("paged", "adamw-8bit")),
        ("train.trackers=mlflow", ("mlflow", "tensorboard")),
        ("train.patience=2 train.validate_every=0", ("train.patience", "train.validate_every")),
        ("train.patience=2 data.held_out=0", ("train.patience", "data.held_out")),
        ("train.exact_elastic=true train.elastic_max_ranks=3", ("power of 2", "2 or 4")),
        ("train.elastic_max_ranks=8", ("train.elastic_max_ranks", "train.exact_elastic")),
        ("train.hsdp_shard_size=2", ("train.hsdp_shard_size", "hsdp")),
        ("train.device=cuda:7", ("cuda:7", "cpu")),
        ("model.codec=nowhere", ("nowhere", "codec")),
        ("model.text_encoder=nowhere", ("nowhere", "minilm")),
        ("model.base=nowhere", ("nowhere",)),
        ("steps", ("steps", "key=value")),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_is_written(tmp_path, override, words):
    recipe = write_recipe(tmp_path)
    for command in ("plan", "train"):
        answer = sfumato(command, recipe, *override.split())
        assert answer.code == 2, answer.err
        one_sentence(answer, *words)
    assert not (tmp_path / "run").exists()


def test_a_second_average_beside_an_optimizers_own_is_refused(tmp_path):
    pytest.importorskip("pytorch_optimizer")
    answer = sfumato("plan", write_recipe(tmp_path), "train.optimizer=schedule-free", "train.ema=0.9")
    assert answer.code == 2
    one_sentence(answer, "schedule-free", "train.ema")


def test_a_warm_up_as_long_as_the_run_is_said(tmp_path):
    short = (
        "train.steps=1",
        "train.warmup_steps=100",
        "train.lr_schedule=cosine",
        "sample.every=0",
        "train.threads=9",
    )
    answer = sfumato("train", write_recipe(tmp_path), *short)
    assert answer.code == 0, answer.err
    assert "1% of train.learning_rate and train.lr_schedule = cosine does not begin" in answer.err
    assert os.cpu_count() >= 9 or "train.threads = 9" in answer.err


def test_a_recipe_that_is_no_recipe_is_refused(tmp_path):
    for name, text, word in (
        ("broken.toml", b"output = \n", "not TOML"),
        ("latin.toml", b'output = "caf\xe9"', "not UTF-8"),
        ("later.toml", b"format = 99", "format 99"),
        ("section.toml", b"[trian]\nsteps = 1", "train"),
    ):
        (tmp_path / name).write_bytes(text)
        answer = sfumato("train", name)
        assert answer.code == 2
        one_sentence(answer, word)
    answer = sfumato("train", "missing.toml")
    assert answer.code == 2
    one_sentence(answer, "missing.toml", "sfumato new")


SINGULAR = """
import torch
from sfumato.theory import Theory
singular = Theory(data=lambda t: (1 - t, t), model=lambda t: (1 - t, t), name="singular")
nothing = 3
"""


def test_a_theory_that_is_singular_is_refused_in_training_and_fails_its_check(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "mine.py").write_text(SINGULAR)
    answer = sfumato("train", recipe, "model.theory=mine.py:singular")
    assert answer.code == 2
    one_sentence(answer, "singular")
    answer = sfumato("theory", "check", "mine.py:singular", "--json")
    assert answer.code == 1 and not json.loads(answer.out)["ok"]
    answer = sfumato("theory", "show", "mine.py:nothing")
    assert answer.code == 2
    one_sentence(answer, "mine.py:nothing", "Theory")
    answer = sfumato("theory", "show", "mine.py:singluar")
    assert answer.code == 2
    one_sentence(answer, '"singular"')


def test_a_run_that_is_being_written_is_refused_by_pid(tmp_path):
    recipe = write_recipe(tmp_path)
    with RunFolder.create(tmp_path / "run", "# someone else's\n").lock():
        answer = sfumato("train", recipe)
    assert answer.code == 2
    one_sentence(answer, str(os.getpid()), "another output")


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    answer = sfumato("train", recipe)
    assert answer.code == 2
    one_sentence(answer, "thesis.txt")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_place_is_refused(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "run").mkdir(mode=0o555)
    answer = sfumato("train", recipe)
    assert answer.code == 2
    one_sentence(answer, "run", "cannot be written")


def test_a_full_disk_fails_in_a_sentence_and_keeps_what_was_saved(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    plain = run_folder._sync

    def full(path):
        if "step-000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        plain(path)

    monkeypatch.setattr(run_folder, "_sync", full)
    answer = sfumato("train", recipe)
    assert answer.code == 1
    one_sentence(answer, "space", "same command")
    kept = [one.name for one in RunFolder.open(tmp_path / "run").checkpoint_folders()]
    assert kept == ["step-000002", "step-000003"]  # the one after two steps, and the best held-out loss
    monkeypatch.setattr(run_folder, "_sync", plain)
    answer = sfumato("train", recipe)
    assert answer.code == 0 and "step-000003" in answer.err


def test_memory_that_is_used_up_fails_in_a_sentence(tmp_path, monkeypatch):
    from sfumato import workflow

    def greedy(*arguments):
        raise MemoryError

    monkeypatch.setattr(workflow, "train", greedy)
    answer = sfumato("train", write_recipe(tmp_path))
    assert answer.code == 1
    one_sentence(answer, "Memory", "train.batch")


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    recipe = write_recipe(tmp_path)
    assert sfumato("train", recipe).code == 0
    newest = RunFolder.open(tmp_path / "run").checkpoint_folders()[-1]
    with (newest / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    answer = sfumato("train", recipe, "--json")
    assert answer.code == 0 and answer.json()["step"] == 6
    assert newest.name in answer.err and "step-000004" in answer.err


def test_a_changed_recipe_is_refused_by_the_key_that_changed(tmp_path):
    recipe = write_recipe(tmp_path)
    assert sfumato("train", recipe, "train.steps=1", "sample.every=0").code == 0
    answer = sfumato("train", recipe, "model.width=64")
    assert answer.code == 2
    one_sentence(answer, "model.width = 32", "64", "another output")


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "nowhere", "-p", "x"),
        ("eval", "nowhere"),
        ("report", "nowhere"),
        ("new", "x", "--data", "nowhere"),
        ("demo", "--data", "nowhere"),
        ("demo", "--minutes", "-3"),
    ],
)
def test_what_is_not_there_is_refused_everywhere(words):
    answer = sfumato(*words)
    assert answer.code == 2
    one_sentence(answer)


def test_words_a_command_does_not_know_are_refused():
    assert sfumato("tran").code == 2
    assert sfumato("train").code == 2
    assert sfumato("generate", "x", "--stpes", "3").code == 2


RECIPE_WITHOUT_DATA = RECIPE.replace('train = "pictures"\n', "")


def test_a_recipe_without_data_says_how_to_name_it(tmp_path):
    answer = sfumato("train", write_recipe(tmp_path, RECIPE_WITHOUT_DATA))
    assert answer.code == 2
    one_sentence(answer, "data.train")
