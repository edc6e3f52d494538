"""One contract for every store, over real folders, sockets, threads and processes."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mpicoll import stores
from mpicoll.errors import (
    CollectiveTimeoutError,
    GroupClosedError,
    InvalidCallError,
    TransportError,
)
from mpicoll.stores import FileStore, KeyValueStore, PrefixStore, Store, TCPStore

ROOT = Path(__file__).parents[2]
OPEN = """
import os, sys, time
from mpicoll.stores import FileStore, PrefixStore, TCPStore
def open_store(kind, where):
    if "file" in kind:
        store = FileStore(where, timeout=20)
    else:
        store = TCPStore("127.0.0.1", int(where), timeout=20)
    return PrefixStore("corner", store) if "prefix" in kind else store
"""
names: dict[str, Callable[[str, str], KeyValueStore]] = {}
exec(OPEN, names)


class Place:
    """Where a store is, so that threads and processes can open it again."""

    def __init__(self, kind: str, where: str) -> None:
        self.kind, self.where = kind, where

    def open(self) -> KeyValueStore:
        return names["open_store"](self.kind, self.where)

    def spawn(self, code: str) -> subprocess.Popen[str]:
        code = f"{OPEN}\nstore = open_store({self.kind!r}, {self.where!r})\n{code}"
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture(params=["file", "tcp", "prefix-tcp"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if "file" in request.param:
        yield Place(request.param, str(tmp_path / "store"))
    else:
        with TCPStore("127.0.0.1", 0, is_master=True) as master:
            yield Place(request.param, str(master.port))


@pytest.fixture
def store(place: Place) -> Iterator[KeyValueStore]:
    with place.open() as opened:
        yield opened


@pytest.fixture
def master() -> Iterator[TCPStore]:
    with TCPStore("localhost", 0, is_master=True, timeout=5, secret="s") as opened:
        yield opened


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def connect(master: TCPStore) -> socket.socket:
    return socket.create_connection((master.host, master.port), timeout=5)


def hung_up(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    sock.close()
    return True


# ---- the contract ----


@pytest.mark.parametrize(
    ("key", "value"),
    [("", "x"), ("a/../b\0c", ""), ("é" * 500, b"\x00\xff"), ("k", b"0" * (3 << 20))],
)
def test_set_get(store: KeyValueStore, place: Place, key: str, value: str | bytes) -> None:
    store.set(key, "old")
    store.set(key, value)
    with place.open() as other:
        assert other.get(key) == (value.encode() if isinstance(value, str) else value)


def test_add(store: KeyValueStore) -> None:
    assert not store.check(["n"])
    assert [store.add("n", 0), store.add("n", 3), store.add("n", -5)] == [0, 3, -2]
    assert store.get("n") == b"-2"
    store.set("n", "text")
    with pytest.raises(InvalidCallError, match=r"'(corner/)?n' must hold a number.*'text'"):
        store.add("n", 1)
    assert store.get("n") == b"text"


def test_check_delete_num_keys(store: KeyValueStore) -> None:
    before = store.num_keys()
    store.set("a", "1")
    store.set("b", "2")
    assert store.num_keys() == before + 2
    assert store.check(["a", "b"]) and store.check([]) and not store.check(["a", "c"])
    assert store.delete_key("a") is True
    assert store.delete_key("a") is False
    assert not store.check(["a"]) and store.num_keys() == before + 1


def test_compare_set_as_in_torch(store: KeyValueStore) -> None:
    assert store.compare_set("k", "no", "v0") == b"no" and not store.check(["k"])
    assert store.compare_set("k", "", "v1") == b"v1"
    assert store.compare_set("k", "no", "v2") == b"v1"
    assert store.compare_set("k", "", "v2") == b"v1"
    assert store.compare_set("k", "v1", b"v2") == b"v2" == store.get("k")


def test_wait_and_get_block_until_set(store: KeyValueStore, place: Place) -> None:
    """One object, two threads: a waiting get must not hold up the set it waits for."""
    got: list[bytes] = []

    def wait_then_get() -> None:
        store.wait(["a", "b"])
        got.append(store.get("c"))

    thread = threading.Thread(target=wait_then_get)
    thread.start()
    with place.open() as other:
        for key in ("b", "a"):
            time.sleep(0.02)
            other.set(key, "1")
    time.sleep(0.02)
    assert thread.is_alive()
    store.set("c", "here")
    thread.join(5)
    assert got == [b"here"]


def test_timeouts_are_kept_and_name_key_and_store(store: KeyValueStore) -> None:
    store.set("there", "1")
    store.set_timeout(0.15)
    assert store.timeout.total_seconds() == 0.15
    calls: list[tuple[str, float, Callable[[], object]]] = [
        ("get", 0.15, lambda: store.get("absent")),
        ("wait", 0.15, lambda: store.wait(["there", "absent"])),
        ("wait", 0.1, lambda: store.wait(["there", "absent"], 0.1)),
    ]
    for op, limit, call in calls:
        start = time.monotonic()
        match = r"Store\(.* nobody has set \['(corner/)?absent'\]"
        with pytest.raises(CollectiveTimeoutError, match=match) as caught:
            call()
        assert limit - 0.01 <= time.monotonic() - start < limit + 0.3
        assert caught.value.op == f"store {op}" and caught.value.elapsed >= limit - 0.01
    assert store.get("there") == b"1"  # still usable


def test_wrong_arguments(store: KeyValueStore) -> None:
    wrong: list[tuple[Callable[[Any], object], str]] = [
        (lambda s: s.set(3, "v"), "key must be a str, but got 3"),
        (lambda s: s.set("\ud800", "v"), "key must be encodable"),
        (lambda s: s.set("k", "\ud800"), "value must be encodable"),
        (lambda s: s.get("x" * 1025), "key must be at most 1024 bytes"),
        (lambda s: s.set("k", 3), "value must be str or bytes, but got 3"),
        (lambda s: s.set("k", bytes((16 << 20) + 1)), "value must be at most 16777216"),
        (lambda s: s.add("k", 1.5), "amount must be an int, but got 1.5"),
        (lambda s: s.wait("key"), r"keys must be a list of str, but got 'key'; write \[key\]"),
        (lambda s: s.check(["a", 3]), "key must be a str, but got 3"),
        (lambda s: s.wait(["k"], 0), "timeout must be above 0"),
        (lambda s: s.set_timeout("5"), "timeout must be a timedelta"),
        (lambda s: s.compare_set("k", None, "v"), "expected must be str or bytes"),
    ]
    for call, match in wrong:
        with pytest.raises(InvalidCallError, match=match):
            call(store)
    assert not store.check(["k"])


def test_closed(place: Place) -> None:
    store = place.open()
    store.close()
    store.close()
    with pytest.raises(GroupClosedError, match="closed"):
        store.get("k")


def test_changes_are_atomic_across_processes_and_threads(
    place: Place, store: KeyValueStore
) -> None:
    code = """
store.wait(["go"])
print(store.compare_set("leader", "", str(os.getpid())).decode() == str(os.getpid()))
for _ in range(50):
    store.add("n", 1)
"""
    processes = [place.spawn(code) for _ in range(2)]
    store.set("go", "")
    threads = [
        threading.Thread(target=lambda: [store.add("n", 1) for _ in range(50)]) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [process.communicate(timeout=20)[0] for process in processes]
    assert sorted(said) == ["False\n", "True\n"]
    assert store.add("n", 0) == 5 * 50


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("of_master", [False, True])
def test_forked_child_has_its_own_connection(
    store: KeyValueStore, master: TCPStore, of_master: bool
) -> None:
    used = master if of_master else store
    used.set("who", "parent")
    child = os.fork()
    if child == 0:
        try:
            ok = all(used.add("n", 1) and used.get("who") == b"parent" for _ in range(50))
            used.close()
            os._exit(0 if ok else 1)
        finally:
            os._exit(2)
    assert all(used.add("n", 1) and used.get("who") == b"parent" for _ in range(50))
    assert os.waitpid(child, 0)[1] == 0
    assert used.add("n", 0) == 100


# ---- PrefixStore ----


def test_prefixes_keep_apart_and_nest(tmp_path: Path) -> None:
    under = FileStore(tmp_path / "s")
    a, b = PrefixStore("a", under), PrefixStore("b", under)
    a.set("k", "1")
    b.set("k", "2")
    PrefixStore("c", a).set("k", "3")
    assert [under.get(key) for key in ("a/k", "b/k", "a/c/k")] == [b"1", b"2", b"3"]
    a.close()
    assert under.num_keys() == b.num_keys() == 3
    with pytest.raises(InvalidCallError, match="store must have set"):
        PrefixStore("p", "folder")  # type: ignore[arg-type]


def test_torch_stores_fit(tmp_path: Path) -> None:
    dist = pytest.importorskip("torch.distributed")
    theirs = dist.FileStore(str(tmp_path / "file"), 1)
    assert isinstance(theirs, Store)
    store = PrefixStore("p", theirs)
    store.set("k", b"\xff")
    store.wait(["k"], 5)
    assert store.get("k") == b"\xff" and store.check(["k"]) and store.add("n", 2) == 2
    assert theirs.get("p/k") == b"\xff" and store.compare_set("c", "", "x") == b"x"


# ---- FileStore ----


def test_files_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    mask = os.umask(0)
    try:
        FileStore(folder).set("k", "v")
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    folder.chmod(0o770)
    with pytest.raises(InvalidCallError, match="chmod go-w"):
        FileStore(folder)
    (tmp_path / "file").touch()
    for path in ("file", "no/such"):
        with pytest.raises(InvalidCallError, match="path must be a folder"):
            FileStore(tmp_path / path)


def test_killed_holder_of_the_lock_blocks_nobody(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "s", timeout=0.3)
    holder = Place("file", store.path).spawn(
        "with store._locked(time.monotonic()): print('held', flush=True); time.sleep(60)"
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    start = time.monotonic()
    with pytest.raises(CollectiveTimeoutError, match=r"'k'.*another process holds the lock"):
        store.set("k", "v")
    assert 0.29 < time.monotonic() - start < 0.6
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    store.set("k", "v")
    assert store.get("k") == b"v"


def test_stale_contents(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "s")
    store.set("old", "kept")
    store.set("torn", "value")
    (torn,) = (f for f in Path(store.path).iterdir() if f.read_bytes().endswith(b"value"))
    torn.write_bytes(torn.read_bytes()[:-1])
    (tmp_path / "s" / "new").write_bytes(b"half" * 100)
    again = FileStore(tmp_path / "s")
    assert again.get("old") == b"kept" and not again.check(["torn"]) and again.num_keys() == 1
    again.set("torn", "v")
    assert store.get("torn") == b"v"


# ---- TCPStore ----


def test_secrets(master: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    for wrong in ("t", "", b"\xff"):
        with pytest.raises(
            InvalidCallError, match="secret .or MPICOLL_STORE_SECRET. must be the same"
        ):
            TCPStore(master.host, master.port, secret=wrong)
    assert time.monotonic() - start < 1  # refused at once, not at the timeout
    monkeypatch.setenv("MPICOLL_STORE_SECRET", "s")
    with TCPStore(master.host, master.port) as client:
        client.set("k", "v")
    assert master.get("k") == b"v" and "secret" not in repr(master)
    monkeypatch.delenv("MPICOLL_STORE_SECRET")
    for host in ("0.0.0.0", "192.0.2.1"):
        with pytest.raises(InvalidCallError, match="secret must be given.*token_hex"):
            TCPStore(host, 0, is_master=True)


@pytest.mark.parametrize(
    ("says", "match"),
    [
        (b"mpicoll1" + bytes(64), "must be the same as the master's"),  # does not know the secret
        (b"220 mail.example.org ESMTP ready, and more\r\n", "port must be a TCPStore's"),
    ],
)
def test_impostors_are_refused(says: bytes, match: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as fake:

        def impostor() -> None:
            sock, _ = fake.accept()
            sock.sendall(says)
            hung_up(sock)

        threading.Thread(target=impostor, daemon=True).start()
        with pytest.raises(InvalidCallError, match=match):
            TCPStore("127.0.0.1", fake.getsockname()[1], secret="s", timeout=5)


def test_garbage_costs_only_its_sender(master: TCPStore) -> None:
    master.set("k", "v")
    for junk in (b"GET / HTTP/1.1\r\n" + bytes(100), os.urandom(72), b"\xff" * 100_000):
        sock = connect(master)
        try:
            sock.sendall(junk)
        except ConnectionError:
            pass
        assert hung_up(sock)
    messages = [b"\x80\x04.", b"{}", b"[]", b"[" * 100_000, b'["set", ["k"], [{"b65": ""}], 1]']
    messages += [b'["set", ["k"], [], 1]', b'["close", [], [], 1]', b'["get", ["x"], [], NaN]']
    messages += [b'["set", [], [], 1]', json.dumps(["add", ["n"], ["1"], 1]).encode()]
    frames = [struct.pack("!I", len(message)) + message for message in messages]
    for frame in [*frames, b"\xff\xff\xff\xff", struct.pack("!I", stores.MAX_FRAME + 1)]:
        sock = connect(master)
        stores._shake_hands(sock, b"s", b"client", time.monotonic() + 5)
        sock.sendall(frame)
        assert hung_up(sock)
    assert master.get("k") == b"v" and master.num_keys() == 1


def test_silent_clients_are_dropped_and_do_not_keep_others_out(
    master: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "HANDSHAKE_SECONDS", 0.3)
    monkeypatch.setattr(stores, "MAX_CONNECTIONS", 4)
    silent = [connect(master) for _ in range(6)]
    silent[0].send(b"x")  # nor does one byte buy more time
    start = time.monotonic()
    with TCPStore(master.host, master.port, secret="s", timeout=5) as client:
        client.set("k", "v")
    assert all(hung_up(sock) for sock in silent)
    assert time.monotonic() - start < 2 and master.get("k") == b"v"


def test_connecting_waits_for_the_master_and_keeps_its_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidCallError, match="Address already in use"):
            TCPStore("127.0.0.1", port, is_master=True)
        start = time.monotonic()
        with pytest.raises(CollectiveTimeoutError, match="is the master running"):
            TCPStore("127.0.0.1", port, timeout=0.3)  # it accepts, and says nothing
        assert 0.25 < time.monotonic() - start < 0.6
    with pytest.raises(CollectiveTimeoutError, match="refused"):
        TCPStore("127.0.0.1", port, timeout=0.3)
    masters: list[TCPStore] = []
    late = threading.Timer(0.2, lambda: masters.append(TCPStore("127.0.0.1", port, is_master=True)))
    late.start()
    with TCPStore("127.0.0.1", port, timeout=5) as client:
        client.set("k", "v")
    late.join()
    masters[0].close()


def test_master_waits_for_workers() -> None:
    with pytest.raises(CollectiveTimeoutError, match="nobody has set .'mpicoll/worker1', "):
        TCPStore("127.0.0.1", 0, 3, True, timeout=0.2)
    TCPStore("127.0.0.1", 0, 3, True, timeout=0.2, wait_for_workers=False).close()
    port = free_port()
    workers: list[TCPStore] = []
    threads = [
        threading.Thread(target=lambda: workers.append(TCPStore("127.0.0.1", port, timeout=20)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    with TCPStore("127.0.0.1", port, 3, True, timeout=20) as master:
        assert master.check(["mpicoll/worker1", "mpicoll/worker2"])
        for thread in threads:
            thread.join()
    for worker in workers:
        worker.close()


def test_the_masters_end_is_noticed_at_once_and_frees_the_port(master: TCPStore) -> None:
    client = TCPStore(master.host, master.port, secret="s")
    threading.Timer(0.1, master.close).start()
    start = time.monotonic()
    with pytest.raises(TransportError, match="hung up") as caught:
        client.get("absent")
    assert time.monotonic() - start < 1 and caught.value.code != 0
    client.close()
    dropped = TCPStore("127.0.0.1", master.port, is_master=True)
    del dropped
    TCPStore("127.0.0.1", master.port, is_master=True).close()


def test_stopped_master_does_not_hold_up_the_timeout() -> None:
    port = free_port()
    code = f"{OPEN}\nm = TCPStore('127.0.0.1', {port}, is_master=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        with TCPStore("127.0.0.1", port, timeout=20) as client:
            client.set_timeout(0.2)
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)  # until it has stopped
            for call in (lambda: client.set("k", "v"), lambda: client.get("k")):
                start = time.monotonic()
                with pytest.raises(CollectiveTimeoutError, match="'k'"):
                    call()
                assert 0.19 < time.monotonic() - start < 0.5
    finally:
        process.kill()
        process.wait()


def test_wrong_tcp_arguments() -> None:
    wrong: list[tuple[tuple[object, ...], str]] = [
        (("no such host", 1), "host_name must be found"),
        (("127.0.0.1", 65536), r"port must be in range \[1, 65536\), but got 65536"),
        (("127.0.0.1", 0), "port must be in range"),
        (("127.0.0.1", 0, 0, True), "world_size must be"),
        (("127.0.0.1", 0, None, True, 0), "timeout must be above 0"),
        (("127.0.0.1", 0, None, True, 1, True, True), "multi_tenant must be False"),
    ]
    for arguments, match in wrong:
        with pytest.raises(InvalidCallError, match=match):
            TCPStore(*arguments)  # type: ignore[arg-type]


def test_a_tcp_store_is_neither_copied_nor_pickled() -> None:
    """A copy would hang up, and end the service, with whichever is dropped first."""
    with TCPStore("127.0.0.1", 0, is_master=True) as store:
        for again in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="make another TCPStore"):
                again(store)
