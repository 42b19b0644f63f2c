"""A Ray cluster fills the store with the bytes of one process, though a worker dies."""

import os
import sys
from pathlib import Path

import pytest
from test_data_store import HOW, Encoder, fill, hashes, samples

from sfumato.data.encoding import encode
from sfumato.data.encoding.ray_cluster import run_on_ray
from sfumato.data.store.store import Store
from sfumato.errors import Refused


def test_without_ray_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Refused, match=r"sfumato\[cluster\]"):
        run_on_ray(lambda rank, world: None, 2)


@pytest.mark.slow
def test_a_killed_worker_changes_nothing(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    died = tmp_path / "died"

    def work(rank, world):
        if rank == 1 and not died.exists():
            died.touch()
            os._exit(9)
        encoder = Encoder()
        store = Store(tmp_path / "cluster")
        found = encode.encode_to_store(
            store, samples(50), (16, 16), encoder.look, encoder.hear, HOW, part=(rank, world), patience=60
        )
        return len(found)

    assert run_on_ray(work, 2) == [50, 50] and died.exists()
    fill(tmp_path / "one", 50)
    assert hashes(tmp_path / "cluster") == hashes(tmp_path / "one")
