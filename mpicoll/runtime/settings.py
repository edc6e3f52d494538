"""What the environment and the machine say: the only module that reads `os.environ`."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, cast

from ..errors import InvalidCallError

DEFAULT_TIMEOUT = 1800.0  # seconds, as in torch.distributed
NEVER = 9e9  # seconds, 285 years: what "no deadline" comes to, as a thread can't wait for longer
SLURM_INTERACTIVE = "4294967290"  # the step in which a shell of `salloc` may run

SETTINGS = (
    "MPICOLL_DEBUG",
    "MPICOLL_GRACE",
    "MPICOLL_NATIVE",
    "MPICOLL_NODES",
    "MPICOLL_RANK",
    "MPICOLL_SINGLE",
    "MPICOLL_STORE_SECRET",
    "MPICOLL_TIMEOUT",
    "MPICOLL_TRACE_DIR",
    "MPICOLL_WARN_AFTER",
    "MPICOLL_WARN_DROPPED",
    "MPICOLL_WORLD",
)
"""All variables that this module reads for mpicoll itself."""

# What launchers of MPI tell a rank, and torchrun.  Of Open MPI's settings, those of its run-time
# environment are one rank's own; how messages go, and over which memory, is for everyone.
_OF_MPI = (
    r"(PMIX?|PRTE|HYDRA)_|MPI_LOCAL|MPICOLL_(RANK|WORLD)$"
    r"|OMPI_(?!MCA_)|OMPI_MCA_(ess|orte|pmix|prte|plm|ras|rmaps|initial_wdir|mpi_ft)"
)
_OF_TORCHRUN = r"TORCHELASTIC_|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)$|MASTER_(ADDR|PORT)$"
_OF_A_RANK = re.compile(f"{_OF_MPI}|SLURM_|{_OF_TORCHRUN}")


def environment() -> dict[str, str]:
    """Return a copy of the environment, for those who look at all of it."""
    return dict(os.environ)


def child_environment() -> dict[str, str]:
    """Return the environment in which a rank starts a process that is no rank of its job.

    For `subprocess`, as ``env=``: whatever a rank starts inherits the launcher's variables, by
    which MPI would take it for the rank itself.  In this environment it is a world of one rank.
    """
    return {name: value for name, value in os.environ.items() if not _OF_A_RANK.match(name)}


_PLACE = ("PMI_FD", "PMI_PORT", "PMI_ID", "PMI_RANK", "PMIX_NAMESPACE", "PMIX_RANK")
_CLOSED = "PMI_FD=closed"


def _place() -> str:
    """Return by what MPI finds this process's place in a job; "" if it has none."""
    found = {name: os.environ[name] for name in _PLACE if name in os.environ}
    if "PMI_FD" in found:  # the number alone is the same in many jobs
        try:
            found["PMI_FD"] = os.readlink(f"/proc/self/fd/{found['PMI_FD']}")
        except OSError:
            return _CLOSED
    return " ".join(f"{name}={value}" for name, value in found.items())


def take_place(starter: str, rank: int, size: int, fd: int, local: tuple[int, int]) -> None:
    """Write down a place in a job as MPICH's launcher would, over one that was inherited.

    Args:
        starter: who started the ranks.
        fd: an open connection to a process manager.
        local: the rank's number on its node, and how many there are.
    """
    for name in [name for name in os.environ if re.match(_OF_MPI, name)]:
        del os.environ[name]
    names = ("PMI_FD", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    os.environ.update(zip(names, map(str, (fd, rank, size, *local)), strict=True))
    os.environ["MPICOLL_WORLD"] = starter


def tell_rank(rank: int, size: int, local: tuple[int, int], master: tuple[str, int]) -> None:
    """Set what torchrun sets for programs that read it, but for what is torchrun's own.

    Args:
        local: the rank's number on its node, and how many there are.
        master: host and port at which the program may meet.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, size, *local, *master)), strict=True))


def mark_rank() -> None:
    """Note in the environment, for the children, whose place they inherit."""
    place = _place()
    if place:
        os.environ["MPICOLL_RANK"] = f"{os.getpid()} {place}"


def inherited_from() -> int | None:
    """Return the pid of the rank whose place in a job this process has inherited, if it has."""
    pid, _, place = os.environ.get("MPICOLL_RANK", "").partition(" ")
    if place and _place() in (place, _CLOSED) and pid != str(os.getpid()):
        return int(pid)
    return None


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


def warn_after() -> float:
    """Seconds that a call waits until a line says for whom: MPICOLL_WARN_AFTER, else 60; 0: never.

    Then again each time that it has waited for twice as long.
    """
    return _at_least_0("MPICOLL_WARN_AFTER", os.environ.get("MPICOLL_WARN_AFTER", "60")) or math.inf


def warns_of_dropped() -> bool:
    """Whether to warn of a Work that is dropped unfinished: MPICOLL_WARN_DROPPED, else yes."""
    return _yes_or_no("MPICOLL_WARN_DROPPED", os.environ.get("MPICOLL_WARN_DROPPED", "1"))


def grace() -> float:
    """Seconds that a rank which failed gives peers that don't know of it: MPICOLL_GRACE, else 3."""
    return _at_least_0("MPICOLL_GRACE", os.environ.get("MPICOLL_GRACE", "3"))


def _at_least_0(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 <= value < math.inf):
        raise InvalidCallError(f"{name} must be a number of seconds, but is {text!r}")
    return value


def native_wanted() -> bool:
    """Whether compiled code is to be used where it is there: MPICOLL_NATIVE, else yes."""
    return _yes_or_no("MPICOLL_NATIVE", os.environ.get("MPICOLL_NATIVE", "1"))


def debugging() -> bool:
    """Whether tracebacks are to show the library's own frames: MPICOLL_DEBUG, else no."""
    return _yes_or_no("MPICOLL_DEBUG", os.environ.get("MPICOLL_DEBUG", "") or "0")


def _yes_or_no(name: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise InvalidCallError(f"{name} must be 0 or 1, but is {text!r}")
    return text == "1"


def survives_deaths() -> bool:
    """Whether the launcher has switched on MPI's fault tolerance (ULFM) for this job.

    Open MPI's `mpirun --with-ft ulfm` says so in the environment; without it MPI's calls for it
    exist, return, and do nothing.
    """
    said = os.environ.get("OMPI_MCA_mpi_ft_enable", "")  # noqa: SIM112  (Open MPI's spelling)
    return said.lower() in ("1", "true", "yes", "on")


class Launcher(NamedTuple):
    """What a launcher says of the ranks that it started.

    Attributes:
        serves: the MPI library whose ranks find one another under it; "" if none's do.
    """

    name: str
    serves: str
    rank: int
    ranks: int


def launchers(environ: Mapping[str, str]) -> tuple[Launcher, ...]:
    """Return what the launchers above a process say in its environment, the nearest first.

    There are two where a task of `srun` runs `mpiexec`.  Only a step that `srun` made for a program
    counts: SLURM_NTASKS and SLURM_PROCID are there in a batch job too, a shell in an interactive
    step is one task of whatever was allocated, and `mpiexec` starts its proxies, one per node, as a
    step.
    """

    def numbers(rank: str, ranks: str) -> tuple[int, int] | None:
        said = environ.get(rank, ""), environ.get(ranks, "")
        return (int(said[0]), int(said[1])) if said[0].isdigit() and said[1].isdigit() else None

    if environ.get("MPICOLL_WORLD") and (made := numbers("PMI_RANK", "PMI_SIZE")):
        return (Launcher(environ["MPICOLL_WORLD"], "MPICH", *made),)
    openmpi = numbers("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    pmi = numbers("PMI_RANK", "PMI_SIZE")  # of hydra, or of srun --mpi=pmi2
    step = numbers("SLURM_PROCID", "SLURM_STEP_NUM_TASKS") if _in_step(environ) else None
    by_srun = step is not None and "MPI_LOCALNRANKS" not in environ
    found = []
    if openmpi is not None:
        found.append(Launcher("mpiexec (Open MPI)", "Open MPI", *openmpi))
    if pmi is not None and not by_srun:
        found.append(Launcher("mpiexec (hydra)", "MPICH", *pmi))
    if step is not None:
        if pmi is not None and by_srun:
            found.append(Launcher("srun --mpi=pmi2", "MPICH", *step))
        elif "PMIX_NAMESPACE" in environ and openmpi is None:
            found.append(Launcher("srun --mpi=pmix", "Open MPI", *step))
        elif not (found and environ.get("SLURM_STEP_NUM_NODES") == str(step[1])):
            found.append(Launcher("srun without PMI", "", *step))
    torchrun = numbers("RANK", "WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in environ else None
    if torchrun is not None:
        found.append(Launcher("torchrun", "", *torchrun))
    return tuple(found)


def started_by_torchrun() -> Launcher | None:
    """Return what torchrun says of this process, if it is the nearest launcher.

    A task of `srun` may run torchrun, and a process of torchrun mpiexec: the nearest is the one
    whose mark the processes above this one lose first.
    """
    last = launchers(os.environ)[-1:]
    if not last or last[0].name != "torchrun" or os.environ.get("MPICOLL_WORLD"):
        return None
    if not any(name in os.environ for name in _PLACE):
        return last[0]
    pid = os.getppid()
    with contextlib.suppress(OSError, ValueError, IndexError):
        while pid > 1:
            above = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            names = {entry.partition(b"=")[0].decode(errors="replace") for entry in above}
            if "TORCHELASTIC_RUN_ID" not in names:
                return last[0]
            if names.isdisjoint(_PLACE):
                return None
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


def torchrun_attempt() -> str:
    """Return which start of its processes torchrun says that this is: it starts them again."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def master_address() -> str:
    """Return the host that torchrun, or the program, has named for all to meet at; "" if none."""
    return os.environ.get("MASTER_ADDR", "")


def machine() -> str:
    """Return a text that differs between machines, and between containers without shared memory."""
    marks = [os.uname().nodename]
    with contextlib.suppress(OSError):
        marks.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        marks.append(str(os.stat("/dev/shm").st_dev))
    return "/".join(marks)


def daemon(environ: Mapping[str, str]) -> str:
    """Return the name of the Open MPI daemon that started a process; "" if another did.

    All jobs of one daemon can reach one another: PMIX_NAMESPACE is its name and their number.
    """
    name, at, number = environ.get("PMIX_NAMESPACE", "").rpartition("@")
    return name if at and number.isdigit() and "OMPI_COMM_WORLD_RANK" in environ else ""


def local_rank(environ: Mapping[str, str]) -> int | None:
    """Return this process's number on its node, if its launcher says so."""
    names = ["MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK"]
    if _in_step(environ):
        names.append("SLURM_LOCALID")
    for name in names:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    return None


def _in_step(environ: Mapping[str, str]) -> bool:
    """Whether `srun` started a program; batch scripts and shells have variables of a task, too."""
    return "SLURM_STEP_NUM_TASKS" in environ and environ.get("SLURM_STEP_ID") != SLURM_INTERACTIVE


def single() -> bool:
    """Whether a rank that is alone is meant to be, whatever its launcher says: MPICOLL_SINGLE."""
    return _yes_or_no("MPICOLL_SINGLE", os.environ.get("MPICOLL_SINGLE", "") or "0")


def refusals(world: int) -> tuple[str, ...]:
    """Return what `new_group` would say, in a world so large, of variables that can't be so."""
    found = []
    reads = default_timeout, grace, warn_after, single, native_wanted, debugging, warns_of_dropped
    for read in (*reads, lambda: node_sizes(world)):
        try:
            read()
        except InvalidCallError as error:
            found.append(str(error))
    return tuple(found)


def ranks_on_node() -> int | None:
    """How many ranks the launcher says it started on this machine, if it says so."""
    for name in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    tasks = os.environ.get("SLURM_GTIDS", "") if _in_step(os.environ) else ""
    return len(tasks.split(",")) if tasks else None


def nccl_shares_gpus() -> bool:
    """Whether NCCL (2.30 and newer) was told that several ranks may share a GPU."""
    return os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "") == "1"


def order_nccl_launches() -> None:
    """Have NCCL (2.26 and newer) launch the calls of several communicators in their order.

    It asks that they be launched in one order on all ranks, and looks at this variable once, when
    it is first used.  Whoever has set it has decided otherwise.
    """
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")


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

    What is longer, infinity and `timedelta.max` among it, becomes `NEVER`.

    Raises:
        InvalidCallError: not a `timedelta` or a real number (NumPy's too), or not above zero.
    """
    if timeout is None:
        return default
    if isinstance(timeout, timedelta):
        value = timeout.total_seconds()
    elif isinstance(timeout, bool) or not isinstance(timeout, Real):
        raise InvalidCallError(
            f"timeout must be a timedelta or a number of seconds, but got {timeout!r}"
        )
    else:
        try:
            value = float(timeout)
        except OverflowError:  # an int beyond the floats
            value = math.inf if cast(Any, timeout) > 0 else -math.inf
    if not value > 0:
        raise InvalidCallError(f"timeout must be above 0, but got {timeout!r}")
    return min(value, NEVER)


def memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
