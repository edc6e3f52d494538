"""A process manager of PMI-1: what processes need of a launcher to form one MPI world.

Processes that torchrun or multiprocessing started have no launcher of MPI's.  `world.py` starts
this file as a program of its own (it imports nothing of the package), as MPI_Init holds the GIL: a
thread of rank 0 could not serve rank 0 itself.  It ends when the last rank has hung up.

A rank has three connections, each of which begins with a line of JSON.  On the first, its link:

    {"secret", "rank", "as": "link", "size", "machine", "pid", "seconds"}   "I wait so long"
    {"local_rank", "local_size"}                              the answer: all are here
    {"missing"} or {"refused"}                                or there will be no world
    {"ready"}                                                 its MPI_Init has returned
    {"lost", "how"}                                           later: that rank has ended early

On the second, as "pmi", PMI-1 as MPICH's library speaks it: a line "cmd=NAME key=value ...", and a
line in answer; Flux's RFC 13 tells it whole.  On the third, as "leash", nothing: its end ends the
rank, which has its kernel see to that, as in MPI_Finalize it holds the GIL, too.  As MPICH's
launcher does, the manager ends all ranks when one has called MPI_Abort, or died in MPI_Init, where
others may wait for it in shared memory; and when one has died later, but then the others have some
time, to hear of it and raise.  It also ends an MPI_Init that never returns.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import json
import math
import resource
import secrets
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ABORTED = 0.3  # seconds until MPI_Abort ends the other ranks: words come first
BLOCKED = 2.0  # seconds past the deadline that MPI_Init may take, as other calls inside MPI
BEREAVED = 30.0  # seconds until a death does, as torchrun gives its own processes
TICK = 0.2  # seconds between looks at the clock, while there is something to end
HANDSHAKE = 5.0  # seconds for a connection to prove that it is one of ours
MAX_LINE = 1 << 16  # bytes
KVSNAME_MAX, KEY_MAX, VALUE_MAX = 256, 64, 1024  # as MPICH's own launcher says
MAPPING = "PMI_process_mapping"
OK, FAILED = "rc=0", "rc=-1"


def nodes(machines: Sequence[str]) -> list[int]:
    """Number the machine of each rank, in the order in which they come."""
    number: dict[str, int] = {}
    return [number.setdefault(machine, len(number)) for machine in machines]


def mapping(machines: Sequence[str]) -> str:
    """Say which ranks share a machine: blocks of (first node, nodes, ranks on each).

    >>> mapping(["a", "a", "b", "b", "c"])
    '(vector,(0,2,2),(2,1,1))'
    """
    blocks: list[list[int]] = []
    for node, ranks in itertools.groupby(nodes(machines)):
        n = len(list(ranks))
        if blocks and blocks[-1][2] == n and sum(blocks[-1][:2]) == node:
            blocks[-1][1] += 1
        else:
            blocks.append([node, 1, n])
    return "(vector," + ",".join("({},{},{})".format(*block) for block in blocks) + ")"


def parse(line: str) -> dict[str, str]:
    """Take a line of PMI-1 apart.  A value may hold spaces, and comes last.

    Raises:
        ValueError: it names no command.
    """
    head, _, value = line.partition(" value=")
    fields = dict(token.split("=", 1) for token in head.split() if "=" in token)
    if "cmd" not in fields:
        raise ValueError(f"no command in {line!r}")
    return fields | {"value": value}


@dataclass
class Member:
    """A rank that has come: its link, and what it said."""

    link: Connection
    machine: str
    pid: int


class Connection:
    """One socket: of nobody yet, or one of the three of a rank."""

    def __init__(self, sock: socket.socket, now: float) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.since = now
        self.rank = -1  # of nobody, until it has proved that it is one of ours
        self.role = ""
        self.in_spawn = False  # between the lines of a spawn
        self.buffer = b""

    def send(self, line: str) -> None:
        """Send a line.  A rank waits for each answer, so one that doesn't fit is not read."""
        data = line.encode() + b"\n"
        with contextlib.suppress(OSError):  # its end shows when it is read
            if self.sock.send(data) < len(data):
                self.end()

    def end(self) -> None:
        """Hang up; the connection is closed when that is read."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class Manager:
    """What is known of the ranks, and what they are told.  It neither waits nor reads.

    Args:
        size: how many ranks there will be.
        secret: what they must know.
        deadline: when the wait for them is over, at the latest.
    """

    def __init__(self, size: int, secret: str, deadline: float) -> None:
        self.size = size
        self.deadline = deadline
        self.members: dict[int, Member] = {}
        self.complete = False
        self.failed = False
        self._secret = secret
        self._name = f"mpicoll-{secrets.token_hex(8)}"  # MPICH names its shared memory after it
        self._values: dict[str, str] = {}
        self._leashes: dict[int, Connection] = {}
        self._ends_at = math.inf
        self._in_barrier: dict[int, Connection] = {}
        self._ready: set[int] = set()
        self._finalized: set[int] = set()
        self._lost: set[int] = set()

    # ---- until all are here ----

    def greet(self, link: Connection, line: str, now: float) -> None:
        """Take the first line of a connection.

        Raises:
            ValueError: it is none of ours.
        """
        said: dict[str, Any] = json.loads(line)
        if not isinstance(said, dict) or not hmac.compare_digest(
            str(said.get("secret", "")).encode(), self._secret.encode()
        ):
            raise ValueError("the secret is wrong")
        rank = int(said["rank"])
        if said["as"] != "link":
            if rank not in self.members:
                raise ValueError(f"rank {rank} has not come")
            link.rank, link.role = rank, said["as"]
            if link.role == "leash":
                self._leashes[rank] = link
            return
        why = self._refusal(rank, said)
        if why:
            link.send(json.dumps({"refused": why}))
            return
        link.rank, link.role = rank, "link"
        self.members[rank] = Member(link, str(said["machine"]), int(said["pid"]))
        self.deadline = min(self.deadline, now + float(said["seconds"]))
        if len(self.members) == self.size:
            self._begin()

    def _refusal(self, rank: int, said: dict[str, Any]) -> str:
        if self.complete or self.failed:
            return "late"
        if said["size"] != self.size:
            return f"rank 0 wants a world of {self.size} ranks, and rank {rank} of {said['size']}"
        if not 0 <= rank < self.size:
            return f"rank must be in range [0, {self.size}), but got {rank}"
        if rank in self.members:
            pids = f"{self.members[rank].pid} and {said['pid']}"
            return f"two processes say that they are rank {rank}: {pids}"
        return ""

    def _begin(self) -> None:
        self.complete = True
        machines = [self.members[rank].machine for rank in range(self.size)]
        text = mapping(machines)
        if len(text) <= VALUE_MAX:  # else MPI finds out by itself, from the names of the hosts
            self._values[MAPPING] = text
        seen: dict[str, int] = dict.fromkeys(machines, 0)
        for rank, machine in enumerate(machines):
            place = {"local_rank": seen[machine], "local_size": machines.count(machine)}
            seen[machine] += 1
            self.members[rank].link.send(json.dumps(place))

    def look_at_clock(self, now: float) -> None:
        """Do what it is time for: end ranks, or tell those that have come who is missing."""
        stuck = sorted(self.members.keys() - self._ready) if self.complete else []
        if stuck and now >= self.deadline + BLOCKED and self._ends_at == math.inf:
            print(f"mpicoll: ranks {stuck} never left MPI_Init; ending the job", file=sys.stderr)
            self._ends_at = now
        if now >= self._ends_at:
            for rank in self._leashes.keys() - self._finalized:
                self._leashes[rank].end()
        if now < self.deadline or self.complete or self.failed:
            return
        self.failed = True
        missing = [rank for rank in range(self.size) if rank not in self.members]
        for member in self.members.values():
            member.link.send(json.dumps({"missing": missing}))

    def ready(self, link: Connection) -> None:
        """Note that a rank's MPI_Init has returned."""
        self._ready.add(link.rank)

    @property
    def waits(self) -> bool:
        """Whether there is something that it may soon be time for."""
        early = len(self._ready) < self.size and not self.failed
        return early or self._ends_at < math.inf

    # ---- PMI ----

    def answer(self, link: Connection, line: str, now: float) -> None:
        """Do what a line of PMI-1 asks for."""
        if link.in_spawn or line.startswith("mcmd="):
            link.in_spawn = line != "endcmd"
            if not link.in_spawn:
                link.send(f"cmd=spawn_result {FAILED} msg=torchrun_starts_no_more_ranks")
            return
        said = parse(line)
        command = said["cmd"]
        if command == "barrier_in":
            self._in_barrier[link.rank] = link
            self._end_barrier()
        elif command == "finalize":
            self._finalized.add(link.rank)
            link.send(f"cmd=finalize_ack {OK}")
        elif command == "abort":
            code = int(said.get("exitcode", "1"))
            self._ends_at = min(self._ends_at, now + ABORTED)
            self._lose(link.rank, f"called MPI_Abort({code})", now)
            own = self.members[link.rank].link  # MPICH waits there to be ended, or goes on
            own.send(json.dumps({"lost": link.rank, "how": "", "code": code}))
        else:
            link.send(self._reply(command, said))

    def _reply(self, command: str, said: dict[str, str]) -> str:
        key, value = said.get("key", ""), said["value"]
        if command == "init":
            return f"cmd=response_to_init pmi_version=1 pmi_subversion=1 {OK}"
        if command == "get_maxes":
            return (
                f"cmd=maxes kvsname_max={KVSNAME_MAX} keylen_max={KEY_MAX} vallen_max={VALUE_MAX} "
                f"{OK}"
            )
        if command == "get_appnum":
            return f"cmd=appnum appnum=0 {OK}"
        if command == "get_universe_size":
            return f"cmd=universe_size size={self.size} {OK}"
        if command == "get_my_kvsname":
            return f"cmd=my_kvsname kvsname={self._name} {OK}"
        if command == "put":
            if not key or len(key) > KEY_MAX or len(value) > VALUE_MAX:
                return f"cmd=put_result {FAILED} msg=too_long"
            self._values[key] = value
            return f"cmd=put_result {OK} msg=success"
        if command == "get":
            if key not in self._values:
                return f"cmd=get_result {FAILED} msg=key_not_found value=unknown"
            return f"cmd=get_result {OK} msg=success value={self._values[key]}"
        name = {"publish_name": "publish", "unpublish_name": "unpublish", "lookup_name": "lookup"}
        return f"cmd={name.get(command, command)}_result {FAILED} msg=not_supported"

    def _end_barrier(self) -> None:
        """Let the ranks out of a barrier if all are in; hang up on them if one never will be.

        In MPI_Init a rank waits there in C, and hears of nothing else.
        """
        missing = sorted(self._lost - self._in_barrier.keys())
        if len(self._in_barrier) == self.size:
            for link in self._in_barrier.values():
                link.send(f"cmd=barrier_out {OK}")
        elif self._in_barrier and missing:
            words = f"ranks {missing} ended early; ranks {sorted(self._in_barrier)}, which wait for"
            print(f"mpicoll: {words} them inside MPI, end, too", file=sys.stderr)
            for link in self._in_barrier.values():
                link.end()
        else:
            return
        self._in_barrier.clear()

    # ---- the ends ----

    def hang_up(self, link: Connection, now: float) -> None:
        """Note that a connection has ended."""
        if link.rank < 0:
            return
        if not self.complete:
            member = self.members.get(link.rank)
            if not self.failed and member is not None and member.link is link:
                del self.members[link.rank]
        elif link.rank not in self._finalized:
            self._lose(link.rank, "ended without MPI_Finalize", now)

    def _lose(self, rank: int, how: str, now: float) -> None:
        if rank in self._lost:
            return
        self._lost.add(rank)
        early = len(self._ready) < self.size
        self._ends_at = min(self._ends_at, now + (ABORTED if early else BEREAVED))
        gone = self.members[rank]
        if early:
            words = f"rank {rank} (process {gone.pid}) {how}, while ranks were in MPI_Init"
            print(f"mpicoll: {words}; ending the job", file=sys.stderr)
        for other, member in self.members.items():
            if other not in self._lost:
                how_there = f"{how} (process {gone.pid})"
                member.link.send(json.dumps({"lost": rank, "how": how_there}))
        self._end_barrier()


class Server:
    """The manager's sockets: one thread reads them all."""

    def __init__(self, size: int, secret: str, seconds: float) -> None:
        self._manager = Manager(size, secret, time.monotonic() + seconds)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(
            ("", 0), family=family, backlog=1024, dualstack_ipv6=both
        )
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._links: set[Connection] = set()

    def serve(self) -> None:
        """Serve until the last rank has hung up, or nobody has come in time."""
        strangers = False
        while self._links or not (self._manager.complete or self._manager.failed):
            tick = TICK if strangers or self._manager.waits else None
            for key, _ in self._selector.select(tick):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            self._manager.look_at_clock(now)
            for link in list(self._links):
                if link.rank < 0 and now > link.since + HANDSHAKE:
                    self._close(link)
            strangers = any(link.rank < 0 for link in self._links)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it has left again, or no descriptor is left
            link = Connection(self._listener.accept()[0], time.monotonic())
            link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._links.add(link)
            self._selector.register(link.sock, selectors.EVENT_READ, link)

    def _read(self, link: Connection) -> None:
        try:
            data = link.sock.recv(MAX_LINE)
            *lines, link.buffer = (link.buffer + data).split(b"\n")
            if not data or len(link.buffer) > MAX_LINE:
                raise ConnectionError
            for line in lines:
                self._take(link, line.decode())
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, TypeError):  # it left, or is none of ours
            self._close(link)

    def _take(self, link: Connection, line: str) -> None:
        if link.rank < 0:
            self._manager.greet(link, line, time.monotonic())
        elif link.role == "pmi":
            self._manager.answer(link, line, time.monotonic())
        elif link.role == "link":
            self._manager.ready(link)

    def _close(self, link: Connection) -> None:
        self._links.discard(link)
        self._selector.unregister(link.sock)
        link.sock.close()
        self._manager.hang_up(link, time.monotonic())


def main() -> None:
    """Read what is wanted from standard input, and write the port to standard output."""
    wanted = json.loads(sys.stdin.readline())
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two connections for each rank
    server = Server(wanted["size"], wanted["secret"], min(wanted["seconds"], math.inf))
    print(server.port, flush=True)
    sys.stdout.close()
    server.serve()


if __name__ == "__main__":
    main()
