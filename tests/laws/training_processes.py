"""A run of the small world on many processes."""

from pathlib import Path

from training_world import fingerprint, train

from workers import run_processes


def _train(folder: Path, changes: dict[str, object]) -> None:
    train(folder, **changes)


def run_on(count: int, folder: Path, **changes: object) -> str:
    """Train on `count` processes; the fingerprint of what they end with."""
    run_processes(count, _train, folder, changes)
    return fingerprint(folder)
