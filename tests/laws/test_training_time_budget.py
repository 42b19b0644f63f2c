"""Laws of `train.minutes`: the clock decides the last step and the rate with it; what it decided is kept."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from training_world import fingerprint, train

from sfumato.run_folder import RunFolder
from sfumato.training.loop import loop as training_loop
from sfumato.training.loop.time_budget import EVENT, Knot, TimeBudget
from sfumato.training.optim.lr_schedule import SCHEDULES, lr_factor
from sfumato.training.settings import TrainSettings

MINUTES = 4.0


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def run(seconds: Callable[[int, float], float], spent: float = 0.0, **settings: object):
    """A run in which step `s`, begun at `t`, takes seconds(s, t): its budget, time, shares and knots."""
    clock = Clock(1000.0)
    asked = {"steps": 10**6, "minutes": MINUTES, **settings}
    budget = TimeBudget(TrainSettings(**asked), spent, clock)  # pyright: ignore[reportArgumentType]
    step, shares, knots = 0, [0.0], list[Knot]()
    while step < budget.last_step:
        clock.now += seconds(step, clock.now - 1000)
        step += 1
        if (knot := budget.decide(step)) is not None:
            knots.append(knot)
        shares.append(budget.done(step) or 0.0)
    return budget, clock.now - 1000, shares, knots


MACHINES: dict[str, Callable[[int, float], float]] = {
    "fast": lambda step, at: 0.01,
    "slow": lambda step, at: 0.7,
    "slow at half": lambda step, at: 0.1 if at < 120 else 0.3,
    "fast at half": lambda step, at: 0.3 if at < 120 else 0.1,
    "slow to begin": lambda step, at: 1.0 if step < 10 else 0.1,
    "busy at times": lambda step, at: 0.1 if int(at / 30) % 2 else 0.25,
}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_run_takes_its_minutes_and_ends_its_schedule_whatever_the_machine_does(machine):
    budget, seconds, shares, knots = run(machine)
    assert seconds == pytest.approx(60 * MINUTES, rel=0.02)
    assert shares[-1] == 1 and max(b - a for a, b in pairwise(shares[1:])) < 0.02, "no jump, up to the end"
    assert all(a <= b for a, b in pairwise(shares))
    assert len(knots) < 60 and not budget.is_late


def test_a_faster_machine_trains_longer():
    assert len(run(lambda *_: 0.1)[2]) == pytest.approx(2 * len(run(lambda *_: 0.2)[2]), rel=0.01)


def test_what_was_spent_before_the_first_step_counts():
    assert run(lambda *_: 0.1, spent=100)[1] == pytest.approx(60 * MINUTES - 100, rel=0.02)


def test_a_run_makes_its_fewest_steps_and_says_that_it_takes_longer():
    budget, seconds, shares, _ = run(lambda *_: 0.3, min_steps=2000)
    assert len(shares) - 1 == 2000 and seconds == pytest.approx(600)
    assert "train.min_steps = 2,000" in budget.explain() and "10.0 minutes instead of 4.0" in budget.explain()


def test_a_run_makes_no_more_than_its_steps():
    budget, seconds, shares, _ = run(lambda *_: 0.01, steps=500)
    assert len(shares) - 1 == 500 and seconds < 10 and not budget.is_late


def test_a_run_whose_minutes_are_over_at_once_lets_the_rate_fall_instead_of_breaking_off():
    """A machine that stood still for ten minutes at step 1000."""
    budget, _, shares, knots = run(lambda step, _: 600 if step == 1000 else 0.1)
    assert shares[-1] == 1 and 1100 < len(shares) < 1250 and knots[-1].step == 1010
    assert budget.is_late and "learning rate falls" in budget.explain()


@pytest.mark.parametrize("name", SCHEDULES)
def test_before_the_clock_decides_no_step_depends_on_how_many_there_will_be(name):
    budgets = [
        TimeBudget(TrainSettings(steps=steps, minutes=minutes)) for steps, minutes in ((9, 1), (99, 7))
    ]
    for step in range(20):
        factors = {lr_factor(name, step, b.settings.steps, 5, b.done(step)) for b in budgets}
        assert factors == {min(1.0, (step + 1) / 5)}


def test_processes_with_clocks_of_their_own_decide_the_same():
    said: list[int] = []

    def lead(number: int) -> int:
        said.append(number)
        return number

    settings = TrainSettings(steps=10**6, minutes=1)
    clocks = Clock(), Clock()
    leader = TimeBudget(settings, 0, clocks[0], lead)
    other = TimeBudget(settings, 0, clocks[1], lambda _: said.pop(0))
    step = 0
    while step < leader.last_step:
        step += 1
        clocks[0].now += 0.1
        clocks[1].now += 0.7
        assert leader.decide(step) == other.decide(step)
    assert (leader.knot, leader.done(step)) == (other.knot, 1.0) and step in (599, 600)


def test_as_many_steps_are_expected_as_fit():
    settings = TrainSettings(steps=1000, minutes=2, min_steps=100)
    assert [settings.expected_steps(seconds) for seconds in (0.01, 0.5, 9.0)] == [1000, 240, 100]
    assert TrainSettings(steps=7).expected_steps(1.0) == 7


# ------------------------------------------------------------------------------ in the loop


class Lost(Exception):
    """The process dies."""


@pytest.fixture
def machine(monkeypatch):
    """machine(die): every step takes a quarter of a second of a clock; at step `die` the process is lost."""
    clock, fatal = Clock(), [-1]
    advance = training_loop._Loop.advance

    def timed(self: training_loop._Loop) -> float:
        if self.step == fatal[0]:
            raise Lost
        clock.now += 0.25
        return advance(self)

    monkeypatch.setattr(training_loop._Loop, "advance", timed)
    monkeypatch.setattr(training_loop, "TimeBudget", partial(TimeBudget, clock=clock))

    def set_fatal(die: int = -1) -> Clock:
        fatal[0] = die
        return clock

    return set_fatal


SETTINGS = {"steps": 10**4, "minutes": 0.25, "lr_schedule": "linear", "validate_every": 0, "save_every": 12}


def decided(folder: Path) -> list[tuple[int, int]]:
    events = RunFolder.open(folder).events()
    return [(event["step"], event["last_step"]) for event in events if event["kind"] == EVENT]


def test_a_run_that_is_lost_after_the_decision_ends_with_the_same_bits(machine, tmp_path):
    """Law: also where no checkpoint knows of the decision, and whatever the clock says when it goes on."""
    machine()
    assert train(tmp_path / "through", **SETTINGS).step == 60
    assert decided(tmp_path / "through") == [(2, 60)]
    for die, every, resumed in ((3, 1, 1), (40, 12, 36)):
        lost = tmp_path / str(die)
        machine(die)
        with pytest.raises(Lost):
            train(lost, **SETTINGS | {"save_every": every})
        for folder in RunFolder.open(lost).checkpoint_folders():
            if 2 <= int(folder.name[-6:]) < 10:  # those that know of the decision are lost too
                folder.rename(folder.with_name(f".{folder.name}"))
        machine().now += 10**5
        assert train(lost, **SETTINGS).resumed == resumed
        assert fingerprint(lost) == fingerprint(tmp_path / "through")


def test_a_run_that_is_lost_before_the_decision_takes_its_minutes_all_the_same(machine, tmp_path):
    changes = SETTINGS | {"minutes": 1.0, "save_every": 100}
    machine(3)
    with pytest.raises(Lost):
        train(tmp_path, **changes | {"save_every": 2})
    assert decided(tmp_path) == []
    machine().now += 10**5
    outcome = train(tmp_path, **changes)
    assert (outcome.resumed, outcome.step, outcome.reason) == (2, 240, "done")


def test_a_run_that_is_complete_stays_so_and_goes_on_with_more_minutes(machine, tmp_path, capsys):
    machine()
    assert train(tmp_path, **SETTINGS).step == 60
    again = train(tmp_path, **SETTINGS)
    assert (again.resumed, again.step) == (60, 60) and "train.minutes=0.5" in capsys.readouterr().err
    longer = train(tmp_path, **SETTINGS | {"minutes": 0.5})
    assert longer.step == 120 and "train.minutes was 0.25 and is 0.5" in capsys.readouterr().err
    rates = {
        one["step"]: one["learning_rate"]
        for one in RunFolder.open(tmp_path).events()
        if one["kind"] == "step"
    }
    assert rates[64] == pytest.approx(0.5 * 1e-2, rel=0.05), "half of the new minutes is over"
    assert rates[120] < 0.02 * 1e-2
    shorter = train(tmp_path, **SETTINGS | {"minutes": 0.1})
    assert shorter.step == 120


def test_without_minutes_nothing_of_the_clock_is_in_a_checkpoint(tmp_path):
    train(tmp_path, steps=2)
    folder = RunFolder.open(tmp_path).checkpoint_folders()[-1]
    assert "time_budget" not in (folder / "state.json").read_text(encoding="utf-8")
