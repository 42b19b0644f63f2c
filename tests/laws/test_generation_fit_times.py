"""Laws of sampling times that are kept with a model."""

import json

import pytest
import torch

from sfumato.errors import Refused
from sfumato.generation import as_pipeline, load
from sfumato.generation.fit_times import fit_times
from sfumato.models import new_codec, new_conditioner, new_model
from sfumato.models.io.fitted_times import TIMES, home_of, read_times, write_times
from sfumato.models.settings import ModelSettings
from sfumato.theory import times


@pytest.fixture
def model():
    settings = ModelSettings(
        width=16, depth=1, heads=2, patch=2, codec="pixels", text_encoder="none", denoiser="dit"
    )
    made = as_pipeline(new_model(settings, new_codec(settings), new_conditioner(settings)))
    generator = torch.Generator().manual_seed(2)
    for weight in made.denoiser.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    made.info["resolution"] = 8
    return made


def test_a_model_draws_at_the_times_it_was_fitted(model, tmp_path):
    folder = tmp_path / "model"
    model.save(folder)
    plain = load(folder).generate(seed=3, steps=4)[0]
    assert read_times(folder) is None
    pilot = times.FittedGrid.bent([0.0, 1.5, 0.0, -1.5, 0.0, 0.0, 0.0])
    write_times(home_of(folder), pilot)
    again = load(folder)
    assert again.fitted_times == pilot
    drawn = again.generate(seed=3, steps=4)[0]
    assert drawn.tobytes() != plain.tobytes()
    given = load(folder).generate(seed=3, steps=4, times=pilot.grid(model.theory, 4))[0]
    assert drawn.tobytes() == given.tobytes()
    usual = again.generate(seed=3, steps=4, times="two-sided")[0]
    assert usual.tobytes() == plain.tobytes()
    again.save(tmp_path / "copy")
    assert load(tmp_path / "copy").fitted_times == pilot


def test_fitting_tells_what_the_times_are_worth(model):
    seen = []
    found = fit_times(model, [""], samples=4, budgets=(3,), batch=3, watch=lambda *done: seen.append(done))
    before, after = found.errors[3]
    assert found.helps == (after < before)
    assert seen[-1][0] == seen[-1][1] and len({total for _, total in seen}) == 1
    assert found.pilot.grid(model.theory, 5).shape == (6,)


def test_damaged_times_are_named(model, tmp_path):
    model.save(tmp_path / "model")
    (tmp_path / "model" / TIMES).write_text(json.dumps([1, 2]))
    with pytest.raises(Refused, match=r"times\.json is damaged"):
        load(tmp_path / "model")
    with pytest.raises(Refused, match="no folder"):
        home_of(tmp_path / "elsewhere")
