"""Commands run in a folder of their own."""

import pytest

from sfumato.workflow.suggest.measure_steps import StepSeconds


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test writes into the project."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    """`sfumato new` is told how long steps take, and takes none."""
    seconds = StepSeconds(codec=0.05, denoiser=0.1)
    monkeypatch.setattr("sfumato.workflow.suggest.suggestion.measure_steps", lambda recipe: seconds)
