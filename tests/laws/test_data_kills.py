"""Encoding survives kills at any moment, and several processes share it: the stored bytes are the same."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_data_store import HOW, Encoder, fill, hashes, samples

from sfumato.data.encoding import encode
from sfumato.data.store.store import Store

SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_data_store import Encoder, fill
class Slow(Encoder):
    def look(self, pixels):
        time.sleep(0.004)
        return super().look(pixels)
print("ready", flush=True)
fill({root!r}, 96, encoder=Slow())
"""


def kill_after(root, seconds):
    text = SCRIPT.format(tests=str(Path(__file__).parent), root=str(root))
    child = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, env={**os.environ})
    child.stdout.readline()
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.wait()


def killed_many_times(tmp_path, times, longest):
    chance = np.random.default_rng(0)
    for _ in range(times):
        kill_after(tmp_path / "killed", float(chance.uniform(0, longest)))
        for kind in ("pixels", "text"):
            if (tmp_path / "killed" / kind).exists():
                Store(tmp_path / "killed").content_hash(kind)  # every shard there is whole
    fill(tmp_path / "killed", 96)
    fill(tmp_path / "quiet", 96)
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "quiet")


def test_kills_change_nothing(tmp_path):
    killed_many_times(tmp_path, 2, 0.15)


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path):
    killed_many_times(tmp_path, 50, 0.25)


PART = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_data_store import Encoder, HOW, samples
from sfumato.data.encoding import encode
from sfumato.data.store.store import Store
encoder = Encoder()
given = samples(50)
given[7] = type(given[7])("007", ("x",), picture=lambda: b"broken")
encoded = encode.encode_to_store(
    Store({root!r}), given, (16, 16), encoder.look, encoder.hear, HOW, part=({rank}, 2)
)
print(len(encoded), encoder.pixels, [one.file for one in encoded.set_aside])
"""


def test_two_processes_fill_one_store_with_the_same_bytes(tmp_path):
    tests = str(Path(__file__).parent)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PART.format(tests=tests, root=str(tmp_path / "both"), rank=rank)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [child.communicate(timeout=100)[0].split(maxsplit=2) for child in children]
    assert all(one[0] == "49" and one[2].strip() == "['007']" for one in said)
    assert sum(int(one[1]) for one in said) == 49
    given = samples(50)
    given[7] = replace(given[7], captions=("x",), picture=lambda: b"broken")
    fill(tmp_path / "one", given=given)
    assert hashes(tmp_path / "both") == hashes(tmp_path / "one")


def test_who_died_is_waited_for_no_longer_than_patience(tmp_path):
    encoder = Encoder()
    encoded = encode.encode_to_store(
        Store(tmp_path), samples(20), (16, 16), encoder.look, encoder.hear, HOW, part=(1, 2), patience=0.3
    )
    assert len(encoded) == 20 and encoder.pixels == 20
