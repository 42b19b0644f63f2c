"""Kill a run a hundred times, at moments and with signals that are drawn, and compare what it ends with.

    python benchmarks/kills.py [--kills 100] [--rounds 10] [--seed 1] [--place DIR] [--out FILE.jsonl]

Each round trains the demo's kind of recipe (embedded shapes, text, a DiT, accumulation, averages, pictures,
held-out loss, checkpoints beside the steps) while it is killed, until all kills have met it alive. What it
ends with must have the bits of the run that was left in peace: weights, averages, optimizer, snapshots and
pictures. The killed command notes what it does in a file of 64 bytes, which says afterwards where it died;
it is forked from a server that has imported what it needs. Rounds are appended to the file as they end, and
the file is gone on from.
"""

import argparse
import hashlib
import json
import mmap
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sfumato.run_folder import RunFolder

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
cache_dir = "store"
[train]
steps = 400
batch = 8
gradient_accumulation = 2
save_every = 9
log_every = 5
validate_every = 60
ema_snapshot_every = 80
threads = 1
[sample]
every = 100
steps = 2
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["sfumato.workflow", "transformers.models.clip.modeling_clip"])


def train(recipe: Path, notes: Path) -> None:
    """The train command, noting what it does where its killer can read it."""
    from sfumato.cli import main as command
    from sfumato.training.loop import profiling
    from sfumato.training.state import checkpoint

    board = mmap.mmap(os.open(notes, os.O_RDWR), 64)
    asked = [0]

    @contextmanager
    def part(name: str) -> Iterator[None]:
        asked[0] = 0 if name == "step" else asked[0] + (name == "forward")
        board[:32] = f"{name} {asked[0]}".encode().ljust(32)
        yield
        if name == "step":
            board[:32] = b"beside".ljust(32)

    write = checkpoint.write

    def noted(*given: Any) -> None:
        board[32:] = b"writing".ljust(32)
        write(*given)
        board[32:] = b" " * 32

    profiling.part, checkpoint.write = part, noted  # pyright: ignore[reportAttributeAccessIssue]
    sys.argv = ["sfumato", "train", str(recipe)]
    sys.stderr = sys.stdout = recipe.with_suffix(".said").open("a")
    command()


def start(recipe: Path, notes: Path) -> BaseProcess:
    """The train command in a process of its own."""
    notes.write_bytes(b"starting".ljust(64))
    process = SERVER.Process(target=train, args=(recipe, notes))
    process.start()
    return process


def finish(process: BaseProcess) -> int:
    """Wait for its end; its exit code, one of those that a killed or stopped run may have."""
    process.join(900)
    assert process.exitcode in (0, *(-one for one in SIGNALS), 130, 143), process.exitcode
    return process.exitcode


def fingerprint(run: Path) -> dict[str, str]:
    """One hash for each kind of thing that a run ends with."""
    last = RunFolder.open(run).checkpoint_folders()[-1]
    found = {f"{last.name} {file.stem}": [file] for file in sorted(last.glob("*.safetensors"))}
    found["averages"] = sorted((run / "averages").rglob("*.safetensors"))
    found["pictures"] = sorted((run / "samples").glob("*.png"))
    assert all(found.values())
    return {name: hashed(files) for name, files in found.items()}


def hashed(files: list[Path]) -> str:
    """Of names and bytes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def size(file: Path) -> int:
    """Of a file that may not be there yet."""
    return file.stat().st_size if file.exists() else 0


def steps(file: Path) -> int:
    """How many steps a file of events has."""
    return file.read_bytes().count(b'"kind": "step"') if file.exists() else 0


def one_kill(recipe: Path, run: Path, dice: random.Random) -> dict[str, object] | None:
    """Start the run, wait until it works, mostly until it takes steps, and kill it at a random moment.

    Returns:
        where it died; None if it was done before.
    """
    events, notes = run / "events.jsonl", run.with_suffix(".notes")
    how_far = size if dice.random() < 0.15 else steps
    before, process = how_far(events), start(recipe, notes)
    while process.is_alive() and how_far(events) <= before:
        time.sleep(0.02)
    time.sleep(dice.uniform(0, 0.8))
    number = dice.choice(SIGNALS)
    met, at = process.is_alive(), notes.read_bytes().decode().split()
    if met and process.pid:
        os.kill(process.pid, number)
    code = finish(process)
    if not met:
        return None
    if number == signal.SIGKILL:
        at = notes.read_bytes().decode().split()  # no line of it ran after these
    folders = RunFolder.open(run).checkpoint_folders()
    writing = at[-1] == "writing"
    return {
        "signal": number.name,
        "code": code,
        "during": " ".join(at[:-1] if writing else at),
        "writing a checkpoint": writing,
        "saved": folders[-1].name if folders else "",
    }


def one_round(place: Path, name: str, kills: int, dice: random.Random) -> dict[str, Any]:
    """Train once, killed up to `kills` times on the way."""
    recipe = place / f"{name}.toml"
    recipe.write_text(RECIPE.format(output=name))
    found: list[dict[str, object]] = []
    while len(found) < kills and (kill := one_kill(recipe, place / name, dice)):
        found.append(kill)
    assert finish(start(recipe, place / f"{name}.notes")) == 0
    return {"kills": found, "hashes": fingerprint(place / name)}


def table(rounds: list[dict[str, Any]]) -> str:
    """What all rounds show, in words and numbers."""
    kills = [kill for one in rounds for kill in one["kills"]]
    hashes = [json.dumps(one["hashes"], sort_keys=True) for one in rounds]
    met = Counter(kill["signal"] for kill in kills)
    during = Counter(str(kill["during"]) for kill in kills)
    in_parts = sum(count for name, count in during.items() if name[:2] in ("fo", "ba"))
    rows = [
        ("runs killed", len([one for one in rounds if one["kills"]])),
        ("runs left in peace", len([one for one in rounds if not one["kills"]])),
        ("kills that met a run alive", len(kills)),
        *sorted(met.items()),
        ("before the first step of that process", during["starting"]),
        ("before the first checkpoint", sum(not kill["saved"] for kill in kills)),
        ("while a checkpoint was being written", sum(kill["writing a checkpoint"] for kill in kills)),
        ("within a part of the accumulation (its forward or backward pass)", in_parts),
        ("… of them after the first part and before the update", during["forward 2"] + during["backward 2"]),
        ("measuring, drawing, saving or between steps", during["beside"]),
        ("**different ends, over all runs**", len(set(hashes))),
    ]
    lines = [f"| {name} | {count} |" for name, count in rows]
    ends = [f"| {name} | `{value}` |" for name, value in rounds[0]["hashes"].items()]
    return "\n".join(
        ["| | |", "|---|---|", *lines, "", "| what a run ends with | its hash |", "|---|---|", *ends]
    )


def main() -> None:
    """Print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no round after so many")
    parser.add_argument("--place", default="", help="keep runs and encodings there, to go on with them")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    dice, began, left = random.Random(asked.seed), time.monotonic(), asked.kills
    known = asked.out.read_text().splitlines() if asked.out and asked.out.exists() else []
    rounds: list[dict[str, Any]] = [json.loads(line) for line in known]
    with tempfile.TemporaryDirectory() as folder:
        while left > 0 and time.monotonic() - began < 60 * asked.minutes:
            most = min(left, -(-asked.kills // asked.rounds)) if rounds else 0  # the first is left in peace
            name = f"seed-{asked.seed}-{len(rounds)}"
            rounds.append(one_round(Path(asked.place or folder), name, most, dice))
            left -= len(rounds[-1]["kills"])
            print(len(rounds[-1]["kills"]), rounds[-1]["hashes"] == rounds[0]["hashes"], flush=True)
            if asked.out:
                with asked.out.open("a") as lines:
                    lines.write(json.dumps({"seed": asked.seed, **rounds[-1]}) + "\n")
    print(table(rounds))


if __name__ == "__main__":
    main()
