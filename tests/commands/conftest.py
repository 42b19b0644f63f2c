"""Commands run in a folder of their own."""

import pytest


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No test writes into the project."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
