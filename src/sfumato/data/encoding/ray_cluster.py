"""A cluster fills the store: Ray starts the workers, each takes its share of the shards.

The work is cut as for one process, so the bytes are the same too. A worker that dies costs its open shard:
Ray starts it again, and it finds what was committed. Needs the extra `cluster`.
"""

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from sfumato.errors import Failed, Refused


def run_on_ray(
    work: Callable[[int, int], Any], workers: int, cpus: float = 0.5, gpus: float = 0.0
) -> list[Any]:
    """work(rank, world) for every rank below `workers`, on whatever machines Ray has; its answers, by rank.

    Args:
        work: a function that can be sent to another process; it fills its share of a store all can reach.
        cpus, gpus: what a worker takes; a fraction of a core leaves room for Ray's own readers.
    Raises:
        Refused: Ray is not installed. Failed: a worker died more than three times, or its work failed.
    """
    try:
        ray: Any = import_module("ray")
        rows: Any = import_module("ray.data")
    except ImportError as missing:
        raise Refused(
            'Encoding on a cluster needs Ray: pip install "sfumato[cluster]", or encode with torchrun.'
        ) from missing
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, include_dashboard=False, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = rows.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0

    def one(row: dict[str, Any]) -> dict[str, Any]:
        rank = int(row["id"])
        return {"rank": rank, "answer": work(rank, workers)}

    table = rows.range(workers, override_num_blocks=workers).map(one, num_cpus=cpus, num_gpus=gpus)
    try:
        run_encoder = {row["rank"]: row["answer"] for row in table.iter_rows()}
    except ray.exceptions.RayError as problem:
        raise Failed(f"A worker of the cluster failed: {str(problem).strip().splitlines()[-1]}") from problem
    return [run_encoder[rank] for rank in range(workers)]
