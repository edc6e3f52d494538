"""What the environment and the machine say: the only module that reads `os.environ`."""

from __future__ import annotations

import math
import os
from datetime import timedelta

from .errors import InvalidCallError

DEFAULT_TIMEOUT = 1800.0  # seconds, as in torch.distributed


def default_timeout() -> float:
    """Seconds a call may take where nobody said otherwise: MPICOLL_TIMEOUT, else 1800."""
    text = os.environ.get("MPICOLL_TIMEOUT")
    if text is None:
        return DEFAULT_TIMEOUT
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise InvalidCallError(
            f"MPICOLL_TIMEOUT must be a number of seconds above 0, but is {text!r}"
        )
    return value


def grace() -> float:
    """Seconds that a rank which failed gives peers that don't know of it: MPICOLL_GRACE, else 3."""
    text = os.environ.get("MPICOLL_GRACE", "3")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 <= value < math.inf):
        raise InvalidCallError(f"MPICOLL_GRACE must be a number of seconds, but is {text!r}")
    return value


def survives_deaths() -> bool:
    """Whether the launcher has switched on MPI's fault tolerance (ULFM) for this job.

    Open MPI's `mpirun --with-ft ulfm` says so in the environment; without it MPI's calls for it
    exist, return, and do nothing.
    """
    said = os.environ.get("OMPI_MCA_mpi_ft_enable", "")  # noqa: SIM112  (Open MPI's spelling)
    return said.lower() in ("1", "true", "yes", "on")


def ranks_on_node() -> int | None:
    """How many ranks the launcher says it started on this machine, if it says so."""
    for name in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        text = os.environ.get(name, "").split("(")[0]
        if text.isdigit():
            return int(text)
    return None


def local_rank() -> int | None:
    """This rank's number among those that the launcher started on this machine, if it says so."""
    for name in ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"):
        text = os.environ.get(name, "")
        if text.isdigit():
            return int(text)
    return None


def nccl_shares_gpus() -> bool:
    """Whether NCCL (2.30 and newer) was told that several ranks may share a GPU."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "") == "1"


def node_sizes(world: int) -> tuple[int, ...]:
    """Ranks on each node that MPICOLL_NODES pretends, in the order of the world; () if unset.

    "2" makes that many nodes, as even as can be; "3,1" gives their sizes.
    """
    text = os.environ.get("MPICOLL_NODES", "")
    if not text:
        return ()
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) == 1 and 1 <= sizes[0] <= world:
        sizes = [(i + 1) * world // sizes[0] - i * world // sizes[0] for i in range(sizes[0])]
    if sum(sizes) != world or min(sizes) < 1:
        raise InvalidCallError(
            f"MPICOLL_NODES must be a number of nodes up to the world's {world} ranks, or sizes "
            f"of nodes that add up to {world}, such as '2' or '3,1', but is {text!r}"
        )
    return tuple(sizes)


def has_cores_for(ranks: int) -> bool:
    """Whether so many ranks of this machine can run at the same time.

    Where a launcher has bound each rank to cores of its own, this process sees only those.
    """
    machine = os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return ranks <= machine
    allowed = len(os.sched_getaffinity(0))
    return ranks <= allowed or ranks * allowed <= machine


def store_secret() -> str | None:
    """The secret shared by the members of a `TCPStore`: MPICOLL_STORE_SECRET."""
    return os.environ.get("MPICOLL_STORE_SECRET")


def trace_folder() -> str | None:
    """The folder that every rank leaves its flight recorder in: MPICOLL_TRACE_DIR, if set."""
    return os.environ.get("MPICOLL_TRACE_DIR") or None


def seconds(timeout: object, default: float) -> float:
    """Return a timeout argument as seconds; None means `default`.

    Raises:
        InvalidCallError: not a `timedelta`, int or float, or not above zero and finite.
    """
    if timeout is None:
        return default
    if isinstance(timeout, timedelta):
        value = timeout.total_seconds()
    elif isinstance(timeout, (int, float)) and not isinstance(timeout, bool):
        value = float(timeout)
    else:
        raise InvalidCallError(
            f"timeout must be a timedelta or a number of seconds, but got {timeout!r}"
        )
    if not (0 < value < math.inf):
        raise InvalidCallError(f"timeout must be above 0 and finite, but got {timeout!r}")
    return value
