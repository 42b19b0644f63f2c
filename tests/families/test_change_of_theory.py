"""Laws of pretrained networks asked under a theory they were not trained in."""

import pytest
import torch

import sfumato
from sfumato.models.interface import seeded
from sfumato.theory import get, integrate, noise, times, translate
from sfumato.workflow.export import export

from . import pictures
from .test_training import write_recipe
from .zoo import PROMPT, ZOO

WAYS = [
    ("stable-diffusion-1.5", "flow-matching"),
    ("stable-diffusion-1.5", "edm"),
    ("stable-diffusion-3.5", "ddpm-velocity"),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """name → our model of a tiny checkpoint."""
    known = {}

    def load(name):
        if name not in known:
            folder = tmp_path_factory.mktemp("change") / name
            with pictures.small():
                torch.manual_seed(0)
                ZOO[name].make(name).save_pretrained(folder)
            known[name] = sfumato.load(folder)
        return known[name]

    return load


def pixels(model, monkeypatch, **said):
    """What `generate` hands to the eye, before it is rounded to bytes."""
    seen, decode = [], model.decode
    with monkeypatch.context() as patch:
        patch.setattr(model, "decode", lambda x, *pieces: seen.append(decode(x, *pieces)) or seen[-1])
        model.generate([PROMPT], guidance=3.0, height=32, width=32, **said)
    return seen[0]


def grids(model, theory):
    """Times of equal signal-to-noise in the model's theory and in another, where both have them."""
    top = min(float(one.angle(one.t_noise)) for one in (model.theory, theory)) - 0.02
    angles = top * torch.linspace(1, 0, 6, dtype=torch.float64)
    return [
        torch.cat([one.time_of(angles[:-1]), torch.tensor([one.t_data]).double()])
        for one in (model.theory, theory)
    ]


@pytest.mark.parametrize("name, other", WAYS)
def test_a_pipeline_draws_its_own_picture_under_another_theory(loaded, monkeypatch, name, other):
    """Law: equal signal-to-noise, equal start, equal solver: equal pixels, guided, in float32."""
    model, theory = loaded(name), get(other)
    moved = model.with_theory(theory)
    own, mapped = grids(model, theory)
    z = noise.normal(model.latent_shape(32, 32), 5, [0])
    starts = [
        z * float(torch.hypot(*one.data(t[0])) / one.data(t[0])[1])
        for one, t in ((model.theory, own), (theory, mapped))
    ]
    wanted = pixels(model.with_theory(model.theory), monkeypatch, latents=starts[0], times=own, solver="heun")
    found = pixels(moved, monkeypatch, latents=starts[1], times=mapped, solver="heun")
    assert float(wanted.std()) > 0.01
    assert float((found - wanted).abs().max()) < 1e-4
    first = z * float(torch.hypot(*model.theory.data(own[0])))  # a pipeline takes it for its state as it is
    as_ever = pixels(model, monkeypatch, latents=first, times=own, solver="heun")
    assert float((as_ever - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("name, other", WAYS)
def test_gradients_of_a_whole_draw_are_the_same_under_another_theory(loaded, name, other):
    """Law: d(picture)/d(weights) through a translated trajectory is that of the network's own."""
    model, theory = loaded(name), get(other)
    told = model.condition([PROMPT], **({"max_sequence_length": 32} if "3.5" in name else {}))
    weight = next(p for p in model.denoiser.parameters() if p.ndim > 1).requires_grad_()
    z, found = noise.normal(model.latent_shape(32, 32), 5, [0]), []
    for one, grid in zip(
        (model.with_theory(model.theory), model.with_theory(theory)), grids(model, theory), strict=True
    ):
        x = z * float(torch.hypot(*one.theory.data(grid[0])))
        state = integrate(
            lambda x, t, one=one: one.predict(x, t, told), x, one.theory, grid[[0, 2, 4, 5]], "euler"
        )
        loss = (state / float(torch.hypot(*one.theory.data(grid[-1])))).square().mean()
        found.append(torch.autograd.grad(loss, weight)[0])
    assert float(found[0].abs().max()) > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5 * float(found[0].abs().max()))


def test_a_small_network_learns_a_pipeline_under_its_own_theory(loaded):
    """A teacher of noise is distilled into a student of flow: a few steps reduce the loss."""
    model, flow = loaded("stable-diffusion-1.5"), get("flow-matching")
    told = model.condition([PROMPT] * 8)
    teacher = translate(lambda x, t: model.predict(x, t, told), model.theory, flow)
    x_T, x_0 = (noise.normal(model.latent_shape(32, 32), seed, range(8)) for seed in (1, 2))
    t = times.stratified(0, 8, 0) * 0.9
    x_t = flow.mix(x_0, x_T, t)
    with torch.no_grad():
        wanted = teacher(x_t, t)
    conv = lambda i, o: torch.nn.Conv2d(i, o, 3, padding=1)  # noqa: E731
    student = seeded(0, lambda: torch.nn.Sequential(conv(5, 32), torch.nn.SiLU(), conv(32, 4)))
    optimizer, losses = torch.optim.Adam(student.parameters(), 1e-2), []
    seen = torch.cat([x_t, t.float().view(-1, 1, 1, 1).expand(-1, 1, *x_t.shape[2:])], 1)
    for _ in range(40):
        loss = (student(seen) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    grown = integrate(
        lambda x, t: student(torch.cat([x, t.to(x).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], 1)),
        x_T,
        flow,
        4,
    )
    assert bool(grown.isfinite().all())


@pytest.mark.parametrize("model", [('train = "lora"', "rank = 2"), ()], ids=["lora", "whole"])
def test_what_went_on_in_another_theory_leaves_as_what_it_is(model, tmp_path):
    """Law: the network still answers as its base does, so its files load beside the base's own scheduler."""
    recipe = write_recipe("stable-diffusion-1.5", tmp_path, *model, 'theory = "flow-matching"')
    run = sfumato.train(recipe, ["train.sanity=false", "train.steps=1"])
    for to in ("diffusers", "comfyui"):
        assert export(run.path, to, tmp_path / to).difference < 1e-3
