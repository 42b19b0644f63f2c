"""Train a recipe on a Ray cluster: each worker is one process of the run, with a GPU of its own.

    python examples/cluster/ray_train.py apples.toml --workers 16 --gpu output=/shared/runs/apples

The recipe, its data and the run's folder lie where all workers see them. A worker that dies ends the attempt;
Ray starts them all again, and they go on from the last checkpoint.
"""

import argparse
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(asked: dict[str, Any]) -> None:
    """What each worker does; Ray has joined the processes already."""
    import sfumato

    sfumato.train(asked["recipe"], asked["overrides"])


def main() -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--cpus", type=float, default=1.0, help="of each worker")
    asked = parser.parse_intermixed_args()
    trainer = TorchTrainer(
        work,
        train_loop_config={"recipe": str(asked.recipe.resolve()), "overrides": asked.overrides},
        scaling_config=ScalingConfig(
            num_workers=asked.workers, use_gpu=asked.gpu, resources_per_worker={"CPU": asked.cpus}
        ),
        torch_config=TorchConfig(backend="nccl" if asked.gpu else "gloo"),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
