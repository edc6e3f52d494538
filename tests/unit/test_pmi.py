"""The process manager, over real sockets: what MPICH says to it, and what it should not hear."""

from __future__ import annotations

import json
import select
import socket
import threading
import time

import pytest

from mpicoll.runtime import pmi
from mpicoll.runtime.pmi import Server, mapping, nodes, parse

SECRET = "0123"


class Rank:
    """One rank's connections, as `world.py` and MPI would have them."""

    def __init__(self, port, rank, size=2, *, machine="a", seconds=10.0, **more):
        self.port, self.rank = port, rank
        said = {"as": "link", "size": size, "machine": machine, "pid": 7, "seconds": seconds}
        self.link = self.connect(**{**said, **more})
        self.pmi = self.leash = None

    def connect(self, **said):
        sock = socket.create_connection(("127.0.0.1", self.port), 10)
        hello = json.dumps({"secret": SECRET, "rank": self.rank, **said})
        sock.sendall(f"{hello}\n".encode())
        return sock.makefile("rwb", buffering=0)

    def go_on(self, *, ready=True):
        self.pmi, self.leash = self.connect(**{"as": "pmi"}), self.connect(**{"as": "leash"})
        if ready:
            self.link.write(b'{"ready": true}\n')
            time.sleep(0.05)
        return self

    def told(self):
        return json.loads(self.link.readline())

    def say(self, line):
        self.pmi.write(f"{line}\n".encode())

    def ask(self, line):
        self.say(line)
        return self.pmi.readline().decode().strip()

    def die(self):
        for file in (self.link, self.pmi, self.leash):
            if file is not None:
                file.close()


@pytest.fixture
def serve():
    """Start a manager, whose thread must end by itself when all have left."""
    threads = []

    def start(size=2, seconds=10.0):
        server = Server(size, SECRET, seconds)
        threads.append(threading.Thread(target=server.serve, daemon=True))
        threads[-1].start()
        return server.port

    yield start
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive(), "it serves nobody"


@pytest.fixture
def pair(serve):
    """Two ranks that have come, on two machines."""
    port = serve()
    ranks = [Rank(port, rank, machine=f"m{rank}") for rank in (0, 1)]
    assert [rank.told() for rank in ranks] == [{"local_rank": 0, "local_size": 1}] * 2
    yield [rank.go_on() for rank in ranks]
    for rank in ranks:
        rank.die()


@pytest.mark.parametrize(
    "machines, text",
    [
        ("a", "(vector,(0,1,1))"),
        ("aaaa", "(vector,(0,1,4))"),
        ("aabb", "(vector,(0,2,2))"),
        ("aabbc", "(vector,(0,2,2),(2,1,1))"),
        ("abab", "(vector,(0,2,1),(0,2,1))"),
        ("abbb", "(vector,(0,1,1),(1,1,3))"),
        ("aba", "(vector,(0,2,1),(0,1,1))"),
    ],
)
def test_the_mapping_says_which_ranks_share_a_machine(machines, text):
    """Read as MPICH reads it: block by block, node by node, so many ranks on each."""
    assert mapping(list(machines)) == text
    blocks = [
        [int(x) for x in block.split(",")] for block in text[len("(vector,(") : -2].split("),(")
    ]
    read = [
        node for first, n, each in blocks for node in range(first, first + n) for _ in range(each)
    ]
    assert read == nodes(list(machines))


def test_a_value_may_hold_spaces_and_signs():
    said = parse("cmd=put kvsname=k key=a value=b=c d value=e")
    assert said == {"cmd": "put", "kvsname": "k", "key": "a", "value": "b=c d value=e"}
    with pytest.raises(ValueError, match="no command"):
        parse("key=a")


def test_the_whole_conversation_of_mpi_init_and_finalize(pair):
    one, two = pair
    for rank in pair:
        said = rank.ask("cmd=init pmi_version=1 pmi_subversion=1")
        assert said == "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0"
        assert rank.ask("cmd=get_maxes").startswith("cmd=maxes kvsname_max=256 keylen_max=64")
        assert rank.ask("cmd=get_appnum") == "cmd=appnum appnum=0 rc=0"
        assert rank.ask("cmd=get_universe_size") == "cmd=universe_size size=2 rc=0"
    name = one.ask("cmd=get_my_kvsname")
    assert name.startswith("cmd=my_kvsname kvsname=mpicoll-") and name == two.ask(
        "cmd=get_my_kvsname"
    )
    asked = "cmd=get kvsname=x key=PMI_process_mapping"
    assert two.ask(asked) == "cmd=get_result rc=0 msg=success value=(vector,(0,2,1))"
    assert two.ask("cmd=get kvsname=x key=card").startswith("cmd=get_result rc=-1 msg=key_not")
    assert one.ask("cmd=put kvsname=x key=card value=tcp 1=2") == "cmd=put_result rc=0 msg=success"
    one.say("cmd=barrier_in")
    assert two.ask("cmd=barrier_in") == "cmd=barrier_out rc=0"
    assert one.pmi.readline() == b"cmd=barrier_out rc=0\n"
    assert two.ask("cmd=get kvsname=x key=card").endswith("value=tcp 1=2")
    assert one.ask("cmd=finalize") == two.ask("cmd=finalize") == "cmd=finalize_ack rc=0"
    one.die()
    assert select.select([two.link, two.leash], [], [], 0.3)[0] == [], "nobody was lost"


@pytest.mark.parametrize(
    "line, answer",
    [
        ("cmd=publish_name service=a port=b", "cmd=publish_result rc=-1 msg=not_supported"),
        ("cmd=lookup_name service=a", "cmd=lookup_result rc=-1 msg=not_supported"),
        ("cmd=what", "cmd=what_result rc=-1 msg=not_supported"),
        ("cmd=put kvsname=x key= value=1", "cmd=put_result rc=-1 msg=too_long"),
        ("cmd=put kvsname=x key=a value=" + "1" * 2000, "cmd=put_result rc=-1 msg=too_long"),
        (
            "mcmd=spawn\nnprocs=1\nexecname=a\nendcmd",
            "cmd=spawn_result rc=-1 msg=torchrun_starts_no_more_ranks",
        ),
    ],
)
def test_what_is_refused(pair, line, answer):
    assert pair[0].ask(line) == answer
    assert pair[0].ask("cmd=get_appnum") == "cmd=appnum appnum=0 rc=0", "it goes on"


@pytest.mark.parametrize("line", ["", "key=a", "x" * (pmi.MAX_LINE * 3), "cmd=abort exitcode=x"])
def test_a_rank_that_speaks_no_pmi_is_lost(pair, line):
    one, two = pair
    one.say(line)
    assert two.told() == {"lost": 0, "how": "ended without MPI_Finalize (process 7)"}


def test_the_others_hear_of_a_death(pair):
    one, two = pair
    one.die()
    assert two.told() == {"lost": 0, "how": "ended without MPI_Finalize (process 7)"}


def test_who_waits_for_the_dead_in_mpi_is_hung_up_on(pair, capfd):
    """There it waits in C, with the GIL; MPI then ends the process."""
    one, two = pair
    two.say("cmd=barrier_in")
    time.sleep(0.1)
    one.die()
    assert two.pmi.readline() == b""
    assert "ranks [0] ended early; ranks [1], which wait" in capfd.readouterr().err


def test_a_death_in_mpi_init_ends_all(serve, capfd):
    """There others may wait for it in shared memory, of which the manager sees nothing."""
    port = serve()
    ranks = [Rank(port, rank) for rank in (0, 1)]
    for rank in ranks:
        rank.told()
        rank.go_on(ready=rank is ranks[1])
    start = time.monotonic()
    ranks[0].die()
    assert ranks[1].leash.read(1) == b"" and time.monotonic() - start < pmi.ABORTED + 1
    assert "rank 0 (process 7) ended" in capfd.readouterr().err
    ranks[1].die()


def test_abort_ends_all(pair):
    one, two = pair
    one.say("cmd=abort exitcode=9")
    assert two.told() == {"lost": 0, "how": "called MPI_Abort(9) (process 7)"}
    assert one.told() == {"lost": 0, "how": "", "code": 9}
    start = time.monotonic()
    assert one.leash.read(1) == two.leash.read(1) == b""
    assert time.monotonic() - start < pmi.ABORTED + 1


def test_a_death_ends_the_others_after_some_time(serve, monkeypatch):
    monkeypatch.setattr(pmi, "BEREAVED", 0.6)
    port = serve(3)
    ranks = [Rank(port, rank, 3) for rank in range(3)]
    for rank in ranks:
        rank.told()
        rank.go_on()
    assert ranks[2].ask("cmd=finalize") == "cmd=finalize_ack rc=0"
    start = time.monotonic()
    ranks[0].die()
    assert ranks[1].leash.read(1) == b"" and 0.5 < time.monotonic() - start < 2
    ranks[2].say("cmd=get_appnum")
    assert ranks[2].pmi.readline(), "one that has finalized MPI goes on"
    for rank in ranks:
        rank.die()


def test_an_mpi_init_that_never_returns_is_ended(serve, monkeypatch, capfd):
    monkeypatch.setattr(pmi, "BLOCKED", 0.2)
    port = serve()
    ranks = [Rank(port, rank, seconds=0.5) for rank in (0, 1)]
    for rank in ranks:
        rank.told()
        rank.go_on(ready=rank is ranks[0])
    start = time.monotonic()
    assert ranks[0].leash.read(1) == ranks[1].leash.read(1) == b""
    assert 0.2 < time.monotonic() - start < 2
    assert "ranks [1] never left MPI_Init" in capfd.readouterr().err
    for rank in ranks:
        rank.die()


def test_missing_ranks_are_named_at_the_earliest_deadline(serve):
    port = serve(4, 60.0)
    ranks = [Rank(port, 0, 4), Rank(port, 2, 4, seconds=0.3)]
    start = time.monotonic()
    assert [rank.told() for rank in ranks] == [{"missing": [1, 3]}] * 2
    assert 0.2 < time.monotonic() - start < 2
    late = Rank(port, 1, 4)
    assert late.told() == {"refused": "late"}
    for rank in (*ranks, late):
        rank.die()


def test_who_leaves_before_all_are_here_may_come_again(serve):
    port = serve()
    Rank(port, 1).die()
    time.sleep(0.2)
    ranks = [Rank(port, 1), Rank(port, 0)]
    assert [rank.told()["local_rank"] for rank in ranks] == [1, 0]
    for rank in ranks:
        rank.die()


@pytest.mark.parametrize(
    "rank, size, why",
    [
        (0, 2, "two processes say that they are rank 0: 7 and 7"),
        (1, 3, "rank 0 wants a world of 2 ranks, and rank 1 of 3"),
        (2, 2, "rank must be in range [0, 2), but got 2"),
        (-1, 2, "rank must be in range [0, 2), but got -1"),
    ],
)
def test_ranks_that_do_not_fit(serve, rank, size, why):
    port = serve(seconds=0.4)
    first, wrong = Rank(port, 0), Rank(port, rank, size)
    assert wrong.told() == {"refused": why}
    first.die()
    wrong.die()


@pytest.mark.parametrize(
    "line",
    [
        b"cmd=init pmi_version=1\n",
        b"[]\n",
        b'{"secret": "0124", "rank": 0}\n',
        b'{"secret": "0123"}\n',
        b'{"secret": "0123", "rank": 0, "as": "pmi"}\n',
        b"\xff\xfe\n",
    ],
)
def test_strangers_are_hung_up_on(serve, line):
    port = serve(seconds=0.2)
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(line)
        assert sock.recv(1) == b""


def test_who_says_nothing_is_hung_up_on(serve, monkeypatch):
    monkeypatch.setattr(pmi, "HANDSHAKE", 0.2)
    port = serve(seconds=0.6)
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        assert sock.recv(1) == b""
