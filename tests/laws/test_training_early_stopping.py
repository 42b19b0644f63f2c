"""Laws of what is kept and when a run ends: by the held-out loss, the same after every interruption."""

from types import SimpleNamespace

from training_world import Encoded, fingerprint, make

from sfumato.models.locate import newest_weights, weights_of
from sfumato.run_folder import RunFolder
from sfumato.training.loop import loop as training_loop
from sfumato.training.loop.early_stopping import EarlyStopping
from sfumato.training.loop.validation import ValidationLoss

LOSSES = {2: 1.0, 4: 0.5, 6: 0.7, 8: 0.6, 10: 0.8, 12: 0.9}


def train(folder, losses=LOSSES, **changes):
    """A run whose held-out loss is written in a table."""
    words = {"save_every": 100, "validate_every": 2, "keep_checkpoints": 1, **changes}
    objective, network, settings = make(**words)
    run = RunFolder.create(folder)
    measure = lambda step, weights: SimpleNamespace(loss=losses[step])  # noqa: E731
    return training_loop.fit(objective, network, settings, run, 3, held_out=measure, say=lambda _: None)


def test_the_best_checkpoint_stays_and_has_a_name(tmp_path):
    train(tmp_path)
    run = RunFolder.open(tmp_path)
    assert [folder.name for folder in run.checkpoint_folders()] == ["step-000004", "step-000012"]
    home, named = weights_of(tmp_path / "checkpoints" / "best")
    assert home == tmp_path and named is not None and named.name == "step-000004"
    assert newest_weights(run).parent.name == "step-000012"


def test_without_keep_best_only_the_newest_stay(tmp_path):
    train(tmp_path, keep_best=False)
    assert [folder.name for folder in RunFolder.open(tmp_path).checkpoint_folders()] == ["step-000012"]


def test_patience_ends_the_run_and_interruptions_do_not_change_when(tmp_path):
    outcome = train(tmp_path / "through", patience=2)
    assert (outcome.step, outcome.reason) == (8, "held-out loss no longer falls")
    train(tmp_path / "twice", steps=6, patience=2)
    assert train(tmp_path / "twice", patience=2).step == 8
    assert fingerprint(tmp_path / "twice") == fingerprint(tmp_path / "through")
    assert train(tmp_path / "through", patience=2).step == 8
    assert train(tmp_path / "through", patience=5).step == 12
    notes = [
        event["text"] for event in RunFolder.open(tmp_path / "through").events() if event["kind"] == "note"
    ]
    assert any("ends here" in note for note in notes)


def test_a_measurement_heard_twice_counts_once():
    stopping = EarlyStopping(patience=2)
    assert stopping.update(10, 1.0)
    assert not stopping.update(20, 1.0) and not stopping.update(20, 1.0)
    assert stopping.since_best == 1 and not stopping.is_over
    again = EarlyStopping(patience=2)
    again.load(stopping.state())
    assert again == stopping


def test_the_gap_is_recorded_with_its_error(tmp_path):
    objective, _, _ = make()
    run = RunFolder.create(tmp_path)
    ValidationLoss(objective, Encoded(5, first=40), objective.encoded, run, samples=5, levels=2)(7, "ema")
    events = {event["kind"]: event for event in run.events()}
    by_split = {event["split"]: event for event in run.events() if event["kind"] == "validation"}
    assert events["generalization_gap"]["gap"] == by_split["held_out"]["loss"] - by_split["train"]["loss"]
    assert events["generalization_gap"]["error"] > 0


def test_saving_beside_the_steps_writes_the_bits_of_saving_between_them(tmp_path):
    losses = dict.fromkeys(range(2, 13, 2), 1.0)
    for name, beside in (("beside", True), ("between", False)):
        train(tmp_path / name, losses, save_every=3, keep_checkpoints=9, save_async=beside)
    a, b = (RunFolder.open(tmp_path / name).checkpoint_folders() for name in ("beside", "between"))
    assert [one.name for one in a] == [one.name for one in b]
    for one, other in zip(a, b, strict=True):
        for file in one.glob("*.safetensors"):
            assert file.read_bytes() == (other / file.name).read_bytes()
