"""Laws of the objective: what is drawn depends on (seed, sample, step), what is weighted on the time."""

import threading

import pytest
import torch
from training_world import SHAPE, Encoded, Order, make

from sfumato.errors import Failed
from sfumato.models.codecs.image import ResidualCodec
from sfumato.models.condition import Condition
from sfumato.theory import Theory, densities, get, names, oracle
from sfumato.training import settings
from sfumato.training.loop.validation import ValidationLoss, sample_indices
from sfumato.training.objective.diffusion import DiffusionObjective
from sfumato.training.objective.prefetch import Reader
from sfumato.training.objective.reconstruction import ReconstructionObjective, reconstruction_error
from sfumato.training.settings import TrainSettings


def perfect(objective: DiffusionObjective, theory: Theory | None = None) -> None:
    """Let all samples be one latent, and an oracle of that one answer, which never hears of a target.

    theory: what the oracle believes; the model's own by default.
    """
    latents = objective.encoded.latents
    latents[:] = latents[0]
    point = oracle.mixture(latents[:1].flatten(1).double(), 1e-14, [1.0])
    denoise = point.denoiser(theory or objective.model.theory)
    objective.model.predict = lambda x_t, t, condition: denoise(x_t, t)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", names())
def test_an_oracle_has_no_loss_in_its_own_theory(name: str):
    """Law: what is asked of a network is what the exact posterior answers."""
    objective, _, _ = make(name)
    perfect(objective)
    losses = objective.losses(0, 0, 1)
    assert losses.of == 6
    torch.testing.assert_close(losses.per_sample, torch.zeros(6), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "other"), [("ddpm-epsilon", "ddpm-x0"), ("flow-matching", "ddpm-velocity")])
def test_an_oracle_of_another_theory_has_a_loss(name: str, other: str):
    """Law: the loss tells apart what two theories ask for."""
    objective, _, _ = make(name)
    perfect(objective, get(other))
    assert float(objective.losses(0, 0, 1).per_sample.min()) > 1e-2


def test_the_settings_offer_what_theory_knows():
    assert tuple(densities.densities()) == settings.DENSITIES
    assert ("none", *densities.weightings()[1:]) == settings.WEIGHTINGS


@pytest.mark.parametrize("weighting", settings.WEIGHTINGS)
def test_a_weighting_multiplies_the_loss_of_each_sample(weighting: str):
    plain, _, _ = make(stratified_timesteps=False)
    weighted, _, _ = make(stratified_timesteps=False, weighting=weighting)
    for objective in (plain, weighted):
        objective.model.denoiser.eval()
    drawn = plain.prepare(0, 0, 1).drawn
    factor = densities.weighting(weighting.replace("none", "unit"))(plain.model.theory, drawn.t).float()
    expected = plain.losses(0, 0, 1).per_sample * factor
    torch.testing.assert_close(weighted.losses(0, 0, 1).per_sample, expected)


def test_draws_depend_on_the_sample_and_not_on_its_company():
    objective, _, _ = make(stratified_timesteps=False)
    x_0 = torch.zeros(3, *SHAPE)
    together = objective.draw([7, 8, 9], x_0, step=4)
    alone = objective.draw([8], x_0[:1], step=4)
    assert together.t[1] == alone.t[0] and together.dropped[1] == alone.dropped[0]
    assert torch.equal(together.x_T[1], alone.x_T[0])
    assert not torch.equal(objective.draw([8], x_0[:1], step=5).x_T, alone.x_T)


def test_stratified_times_fill_every_stratum_of_the_batch_whatever_the_parts():
    objective, _, _ = make(stratified_timesteps=True)
    for step in range(4):
        for parts in (1, 2, 3):
            ids = objective.encoded.ids[:6]
            bounds = [(6 * part // parts, 6 * (part + 1) // parts) for part in range(parts)]
            t = torch.cat(
                [
                    objective.draw(ids[low:high], torch.zeros(high - low, *SHAPE), step, part, parts).t
                    for part, (low, high) in enumerate(bounds)
                ]
            )
            assert (t * 6).floor().sort().values.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, False), (1.0, True)])
def test_a_dropped_caption_is_the_null_condition(dropout: float, expected: bool):
    model, plain = make()[0].model, make()[2]
    heard: list[Condition] = []
    model.denoiser.register_forward_hook(lambda module, inputs, out: heard.append(inputs[2]))
    DiffusionObjective(model, Encoded(), Order(), plain, 0, caption_dropout=dropout).losses(0, 0, 1)
    assert bool((heard[0]["tokens"] == 0).all()) is expected


def test_held_out_loss_is_the_same_twice_and_tells_levels_apart(tmp_path):
    from sfumato.run_folder import RunFolder

    objective, network, _ = make()
    network.eval()
    run = RunFolder.create(tmp_path / "run")
    measure = ValidationLoss(
        objective, Encoded(5, first=40), objective.encoded, run, samples=4, levels=4, batch=3
    )
    measure(0, "raw")
    measure(1, "raw")
    first, _, again, _ = (event for event in run.events() if event["kind"] == "validation")
    assert first["split"] == again["split"] == "held_out"
    assert first["by_level"] == again["by_level"] and first["error"] > 0
    levels = [level["level"] for level in first["by_level"]]
    assert levels == sorted(levels) and 0 < levels[0] < levels[-1] < 1
    mean = sum(level["loss"] for level in first["by_level"]) / 4
    assert mean == pytest.approx(first["loss"])
    assert sample_indices(3, 10) == [0, 1, 2] and sample_indices(0, 10) == []


def test_reading_ahead_gives_what_is_asked_for_whatever_was_guessed():
    asked: list[tuple[int, int, int]] = []

    def read(step: int, part: int, parts: int) -> tuple[int, int, int]:
        asked.append((step, part, parts))
        return step, part, parts

    reader = Reader(read)
    places = [(s, p, 2) for s in range(3) for p in range(2)] + [(9, 0, 1), (10, 0, 1), (11, 0, 1), (4, 1, 2)]
    assert [reader(*place) for place in places] == places
    assert len(asked) <= 2 * len(places)


class Pixels:
    ids = tuple(range(8))
    names = tuple(f"{i}.png" for i in range(8))
    pictures = torch.randint(
        0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )

    def read(self, indices: list[int]) -> torch.Tensor:
        return self.pictures[indices]


def test_a_codec_learns_to_give_pictures_back(tmp_path):
    from sfumato.run_folder import RunFolder
    from sfumato.training.loop.loop import fit

    torch.manual_seed(0)
    codec = ResidualCodec(stride=4, latent_channels=8, width=8)
    objective = ReconstructionObjective(codec, Pixels(), Order(8, 4), seed=0, flip=True)
    few = TrainSettings(steps=30, batch=4, warmup_steps=1, learning_rate=3e-3, save_every=100)
    before = float(objective.losses(1000, 0, 1).per_sample.mean().detach())
    outcome = fit(objective, codec, few, RunFolder.create(tmp_path / "run"))
    after = float(objective.losses(1000, 0, 1).per_sample.mean().detach())
    assert after < 0.8 * before
    assert outcome.average is not None
    outcome.average.copy_to_network()
    assert objective.name_of(3) == "3.png"


def test_reconstruction_error_is_zero_only_for_the_same_picture():
    x = torch.rand(2, 3, 16, 16)
    assert reconstruction_error(x, x).tolist() == [0, 0]
    assert (reconstruction_error(x + 0.1, x) > 0.09).all()


def test_a_first_read_that_stalls_is_named():
    free = threading.Event()
    reader = Reader(lambda step, part, parts: free.wait(5), patience=0.05)
    with pytest.raises(Failed, match="step 0 did not arrive"):
        reader(0, 0, 1)
    free.set()
