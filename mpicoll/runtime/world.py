"""One MPI world out of processes that no launcher of MPI started: of torchrun, of multiprocessing.

Rank 0 starts a process manager (`pmi.py`) and writes its address to the store that all share.  Each
rank connects to it, its link, and waits until all have; the manager names those that are missing.
Then the rank connects again, and leaves that connection to MPI, as MPICH's launcher would.  Over
the link the manager tells of ranks that ended early, on other machines too; a third connection, the
leash, is there to end this rank.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import signal
import sys
import time
from _thread import start_new_thread
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CollectiveTimeoutError, InvalidCallError, TransportError
from .settings import (
    Launcher,
    child_environment,
    machine,
    master_address,
    take_place,
    torchrun_attempt,
)

if TYPE_CHECKING:
    import socket
    import subprocess

KEY = "mpicoll/world"
_AGAIN = 0.05  # seconds between two tries to reach the manager
_START = 20.0  # seconds that the manager's process may take to start
_ANSWER = 2.0  # seconds past the deadline in which the manager says who is missing
_OP = "join_world"

lost: dict[int, str] = {}
"""Ranks of this world that ended early, and how, as the process manager tells."""

_links: list[socket.socket] = []  # to the manager of this process's world, if it has one
_managers: list[subprocess.Popen[str]] = []  # started by this process; each ends with its world


class Store(Protocol):
    """What a world needs of a store."""

    def set(self, key: str, value: str, /) -> object: ...

    def get(self, key: str, /) -> bytes: ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> object: ...


def join(store: Store, rank: int, size: int, seconds: float, starter: str) -> None:
    """Take a place in a world that all `size` processes with this store form.

    MPI must not be initialized; when it is, it finds the place in the environment.

    Args:
        starter: who started the processes, for messages.

    Raises:
        CollectiveTimeoutError: not all came in time; names those that are missing.
        InvalidCallError: the ranks don't fit together.
        TransportError: the manager can't be started or reached, or the store fails.
    """
    start = time.monotonic()
    deadline = start + seconds
    key = f"{KEY}/{torchrun_attempt()}"
    if rank == 0:
        store.set(key, json.dumps(_start_manager(size, seconds)))
    link, known, told = _meet(store, key, rank, size, deadline)
    if "missing" in told or "refused" in told:
        link.close()
        if "refused" in told:
            raise InvalidCallError(f"{_OP}: {told['refused']}")
        elapsed = time.monotonic() - start
        text = f"{_OP} timed out after {elapsed:.2f} s: ranks {told['missing']} of {size} did not"
        raise CollectiveTimeoutError(
            f"{text} come", op=_OP, elapsed=elapsed, missing=told["missing"], breaks_group=False
        )
    pmi, leash = (_more(known, rank, role) for role in ("pmi", "leash"))
    _put_on(leash)
    place = told["local_rank"], told["local_size"]
    take_place(starter, rank, size, pmi.detach(), place)
    # A child that lives longer must not keep it open: the manager would not hear of our end.
    os.register_at_fork(after_in_child=link.close)
    _links.append(link)
    start_new_thread(_listen, (link,))


def say_ready() -> None:
    """Tell the manager that MPI is initialized: until then a death is everybody's end."""
    for link in _links:
        with contextlib.suppress(OSError):  # it is gone: MPI will miss it
            _say(link, {"ready": True})


def join_torchrun(here: Launcher, seconds: float) -> None:
    """Take a place in the world of torchrun's processes, by the store that torchrun serves.

    It is torch's own, so torch is imported, which must be there where torchrun was.

    Raises:
        TransportError: it can't be reached.
    """
    try:
        distributed = importlib.import_module("torch.distributed")
        limit = timedelta(seconds=seconds)
        store, rank, size = next(distributed.rendezvous("env://", timeout=limit))
    except (ImportError, ValueError, RuntimeError) as error:
        raise TransportError(
            f"torchrun started {here.ranks} ranks, but the store in which they meet can't be used "
            f"({error}): give MASTER_ADDR and MASTER_PORT as torchrun does, and install torch; or "
            f"start the ranks with mpiexec -n {here.ranks}"
        ) from error
    join(store, rank, size, seconds, "torchrun")


# ---- rank 0: the manager ----


def _start_manager(size: int, seconds: float) -> dict[str, Any]:
    """Start a process manager; return how it is reached."""
    import subprocess

    secret = os.urandom(16).hex()
    file = Path(__file__).with_name("pmi.py")
    try:
        # In a session of its own: when a rank fails, torchrun ends rank 0's whole session, but
        # the ranks of other machines are still to be told.
        manager = subprocess.Popen(
            [sys.executable, "-I", str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(),
            start_new_session=True,
        )
    except OSError as error:
        raise TransportError(f"{_OP}: can't start {sys.executable!r}: {error}") from error
    _managers.append(manager)
    assert manager.stdin is not None and manager.stdout is not None
    with manager.stdin, manager.stdout, contextlib.suppress(OSError):
        manager.stdin.write(json.dumps({"size": size, "secret": secret, "seconds": seconds}) + "\n")
        manager.stdin.flush()
        port = manager.stdout.readline()
    if not port.strip().isdigit():
        raise TransportError(f"{_OP}: the process manager, {file}, ended with {manager.wait()}")
    return {
        "port": int(port),
        "secret": secret,
        "machine": machine(),
        "hosts": addresses(),
    }


def addresses() -> list[str]:
    """Return by what names other machines may reach this one, the likeliest first."""
    import socket  # takes 2 ms to load, and is needed by few

    found = [_address_towards(host) for host in (master_address(), "192.0.2.1")]  # RFC 5737: nobody
    found.append(socket.gethostname())
    return list(dict.fromkeys(x for x in found if x and not x.startswith("127.") and x != "::1"))


def _address_towards(host: str) -> str:
    """Return this machine's address on the way to another; "" if there is no way."""
    import socket

    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as sock:
                sock.connect(address)  # which sends nothing
                return str(sock.getsockname()[0])
    return ""


# ---- every rank: reach it ----


def _meet(
    store: Store, key: str, rank: int, size: int, deadline: float
) -> tuple[socket.socket, dict[str, Any], dict[str, Any]]:
    """Reach the manager and wait for its answer: the connection, how it is reached, the answer.

    What an earlier attempt has left in the store leads to nobody, or to a manager that is done.
    """
    why: Exception | None = None
    while True:
        known = _look_up(store, key, deadline, why)
        link = None
        try:
            link = _connect(known, deadline)
            left = max(0.0, deadline - time.monotonic())
            who = {"rank": rank, "size": size, "machine": machine(), "pid": os.getpid()}
            _say(link, {"secret": known["secret"], "as": "link", "seconds": left, **who})
            link.settimeout(left + _ANSWER)
            told = _hear(link)
            if told.get("refused") != "late":
                return link, known, told
            why = TransportError("its world has begun without this process")
        except OSError as error:
            why = error
        if link is not None:
            link.close()
        time.sleep(_AGAIN)


def _look_up(store: Store, key: str, deadline: float, why: Exception | None) -> dict[str, Any]:
    """Return how the manager is reached, as rank 0 has written it."""
    left = deadline - time.monotonic()
    try:
        if left <= 0:
            raise TimeoutError(f"rank 0's process manager can't be reached: {why}")
        store.wait([key], timedelta(seconds=left))
        found: dict[str, Any] = json.loads(store.get(key))
        return found
    except Exception as error:
        if time.monotonic() < deadline - 0.1:  # the store's own failure
            raise TransportError(f"{_OP}: the store failed: {error}") from error
        text = str(why or "rank 0 did not come")
        raise CollectiveTimeoutError(
            f"{_OP} timed out: {text}", op=_OP, missing=[0], breaks_group=False
        ) from error


def _connect(known: dict[str, Any], deadline: float) -> socket.socket:
    """Connect to the manager, by the first of its addresses that leads to it.

    Raises:
        OSError: none does.
    """
    import socket

    near = known["machine"] == machine()
    failed: OSError = OSError("it has no address")
    for host in ["127.0.0.1"] if near else known["hosts"]:
        try:
            left = max(0.1, deadline - time.monotonic())
            sock = socket.create_connection((host, known["port"]), min(left, _START))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
        except OSError as error:
            failed = error
    raise failed


def _more(known: dict[str, Any], rank: int, role: str) -> socket.socket:
    """Make one more connection, now that all ranks are there."""
    try:
        sock = _connect(known, time.monotonic() + _START)
        _say(sock, {"secret": known["secret"], "as": role, "rank": rank})
        sock.settimeout(None)
        return sock
    except OSError as error:
        raise TransportError(f"{_OP}: the process manager is gone: {error}") from error


def _put_on(leash: socket.socket) -> None:
    """Have the kernel end this process when the manager hangs up: in C nothing else can."""
    number = leash.detach()  # open to the end
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(number, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(number, fcntl.F_SETSIG, signal.SIGTERM)
        flags = fcntl.fcntl(number, fcntl.F_GETFL)
        fcntl.fcntl(number, fcntl.F_SETFL, flags | os.O_ASYNC)


def _say(sock: socket.socket, message: dict[str, Any]) -> None:
    sock.sendall(json.dumps(message).encode() + b"\n")


def _hear(sock: socket.socket) -> dict[str, Any]:
    """Receive one line.  No more is read: the next one may come much later, and is `_listen`'s."""
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            raise ConnectionError("the process manager hung up")
        line += byte
    heard: dict[str, Any] = json.loads(line)
    return heard


def _listen(link: socket.socket) -> None:
    """Hear which ranks end early, as long as this process and the manager are there.

    One that has called MPI_Abort hears of itself, and ends.
    """
    with contextlib.suppress(OSError, ValueError):
        link.settimeout(None)
        while True:
            told = _hear(link)
            if "code" in told:
                os._exit(told["code"] & 0xFF or 1)
            lost.setdefault(told["lost"], told["how"])
