"""One contract for every store, over real folders, sockets, threads and processes."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpicoll import stores
from mpicoll.errors import (
    CollectiveTimeoutError,
    GroupClosedError,
    InvalidCallError,
    TransportError,
    UnsupportedError,
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
store = open_store(sys.argv[1], sys.argv[2])
"""
names: dict[str, Callable[[str, str], KeyValueStore]] = {}
exec(OPEN.rpartition("store = ")[0], names)


class Place:
    """Where a store is, so that threads and processes can open it again."""

    def __init__(self, kind: str, where: str) -> None:
        self.kind, self.where = kind, where

    def open(self) -> KeyValueStore:
        return names["open_store"](self.kind, self.where)

    def spawn(self, code: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", OPEN + code, self.kind, self.where]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture(params=["file", "tcp", "prefix-file", "prefix-tcp"])
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


def connect(master: TCPStore) -> socket.socket:
    return socket.create_connection((master.host, master.port), timeout=5)


def greeted(master: TCPStore) -> socket.socket:
    """A raw connection that has passed the handshake, written from the wire format."""
    import hashlib
    import hmac

    sock = connect(master)
    hello = sock.recv(40, socket.MSG_WAITALL)
    assert hello[:8] == b"mpicoll1"
    ours = os.urandom(32)
    proof = hmac.new(b"s", b"client" + hello[8:] + ours, hashlib.sha256).digest()
    sock.sendall(ours + proof)
    expected = hmac.new(b"s", b"server" + hello[8:] + ours, hashlib.sha256).digest()
    assert sock.recv(33, socket.MSG_WAITALL) == b"\0" + expected
    return sock


def hung_up(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    sock.close()
    return True


# --- the contract ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("", "x"),
        ("k", ""),
        ("a/../b\0c", "\u00e9"),
        ("\u00e9" * 500, b"\x00\xff"),
        ("k", b"0" * (3 << 20)),
    ],
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
    store.set("n", "7")
    assert store.add("n", 1) == 8
    store.set("t", "text")
    with pytest.raises(InvalidCallError, match=r"'(corner/)?t' must hold a whole number.*'text'"):
        store.add("t", 1)
    assert store.get("t") == b"text"
    store.set("big", str(2**63 - 1))
    with pytest.raises(InvalidCallError, match="64 bits"):
        store.add("big", 1)


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


def test_timeouts_are_kept_and_name_the_key(store: KeyValueStore) -> None:
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
        with pytest.raises(CollectiveTimeoutError, match=r"'(corner/)?absent'") as caught:
            call()
        assert limit - 0.01 <= time.monotonic() - start < limit + 0.2
        assert caught.value.op == f"store {op}" and caught.value.elapsed >= limit - 0.01
        assert "there'" not in str(caught.value) and "Store(" in str(caught.value)
    assert store.get("there") == b"1"  # still usable


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: s.set(3, "v"), "key must be a str, but got 3"),
        (lambda s: s.set("\ud800", "v"), "key must be encodable"),
        (lambda s: s.set("k", "\ud800"), "value must be encodable"),
        (lambda s: s.get("x" * 1025), "key must be at most 1024 bytes"),
        (lambda s: s.set("k", 3), "value must be str or bytes, but got 3"),
        (lambda s: s.set("k", bytes((16 << 20) + 1)), "value must be at most 16777216"),
        (lambda s: s.add("k", 1.5), "amount must be an int, but got 1.5"),
        (lambda s: s.add("k", 2**63), "amount must fit 64 bits"),
        (lambda s: s.wait("key"), r"keys must be a list of str, but got 'key'; write \[key\]"),
        (lambda s: s.check(["a", 3]), r"keys\[1\] must be a str"),
        (lambda s: s.wait(["k"], 0), "timeout must be above 0"),
        (lambda s: s.set_timeout("5"), "timeout must be a timedelta"),
        (lambda s: s.compare_set("k", None, "v"), "expected must be str or bytes"),
    ],
)
def test_wrong_arguments(
    store: KeyValueStore, call: Callable[[KeyValueStore], object], match: str
) -> None:
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
me = str(os.getpid())
store.wait(["go"])
print(store.compare_set("leader", "", me).decode() == me)
for _ in range(200):
    store.add("n", 1)
"""
    processes = [place.spawn(code) for _ in range(4)]
    store.set("go", "")

    def count() -> None:
        for _ in range(50):
            store.add("n", 1)

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [process.communicate(timeout=20)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(said) == ["False\n"] * 3 + ["True\n"]
    assert store.add("n", 0) == 4 * 200 + 3 * 50


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_has_its_own_connection(store: KeyValueStore) -> None:
    store.set("who", "parent")
    child = os.fork()
    if child == 0:
        try:
            ok = all(store.add("n", 1) and store.get("who") == b"parent" for _ in range(50))
            store.close()
            os._exit(0 if ok else 1)
        finally:
            os._exit(2)
    assert all(store.add("n", 1) and store.get("who") == b"parent" for _ in range(50))
    assert os.waitpid(child, 0)[1] == 0
    assert store.add("n", 0) == 100


# --- PrefixStore -----------------------------------------------------------------------


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


def test_a_store_with_the_least_calls_will_do(tmp_path: Path) -> None:
    class Least:
        def __init__(self) -> None:
            under = FileStore(tmp_path / "s")
            self.set, self.get, self.add, self.wait = under.set, under.get, under.add, under.wait

    store = PrefixStore("p", Least())
    store.set("k", "v")
    store.wait(["k"], 1)
    assert store.get("k") == b"v" and store.add("n", 2) == 2
    with pytest.raises(UnsupportedError, match="num_keys needs a store that has it"):
        store.num_keys()


def test_torch_stores_fit(tmp_path: Path) -> None:
    dist = pytest.importorskip("torch.distributed")
    theirs = dist.FileStore(str(tmp_path / "file"), 1)
    assert isinstance(theirs, Store)
    store = PrefixStore("p", theirs)
    store.set("k", b"\xff")
    store.wait(["k"], 5)
    assert store.get("k") == b"\xff" and store.check(["k"]) and store.add("n", 2) == 2
    assert theirs.get("p/k") == b"\xff" and store.compare_set("c", "", "x") == b"x"


# --- FileStore -------------------------------------------------------------------------


def test_files_are_private(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    mask = os.umask(0)
    try:
        store = FileStore(folder, 2)
        store.set("k", "v")
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    folder.chmod(0o770)
    with pytest.raises(InvalidCallError, match="chmod go-w"):
        FileStore(folder)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, match in (("file", "is a file"), ("no/such", "must be a folder")):
        with pytest.raises(InvalidCallError, match=match):
            FileStore(tmp_path / path)


def test_killed_holder_of_the_lock_blocks_nobody(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "s", timeout=0.3)
    place = Place("file", store.path)
    holder = place.spawn("with store._locked('x'): print('held', flush=True); time.sleep(60)")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    start = time.monotonic()
    with pytest.raises(CollectiveTimeoutError, match="another process holds the lock"):
        store.set("k", "v")
    assert 0.29 < time.monotonic() - start < 0.5
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


def test_last_user_removes_the_folder(tmp_path: Path) -> None:
    first = FileStore(tmp_path / "s", 2)
    first.set("k", "v")
    first.close()
    second = FileStore(tmp_path / "s", 2)
    assert second.get("k") == b"v"
    second.close()
    assert not (tmp_path / "s").exists()


# --- TCPStore --------------------------------------------------------------------------


def test_secrets(master: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    for wrong in ("t", "", b"\xff"):
        with pytest.raises(InvalidCallError, match="secret must be the master's") as caught:
            TCPStore(master.host, master.port, secret=wrong)
        assert "MPICOLL_STORE_SECRET" in str(caught.value)
    assert time.monotonic() - start < 1  # refused at once, not at the timeout
    monkeypatch.setenv("MPICOLL_STORE_SECRET", "s")
    with TCPStore(master.host, master.port) as client:
        client.set("k", "v")
    assert master.get("k") == b"v"
    assert "secret" not in repr(master)


def test_elsewhere_a_secret_is_required() -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::"):
        with pytest.raises(InvalidCallError, match="secret must be given.*token_hex"):
            TCPStore(host, 0, is_master=True)


def test_a_server_that_does_not_know_the_secret_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as fake:

        def impostor() -> None:
            sock, _ = fake.accept()
            with sock:
                sock.sendall(b"mpicoll1" + bytes(32))
                sock.recv(64, socket.MSG_WAITALL)
                sock.sendall(bytes(33))

        threading.Thread(target=impostor, daemon=True).start()
        with pytest.raises(InvalidCallError, match="does not know it"):
            TCPStore("127.0.0.1", fake.getsockname()[1], secret="s", timeout=5)


def test_garbage_costs_only_its_sender(master: TCPStore) -> None:
    for junk in (b"GET / HTTP/1.1\r\n" + bytes(100), os.urandom(64), b"\xff" * 100_000):
        sock = connect(master)
        try:
            sock.sendall(junk)
        except ConnectionError:
            pass
        assert hung_up(sock)
        master.set("k", "v")

    def field(data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + data

    nan = struct.pack("!d", float("nan"))
    payloads = [
        b"\x63",  # an unknown request
        b"\x01" + field(b"k"),  # set without a value
        b"\x01" + field(b"k" * 1025) + field(b"v"),  # a key too long
        b"\x01" + field(b"k") + b"\xff\xff\xff\xff",  # a field longer than the frame
        b"\x01\x00",  # a field without a length
        b"\x02" + field(nan) + field(b"absent"),
        b"\x03" + field(b"n") + field(b"1"),
        b"\x04",
    ]
    frames = [field(payload) for payload in payloads]
    frames += [b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", struct.pack("!I", stores.MAX_FRAME + 1)]
    wait = b"\x02" + field(struct.pack("!d", 60.0)) + field(b"absent")
    frames.append(field(wait) + field(wait))  # a request while another is waiting
    for frame in frames:
        sock = greeted(master)
        sock.sendall(frame)
        assert hung_up(sock)
    sock = greeted(master)
    sock.sendall(struct.pack("!I", stores.MAX_FRAME + 1) + bytes(100_000))
    assert hung_up(sock)
    assert master.get("k") == b"v" and master.num_keys() == 1


def test_silent_clients_are_dropped_and_do_not_keep_others_out(
    master: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "HANDSHAKE_SECONDS", 0.3)
    monkeypatch.setattr(stores, "MAX_STRANGERS", 4)
    silent = [connect(master) for _ in range(6)]
    silent[0].send(b"x")  # nor does one byte buy more time
    start = time.monotonic()
    with TCPStore(master.host, master.port, secret="s", timeout=5) as client:
        client.set("k", "v")
    assert time.monotonic() - start < 2
    assert all(hung_up(sock) for sock in silent)
    assert time.monotonic() - start < 2
    assert master.get("k") == b"v"


def test_connecting_waits_for_the_master_and_keeps_its_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidCallError, match="port is in use"):
            TCPStore("127.0.0.1", port, is_master=True)
        start = time.monotonic()
        with pytest.raises(CollectiveTimeoutError, match="is the master running"):
            TCPStore("127.0.0.1", port, timeout=0.3)  # it accepts, and says nothing
        assert 0.29 < time.monotonic() - start < 0.5
    start = time.monotonic()
    with pytest.raises(CollectiveTimeoutError, match="refused") as caught:
        TCPStore("127.0.0.1", port, timeout=0.3)
    assert 0.29 < time.monotonic() - start < 0.5 and caught.value.op == "store connect"
    masters: list[TCPStore] = []
    late = threading.Timer(0.2, lambda: masters.append(TCPStore("127.0.0.1", port, is_master=True)))
    late.start()
    with TCPStore("127.0.0.1", port, timeout=5) as client:
        client.set("k", "v")
    late.join()
    masters[0].close()


def test_something_else_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def smtp() -> None:
            sock, _ = other.accept()
            with sock:
                sock.sendall(b"220 mail.example.org ESMTP ready, and more\r\n")

        threading.Thread(target=smtp, daemon=True).start()
        with pytest.raises(TransportError, match="what listens at .* says"):
            TCPStore("127.0.0.1", other.getsockname()[1], timeout=5)


def test_master_waits_for_workers() -> None:
    start = time.monotonic()
    with pytest.raises(CollectiveTimeoutError, match="only 0 of 2 workers"):
        TCPStore("127.0.0.1", 0, 3, True, timeout=0.3)
    assert 0.29 < time.monotonic() - start < 0.5
    TCPStore("127.0.0.1", 0, 3, True, timeout=0.3, wait_for_workers=False).close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    workers = [Place("tcp", str(port)).spawn("store.wait(['bye'])") for _ in range(2)]
    with TCPStore("127.0.0.1", port, 3, True, timeout=20) as master:
        master.set("bye", "")
        assert [worker.wait(20) for worker in workers] == [0, 0]
        for worker in workers:
            worker.communicate()


def test_tenants_share_a_server() -> None:
    first = TCPStore("127.0.0.1", 0, is_master=True, multi_tenant=True)
    second = TCPStore("127.0.0.1", first.port, is_master=True, multi_tenant=True)
    first.set("k", "v")
    with pytest.raises(InvalidCallError, match="same for all tenants"):
        TCPStore("127.0.0.1", first.port, is_master=True, multi_tenant=True, secret="x")
    first.close()
    assert second.get("k") == b"v"
    second.close()
    TCPStore("127.0.0.1", second.port, is_master=True).close()  # the port is free again


def test_the_masters_end_is_noticed_at_once(master: TCPStore) -> None:
    client = TCPStore(master.host, master.port, secret="s")
    threading.Timer(0.1, master.close).start()
    start = time.monotonic()
    with pytest.raises(TransportError, match="the master has closed the store") as caught:
        client.get("absent")
    assert time.monotonic() - start < 1 and caught.value.code != 0
    client.close()


def test_a_dropped_master_frees_its_port() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True)
    port, server = store.port, store._server
    del store
    assert server is not None
    server._thread.join(5)
    TCPStore("127.0.0.1", port, is_master=True).close()


def test_stopped_master_does_not_hold_up_the_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = f"m = TCPStore('127.0.0.1', {port}, is_master=True); time.sleep(60)"
    command = [sys.executable, "-c", OPEN.rpartition("store = ")[0] + code]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        with TCPStore("127.0.0.1", port, timeout=20) as client:
            client.set_timeout(0.3)
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)  # until it has stopped
            for call in (lambda: client.set("k", "v"), lambda: client.get("k")):
                start = time.monotonic()
                with pytest.raises(CollectiveTimeoutError):
                    call()
                assert 0.29 < time.monotonic() - start < 0.5
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("", 1), "host_name must be a host's name"),
        (("127.0.0.1", 65536), r"port must be in range \[0, 65536\), but got 65536"),
        (("127.0.0.1", 0), "port must be the master's"),
        (("127.0.0.1", 0, 0, True), "world_size must be"),
        (("127.0.0.1", 0, None, True, 0), "timeout must be above 0"),
    ],
)
def test_wrong_tcp_arguments(arguments: tuple[object, ...], match: str) -> None:
    with pytest.raises(InvalidCallError, match=match):
        TCPStore(*arguments)  # type: ignore[arg-type]
