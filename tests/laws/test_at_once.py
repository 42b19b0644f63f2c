"""Laws of memory that is out: half as many are asked for, all are answered, and it is said."""

import pytest
import torch
from training_world import Encoded, make

from sfumato.errors import Failed
from sfumato.models.at_once import AtOnce
from sfumato.run_folder import RunFolder
from sfumato.training.loop.validation import ValidationLoss


def with_room_for(most: int):
    """What answers slices of at most so many."""
    asked = []

    def ask(some: slice) -> list[int]:
        asked.append(some.stop - some.start)
        if some.stop - some.start > most:
            raise torch.OutOfMemoryError("out of memory")
        return list(range(some.start, some.stop))

    return ask, asked


@pytest.mark.parametrize("most", [1, 2, 3, 5, 16])
def test_all_are_answered_in_order_and_what_fits_is_remembered(most: int):
    said: list[str] = []
    at_once = AtOnce("pictures", "Use less.", said.append)
    ask, asked = with_room_for(most)
    assert [one for some in at_once(ask, 16) for one in some] == list(range(16))
    failed = sum(size > most for size in asked)
    assert len(said) == failed and all("at once from now on" in one for one in said)
    asked.clear()
    assert [one for some in at_once(ask, 7) for one in some] == list(range(7)) and max(asked) <= most


def test_where_one_is_too_many_a_sentence_says_the_way_out():
    ask, _ = with_room_for(0)
    with pytest.raises(Failed, match=r"one of the pictures alone. Use less."):
        AtOnce("pictures", "Use less.")(ask, 4)


def test_the_held_out_loss_is_the_same_however_few_fit(tmp_path, monkeypatch):
    """Law: a sample's loss does not depend on those that are measured with it; that fewer fit is noted."""
    objective, _, _ = make()
    objective.model.denoiser.eval()
    found = []
    for most in (16, 3):
        run = RunFolder.create(tmp_path / str(most))
        measure = ValidationLoss(objective, Encoded(8, first=50), objective.encoded, run, samples=8, levels=2)
        losses = measure._losses

        def limited(encoded, indices, t, level, losses=losses, most=most):
            if len(indices) > most:
                raise torch.OutOfMemoryError("out of memory")
            return losses(encoded, indices, t, level)

        monkeypatch.setattr(measure, "_losses", limited)
        found.append(measure(0, "raw").loss)
        notes = [one["text"] for one in run.events() if one["kind"] == "note"]
        assert len(notes) == (2 if most == 3 else 0)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
