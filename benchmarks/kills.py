"""Kill a run a hundred times, at moments and with signals that are drawn, and compare what it ends with.

    python benchmarks/kills.py [--kills 100] [--rounds 10] [--seed 1] [--out FILE.json]

Each round trains the demo's kind of recipe (embedded shapes, text, a DiT, accumulation, averages, pictures,
held-out loss, checkpoints beside the steps) while it is killed `kills / rounds` times. Its last checkpoint
must have the checksums of the run that was left in peace, and so must its pictures.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sfumato.record import RunFolder

RECIPE = """
output = "{output}"
[model]
width = 32
depth = 1
heads = 2
latent_channels = 4
codec_width = 8
codec_steps = 5
[data]
train = "shapes"
resolution = 32
store = "store"
[train]
steps = 400
batch = 8
accumulate = 2
save_every = 9
log_every = 5
held_out_every = 60
ema_snapshots = 80
threads = 1
[sample]
every = 100
steps = 2
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def start(recipe: Path) -> subprocess.Popen[str]:
    """The train command."""
    words = [sys.executable, "-m", "sfumato", "train", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )


def fingerprint(run: Path) -> str:
    """One hash over the tensors of the last checkpoint, the last snapshots and the last pictures."""
    digest = hashlib.sha256()
    last = RunFolder.open(run).checkpoint_folders()[-1]
    averages = sorted((run / "averages").glob("step-*"))[-1]
    files = [*last.glob("*.safetensors"), *averages.glob("*.safetensors"), *(run / "samples").glob("*.png")]
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return f"{last.name} {digest.hexdigest()}"


def size(file: Path) -> int:
    """Of a file that may not be there yet."""
    return file.stat().st_size if file.exists() else 0


def steps(file: Path) -> int:
    """How many steps a file of events has."""
    return file.read_bytes().count(b'"kind": "step"') if file.exists() else 0


def one_kill(recipe: Path, run: Path, dice: random.Random) -> dict[str, object]:
    """Start the run, wait until it works, mostly until it takes steps, and kill it at a random moment."""
    events = run / "events.jsonl"
    how_far = size if dice.random() < 0.25 else steps
    before, process = how_far(events), start(recipe)
    while process.poll() is None and how_far(events) <= before:
        time.sleep(0.02)
    time.sleep(dice.uniform(0, 1.5))
    number = dice.choice(SIGNALS)
    met = process.poll() is None
    if met:
        process.send_signal(number)
    _, said = process.communicate(timeout=600)
    if process.returncode not in (0, *(-one for one in SIGNALS), 130, 143):
        raise SystemExit(said)
    folders = RunFolder.open(run).checkpoint_folders()
    return {
        "signal": number.name if met else "finished before",
        "code": process.returncode,
        "saved": folders[-1].name if folders else "",
    }


def main() -> None:
    """Print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="")
    asked = parser.parse_args()
    dice = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        found: dict[str, object] = {"kills": [], "hashes": []}
        for name in ["peace", *(f"round-{number}" for number in range(asked.rounds))]:
            recipe = place / f"{name}.toml"
            recipe.write_text(RECIPE.format(output=name))
            kills = []
            if name != "peace":
                while len(kills) < asked.kills // asked.rounds:
                    kill = one_kill(recipe, place / name, dice)
                    if kill["signal"] == "finished before":
                        break
                    kills.append(kill)
            process = start(recipe)
            _, said = process.communicate(timeout=1200)
            if process.returncode:
                raise SystemExit(said)
            found["kills"] += kills  # pyright: ignore
            found["hashes"].append(fingerprint(place / name))  # pyright: ignore
            print(name, len(kills), found["hashes"][-1], flush=True)  # pyright: ignore
            found["different"] = len(set(found["hashes"]))  # pyright: ignore
            if asked.out:
                Path(asked.out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
