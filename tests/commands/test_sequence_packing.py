"""`train.sequence_packing` from the command line: it trains, goes on, streams, and refuses what it cannot "
"do."""

from itertools import islice

import torch
from PIL import Image, ImageSequence

from sfumato.run_folder import RunFolder

from .test_clips import CLIPS, film
from .test_data_keys import weights
from .world import one_sentence, sfumato, write_recipe

PACK = [
    "train.sequence_packing=true",
    "data.buckets=3",
    "data.resolution=32",
    "model.codec_stride=4",
    "train.log_every=1",
]


def test_a_packed_run_goes_on_with_the_same_bits_whether_stored_or_encoded_ahead(tmp_path):
    recipe = write_recipe(tmp_path)
    words = [
        *PACK,
        "data.token_budget=true",
        "train.gradient_checkpointing=1",
        "train.sanity=false",
        "sample.every=9",
    ]
    plan = sfumato("plan", recipe, *words, "--json").json()
    assert plan["memory_gb"] > 0
    assert len(plan["buckets"]["packed"]["shapes"]) > 1
    assert sum(plan["buckets"]["packed"]["shapes"].values()) == plan["samples"]
    assert sfumato("train", recipe, *words).code == 0
    assert sfumato("train", recipe, *words, "train.steps=3", "output=again").code == 0
    assert sfumato("train", recipe, *words, "train.steps=6", "output=again").code == 0
    through, again = weights(tmp_path / "run"), weights(tmp_path / "again")
    assert all(torch.equal(through[name], again[name]) for name in through)
    events = RunFolder.open(tmp_path / "run").events()
    assert {one["weights"] for one in events if one["kind"] == "validation"} == {"ema", "raw"}
    ring = ["data.cache_limit=30KB", "output=ring"]
    assert sfumato("train", recipe, *words, *ring).code == 0
    for name, weight in weights(tmp_path / "ring").items():
        torch.testing.assert_close(weight, through[name], atol=1e-4, rtol=1e-3)


def test_clips_of_several_lengths_and_stills_are_packed_and_adapted(tmp_path):
    folder = film(tmp_path / "clips", 6)
    for name in ("0", "1"):  # two of the six end after half a second
        with Image.open(folder / f"{name}.webp") as clip:
            frames = [frame.copy() for frame in islice(ImageSequence.Iterator(clip), 4)]
        frames[0].save(folder / f"{name}.webp", save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "clips.toml").write_text(CLIPS)
    words = [
        "train.sequence_packing=true",
        "data.short_clip_frames=[3,1]",
        "data.token_budget=true",
        "train.batch=4",
    ]
    answer = sfumato("train", tmp_path / "clips.toml", *words)
    assert answer.code == 0, answer.err
    (told,) = [event for event in RunFolder.open(tmp_path / "run").events() if event["kind"] == "data"]
    assert {"16×16×5", "16×16×3", "16×16×1"} == set(told["summary"]["sizes"])
    lora = [f"model.base={tmp_path / 'run'}", "model.train=lora", "model.rank=2", "output=adapted"]
    answer = sfumato("train", tmp_path / "clips.toml", *words, *lora)
    assert answer.code == 0, answer.err
    assert all("lora" in name for name in weights(tmp_path / "adapted"))


def test_what_cannot_be_packed_is_refused_with_the_way_out(tmp_path):
    recipe = write_recipe(tmp_path)
    refused = {
        ("model.denoiser=unet",): ("our own DiT", "data.token_budget"),
        ("train.compile=true",): ("train.compile", "Leave one of them out"),
        ("data.buckets=1",): ("data.buckets = 1", "data.buckets = 16"),
        ("data.train=shapes",): ("one shape", "Leave it out"),
        ("data.condition_columns=control",): ("pictures that guide", "Leave train.sequence_packing out"),
        ("data.token_budget=true", "train.batch=2", "train.gradient_accumulation=2"): (
            "fewer than 2",
            "train.batch",
        ),
    }
    for words, said in refused.items():
        one_sentence(sfumato("train", recipe, *PACK, *words), *said)
