"""What sharing a long clip saves: memory and CPU seconds of a step of our DiT, alone and by two processes.

    OMP_NUM_THREADS=1 python benchmarks/context.py [--frames 9] [--side 16] [--width 256] [--out FILE]

A step is one clip's loss and backward pass, gradients summed over the processes (gloo). Memory is the rise of
a process's peak above what it held before the step, its gradients left out; seconds are the CPU seconds of
each process, the second of two steps.
"""

import argparse
import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import torch
import torch._dynamo  # here, so that no forked process imports it
import torch.distributed as dist

from sfumato.models.condition import Condition
from sfumato.models.networks.dit import DiT
from sfumato.training.distributed import context_parallel
from sfumato.training.distributed.processes import join_processes
from sfumato.training.estimate import probe
from sfumato.training.settings import TrainSettings


def work(
    rank: int, count: int, port: int, said: argparse.Namespace, tell: multiprocessing.SimpleQueue
) -> None:
    """Take two steps as one of `count` processes and tell what the second took."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.manual_seed(0)
    dit = DiT(16, said.width, said.depth, heads=4, text_width=384, frames=said.frames)
    for weight in dit.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    clip = torch.randn(1, 16, said.frames, said.side, said.side)
    told = Condition({"tokens": torch.randn(1, 8, 384), "pooled": torch.randn(1, 384)})
    device = torch.device("cpu")
    with (
        join_processes("cpu") as processes,
        context_parallel.enabled_for_training(dit, TrainSettings(context_parallel=count), processes),
    ):
        for _ in range(2):
            dit.zero_grad()
            before, began = probe.held_bytes(device), time.process_time()
            with probe.peak_memory(device) as peak:
                loss = dit(clip, torch.tensor([500.0]), told).square().mean()
                loss.backward()
                for weight in dit.parameters() if count > 1 else ():
                    if weight.grad is not None:
                        dist.all_reduce(weight.grad)
                risen = peak() - before
        norm = torch.nn.utils.get_total_norm([w.grad for w in dit.parameters() if w.grad is not None])
        gradients = 4 * sum(weight.numel() for weight in dit.parameters())
        seconds = round(time.process_time() - began, 2)
        tell.put(
            {
                "mb": round((risen - gradients) / 1e6),
                "cpu_seconds": seconds,
                "loss": float(loss.detach()),
                "norm": float(norm),
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, usual in (("frames", 9), ("side", 16), ("width", 256), ("depth", 8)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--out", type=Path)
    said = parser.parse_args()
    fork = multiprocessing.get_context("fork")
    found: dict[str, object] = {
        "tokens": said.frames * said.side**2,
        "width": said.width,
        "depth": said.depth,
    }
    for count in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        tell = fork.SimpleQueue()
        workers = [fork.Process(target=work, args=(rank, count, port, said, tell)) for rank in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        found[f"{count} processes"] = [tell.get() for _ in range(count)]
    text = json.dumps(found, indent=1)
    print(text)
    if said.out:
        said.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
