"""One thing that goes wrong: a program per contender."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# What NVIDIA's and PyTorch's documentation says of NCCL, which was not measured
UNDEFINED = "undefined: hang, crash or corrupted data"
NOT_COMPARED = "not compared; undefined"
WATCHDOG = "watchdog ends the process after the timeout (10 min by default)"
NOTICED = "an asynchronous error where the network notices, else the watchdog"

# The groups, in the page's words
MISMATCHES = "Ranks that call different things"
DATA = "Data with traps"
DEADLINES = "A rank that does not come"
ENDINGS = "A rank that ends"
BUFFERS = "Buffers in flight"
THREADS = "Threads and forks"
AFTERWARDS = "After a failure"


@dataclass(frozen=True)
class Scenario:
    group: str
    name: str
    ours: str
    mpi: str
    gloo: str
    nccl: str  # from the documentation
    ranks: int = 2
    culprits: tuple[int, ...] = ()  # whose fate is the cause: the others are asked what they saw
    kills: bool = False  # a signal is part of the scenario, and no crash
    alike: bool = False  # right is what all ranks agree in
    launcher: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # options, by MPI library

    def body(self, contender: str) -> str:
        return {"ours": self.ours, "mpi": self.mpi, "gloo": self.gloo}[contender]
