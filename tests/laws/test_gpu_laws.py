"""The laws of GPUs hold on a make-believe one, in a process of their own: see tests/gpu."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_laws_of_gpus_hold(which):
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", which, str(TESTS / "gpu")]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=TESTS.parent,
        env={**os.environ, "GPU_LAWS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "skipped" in done.stdout, done.stdout
