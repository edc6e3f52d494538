"""Time torch.distributed over "mpicoll" beside gloo, in turn, in one job.

    OMP_NUM_THREADS=1 mpiexec -n 2 python -W ignore scripts/torch_speed.py

Each figure is the median of several rounds, in each of which both take a turn.  The first table is
of `all_reduce`, in a loop; the second of steps of training by DistributedDataParallel.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import mpicoll.torch  # noqa: F401

ROUNDS = 9
SIZES = (4, 1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 26)  # bytes
Calls = dict[str, tuple[Callable[[], Any], int]]


def medians(calls: Calls) -> dict[str, float]:
    """Return the median seconds of each call; each is made so many times in a round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (call, times) in calls.items():
            call()
            dist.barrier()
            start = time.perf_counter()
            for _ in range(times):
                call()
            found[name].append((time.perf_counter() - start) / times)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def calls_of(x: torch.Tensor, gloo: Any) -> Calls:
    times = max(2, min(1000, (1 << 25) // x.nbytes))
    return {
        "sync": (lambda: dist.all_reduce(x), times),
        "async": (lambda: dist.all_reduce(x, async_op=True).wait(), times),
        "gloo": (lambda: dist.all_reduce(x, group=gloo), min(times, 200)),
    }


def allreduces(gloo: Any) -> None:
    if dist.get_rank() == 0:
        print("| all_reduce | mpicoll | async_op, wait() | gloo | gloo / mpicoll |")
        print("|---|---|---|---|---|")
    for nbytes in SIZES:
        calls = calls_of(torch.zeros(nbytes // 4), gloo)
        us = {name: seconds * 1e6 for name, seconds in medians(calls).items()}
        ratio = us["gloo"] / us["sync"]
        if dist.get_rank() == 0:
            words = f"{us['sync']:,.1f} us | {us['async']:,.1f} us | {us['gloo']:,.1f} us"
            print(f"| {nbytes:,} B | {words} | {ratio:.1f} |", flush=True)


def wide() -> nn.Module:
    """Return 10 million parameters in few large layers."""
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(1581, 1581), nn.ReLU())])


def narrow() -> nn.Module:
    """Return 800 small parameters."""
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(400)])


def steps(gloo: Any) -> None:
    if dist.get_rank() == 0:
        print("\n| step of DDP | mpicoll | gloo | gloo / mpicoll |\n|---|---|---|---|")
    for name, make, width, hook, cap in (
        ("10 million parameters, 4 rows", wide, 1581, False, 25.0),
        ("800 parameters of 16 x 16, small buckets, a hook", narrow, 16, True, 0.01),
    ):
        x, calls = torch.randn(4, width), {}
        for backend, group in (("mpicoll", None), ("gloo", gloo)):
            torch.manual_seed(0)
            model = DistributedDataParallel(make(), process_group=group, bucket_cap_mb=cap)
            if hook:
                model.register_comm_hook(group, default_hooks.allreduce_hook)

            def step(model: nn.Module = model, x: torch.Tensor = x) -> None:
                model.zero_grad()
                model(x).square().mean().backward()

            calls[backend] = (step, 5)
        ms = {name: seconds * 1e3 for name, seconds in medians(calls).items()}
        if dist.get_rank() == 0:
            ratio = ms["gloo"] / ms["mpicoll"]
            print(f"| {name} | {ms['mpicoll']:.1f} ms | {ms['gloo']:.1f} ms | {ratio:.1f} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("mpicoll")
    beside = dist.new_group(backend="gloo")
    allreduces(beside)
    steps(beside)
    dist.destroy_process_group()
