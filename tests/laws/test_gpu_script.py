"""The script that proves a GPU runs where there is none: on tiny networks, every kind of line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
ONLY = {
    "noise,speed dit full float32 ours,memory flux lora nf4": 4,
    "correctness,speed,memory": 80,
}
"""What is asked → how many lines come of it, at least."""


@pytest.mark.parametrize("only", [next(iter(ONLY)), pytest.param([*ONLY][1], marks=pytest.mark.slow)])
def test_every_line_holds_on_a_cpu(only, tmp_path):
    """Law: each line says that it holds, and the lines stand in a file for each part."""
    pytest.importorskip("accelerate")
    command = [
        sys.executable,
        str(SCRIPT),
        "--device",
        "cpu",
        "--tiny",
        "--only",
        only,
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(row["holds"] for row in rows), [row for row in rows if not row["holds"]]
    assert done.returncode == 0 and len(rows) >= ONLY[only], done.stderr[-2000:]
    parts = sorted(tmp_path.glob("gpu-*.jsonl"))
    assert len(parts) == 3 and sum(len(one.read_text().splitlines()) for one in parts) == len(rows)
