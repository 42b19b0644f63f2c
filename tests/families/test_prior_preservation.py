"""Laws of prior preservation: a subject is learned beside pictures of its class, drawn once or given."""

import pytest
import torch

import sfumato
from sfumato.errors import Refused
from sfumato.run_folder import RunFolder
from sfumato.training.objective import diffusion
from sfumato.workflow import class_images, encode_samples, prepare, train_run

from .test_training import losses, write_recipe

ASKED = ["data.class_prompt=a circle", "data.num_class_images=3", "train.sanity=false", "data.captions=none"]


def weights(run):
    return [
        (RunFolder.open(run.path).checkpoint_folders()[-1] / f"{group}.safetensors").read_bytes()
        for group in ("model", "ema", "optimizer")
    ]


def test_a_class_is_drawn_once_and_training_with_it_goes_on_bit_for_bit(tmp_path):
    """Law: the same pictures serve every run on this base; one step, resume, one step is two."""
    recipe = write_recipe("flux-dev", tmp_path, 'train = "lora"', "rank = 2")
    keys = [*ASKED, "data.trigger_words=sks"]
    once = sfumato.train(recipe, keys)
    drawn = sorted((tmp_path / "store" / "priors").rglob("*.png"))
    assert [file.name for file in drawn] == ["00000.png", "00001.png", "00002.png"]
    before = [file.stat().st_mtime_ns for file in drawn]
    sfumato.train(recipe, [*keys, f"output={tmp_path}/twice", "train.steps=1"])
    twice = sfumato.train(recipe, [*keys, f"output={tmp_path}/twice"])
    assert weights(once) == weights(twice)
    assert [file.stat().st_mtime_ns for file in drawn] == before
    alone = sfumato.train(
        recipe, [*keys, "data.prior_loss_weight=0", f"output={tmp_path}/alone", "train.steps=1"]
    )
    assert losses(alone.path)[0] < losses(once.path)[0]


def test_the_loss_is_the_subjects_and_the_weighted_priors(tmp_path):
    """Law: loss = mean over the subject's + weight · mean over the class's, however the batch is divided."""
    recipe = write_recipe("flux-dev", tmp_path, 'train = "lora"', "rank = 2")
    (tmp_path / "class").mkdir()
    for file in sorted((tmp_path / "pictures").rglob("*.png"))[:3]:
        (tmp_path / "class" / file.name).write_bytes(file.read_bytes())
    asked = train_run.read_recipe(
        recipe,
        [f"data.class_images={tmp_path}/class", "data.class_prompt=a circle", "data.prior_loss_weight=0.3"],
    )
    ready = prepare.prepare_run(asked, prepare.resolve_recipe(asked))
    assert ready.class_images is not None and set(ready.class_images.captions) == {"a circle"}
    subject = diffusion.DiffusionObjective(
        ready.model,
        ready.train,
        encode_samples.dataset_and_sampler(asked, ready.train, [])[0:2][1],
        asked.train,
        asked.seed,
        0.0,
    )
    both = class_images.with_prior_preservation(subject, ready.class_images, asked)
    with torch.no_grad():
        whole = both.losses(0, 0, 1)
        parts = [both.losses(0, part, 2) for part in range(2)]
        wanted = (
            subject.losses(0, 0, 1).per_sample.mean() + 0.3 * both.prior.losses(0, 0, 1).per_sample.mean()
        )
    torch.testing.assert_close(whole.per_sample.sum() / whole.of, wanted)
    torch.testing.assert_close(sum(one.per_sample.sum() / one.of for one in parts), wanted)
    assert both.name_of(ready.class_images.ids[0]).startswith("prior/")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["data.prior_loss_weight=0.5"], "none is named"),
        (["data.class_images=nowhere"], "does not exist"),
        (["model.base=scratch", "data.class_prompt=a dog"], "this model is from scratch"),
        (["data.class_images=pictures", "data.num_class_images=3"], "all of the folder"),
        (["model.train=controlnet", "data.class_prompt=a dog"], "that pictures guide"),
    ],
)  # fmt: skip
def test_a_prior_that_could_not_act_is_refused(keys, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=words):
        sfumato.train(write_recipe("flux-dev", tmp_path), keys)
