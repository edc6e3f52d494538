"""Key-value stores through which groups of processes find one another.

A store is a small shared dictionary: one process sets a key, another waits for it.  The
shape is that of PyTorch's c10d stores, so that theirs and ours can stand in for each other.
`FileStore` keeps the dictionary in a shared folder, `TCPStore` in one process that serves
it over sockets, `PrefixStore` is a corner of another store.  Values are bytes; a str is
stored as UTF-8.  Nothing is ever unpickled.

A connection to a `TCPStore` starts with a handshake of fixed size, `_shake_hands`.  Then the
client sends one request at a time and the server answers each.  Both are JSON after its
length (4 bytes, big-endian); bytes are written as ``{"b64": text}``::

    request            [method's name, [keys], [values], seconds it may take]
    answer             ["done", result] or ["late", why] or ["refused", why]
"""

from __future__ import annotations

import abc
import base64
import contextlib
import errno
import fcntl
import hashlib
import hmac
import ipaddress
import json
import math
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, overload, runtime_checkable

from .errors import (
    CollectiveTimeoutError,
    GroupClosedError,
    InvalidCallError,
    TransportError,
    Unique,
)
from .runtime import settings

MAX_KEY = 1024  # bytes of a key in UTF-8
MAX_VALUE = 16 << 20  # bytes of a value
MAX_FRAME = 64 << 20  # bytes of a request or an answer
MAX_CONNECTIONS = 4096  # served at once; further ones are turned away, and try again
HANDSHAKE_SECONDS = 3.0  # for a client to prove that it knows the secret

_TIMEOUT = 300.0  # seconds, as in torch
_LONGEST = 1e6  # seconds; a socket's timeout can't be much more
_GRACE = 0.1  # seconds a client gives the server's own "late" to arrive
_MAGIC = b"mpicoll1"


@runtime_checkable
class Store(Protocol):
    """What mpicoll needs of a store: any of c10d's will do, and any of ours."""

    def set(self, key: str, value: str, /) -> object: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, amount: int, /) -> int: ...

    @overload
    def wait(self, keys: list[str], /) -> object: ...

    @overload
    def wait(self, keys: list[str], timeout: timedelta, /) -> object: ...


def _seconds(timeout: object, default: float) -> float:
    return min(settings.seconds(timeout, default), _LONGEST)


def _checked_value(value: object, name: str = "value", limit: int = MAX_VALUE) -> bytes:
    if not isinstance(value, (str, bytes, bytearray, memoryview)):
        raise InvalidCallError(f"{name} must be str or bytes, but got {value!r}")
    try:
        raw = value.encode() if isinstance(value, str) else bytes(value)
    except UnicodeEncodeError as error:
        raise InvalidCallError(f"{name} must be encodable as UTF-8: {error}") from error
    if len(raw) > limit:
        raise InvalidCallError(f"{name} must be at most {limit} bytes long, but has {len(raw)}")
    return raw


def _checked_keys(keys: object) -> list[str]:
    if isinstance(keys, str) or not isinstance(keys, Sequence):
        raise InvalidCallError(f"keys must be a list of str, but got {keys!r}; write [key]")
    for key in keys:
        if not isinstance(key, str):
            raise InvalidCallError(f"a key must be a str, but got {key!r}")
        _checked_value(key, "a key", MAX_KEY)
    return list(keys)


class KeyValueStore(abc.ABC):
    """What `FileStore`, `TCPStore` and `PrefixStore` have in common: the calls.

    All calls may be made by several threads at once, and raise the same.  An error leaves the store
    usable.

    Raises:
        InvalidCallError: an argument is wrong.
        GroupClosedError: after `close`.
        TransportError: the folder or the connection failed; `code` is the errno.
        CollectiveTimeoutError: the deadline passed.  After this and a `TransportError`,
            whether a change was made is unknown.
    """

    _timeout: float
    _closed = False

    def set(self, key: str, value: str | bytes) -> None:
        """Store `value` under `key`, replacing what was there."""
        self._call("set", [key], _checked_value(value))

    def get(self, key: str) -> bytes:
        """Return the value of `key`; wait for it up to the store's timeout."""
        return bytes(self._call("get", [key]))

    def add(self, key: str, amount: int) -> int:
        """Add `amount` to the decimal number under `key`, 0 if there is none; return the sum."""
        if not isinstance(amount, int):
            raise InvalidCallError(f"amount must be an int, but got {amount!r}")
        return int(self._call("add", [key], amount))

    def wait(self, keys: Sequence[str], timeout: timedelta | float | None = None) -> None:
        """Wait until all `keys` are there, up to `timeout`, or else the store's own."""
        self._call("wait", keys, limit=None if timeout is None else _seconds(timeout, _TIMEOUT))

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all `keys` are there now."""
        return bool(self._call("check", keys))

    def delete_key(self, key: str) -> bool:
        """Remove `key`; return whether it was there."""
        return bool(self._call("delete_key", [key]))

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Store `desired` under `key` if it now holds `expected`; return what it then holds.

        As in c10d, a missing `key` is made if `expected` is empty; otherwise it stays
        missing and `expected` is returned.
        """
        old, new = _checked_value(expected, "expected"), _checked_value(desired, "desired")
        return bytes(self._call("compare_set", [key], old, new))

    def num_keys(self) -> int:
        """Return how many keys the store holds; a `PrefixStore` counts its whole store."""
        return int(self._call("num_keys", []))

    @property
    def timeout(self) -> timedelta:
        """How long a call may take where it is not told otherwise."""
        return timedelta(seconds=self._timeout)

    def set_timeout(self, timeout: timedelta | float) -> None:
        """Set how long a call of this object may take; the other users' is their own."""
        self._timeout = _seconds(timeout, self._timeout)

    def close(self) -> None:
        """Let go of what this object holds; calls after it raise.  May be called twice."""
        self._closed = True

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, op: str, keys: Any, *values: Any, limit: float | None = None) -> Any:
        """Do what `op` names, and translate what the system raises."""
        keys = _checked_keys(keys)
        if self._closed:
            raise GroupClosedError(f"{self!r} is closed; make a new one")
        start = time.monotonic()
        try:
            return self._do(op, keys, values, self._timeout if limit is None else limit)
        except CollectiveTimeoutError:  # a PrefixStore's, from beneath
            raise
        except OSError as error:
            elapsed = time.monotonic() - start
            what = f"store {op} of {keys[:8]} on {self!r}"
            if error.errno is not None:
                raise TransportError(f"{what} failed: {error}", code=error.errno) from error
            what += f" timed out after {elapsed:.2f} s: {error}"
            raise CollectiveTimeoutError(
                what, op=f"store {op}", elapsed=elapsed, breaks_group=False
            ) from error

    @abc.abstractmethod
    def _do(self, op: str, keys: list[str], values: Sequence[Any], limit: float) -> Any:
        """Raise a TimeoutError with the reason and without errno when `limit` has passed."""


class PrefixStore(KeyValueStore):
    """A corner of another store: key ``k`` is ``prefix/k`` there, as in c10d.

    Shares everything with `store`, its timeout included.  A prefix protects nothing.  `store`
    may be one of c10d's, whose own errors then pass through.  `close` leaves it open.
    """

    _timeout = math.inf  # the store beneath keeps its own

    def __init__(self, prefix: str, store: Store) -> None:
        if not isinstance(prefix, str):
            raise InvalidCallError(f"prefix must be a str, but got {prefix!r}")
        if not isinstance(store, Store):
            raise InvalidCallError(f"store must have set, get, add and wait, but got {store!r}")
        self._prefix = prefix
        self.underlying_store: Any = store

    def __repr__(self) -> str:
        return f"PrefixStore({self._prefix!r}, {self.underlying_store!r})"

    @property
    def timeout(self) -> timedelta:
        """The timeout of the store beneath."""
        value: timedelta = self.underlying_store.timeout
        return value

    def set_timeout(self, timeout: timedelta | float) -> None:
        """Set the timeout of the store beneath."""
        self.underlying_store.set_timeout(timedelta(seconds=_seconds(timeout, _TIMEOUT)))

    def _do(self, op: str, keys: list[str], values: Sequence[Any], limit: float) -> Any:
        full = [f"{self._prefix}/{key}" for key in keys]
        arguments = [full] if op in ("wait", "check") else [*full, *values]
        if op == "wait" and limit < math.inf:
            arguments.append(timedelta(seconds=limit))
        return getattr(self.underlying_store, op)(*arguments)


def _apply(op: str, keys: list[str], values: Sequence[Any], data: Any) -> Any:
    """Do a call that need not wait to `data`, a dict or a `_Folder` that we have to ourselves."""
    if op == "num_keys":
        return len(data)
    if op == "check":
        return all(data.get(key) is not None for key in keys)
    key, old = keys[0], data.get(keys[0])
    if op == "set":
        data[key] = values[0]
    elif op == "add":
        try:
            total = values[0] + (0 if old is None else int(old))
        except ValueError:
            raise InvalidCallError(f"{key!r} must hold a number for add, not {old!r:.40}") from None
        data[key] = str(total).encode()
        return total
    elif op == "delete_key":
        return data.pop(key, None) is not None
    elif op == "compare_set":
        expected, desired = values
        if old != expected and (old is not None or expected):
            return expected if old is None else old
        data[key] = desired
        return desired
    else:
        raise ValueError(f"unknown call {op!r}")


class _Folder:
    """A dict of bytes, in files named by the key's SHA-256.

    Before the value stands its own SHA-256: what a crash of the machine damaged is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, name: str, mode: str, flags: int) -> Any:
        return open(os.open(self.path / name, flags | os.O_NOFOLLOW, 0o600), mode)

    def _name(self, key: str) -> str:
        return "key-" + hashlib.sha256(key.encode()).hexdigest()

    def _load(self, name: str) -> bytes | None:
        try:
            with self.open(name, "rb", os.O_RDONLY) as file:
                digest, value = file.read(32), file.read()
        except FileNotFoundError:
            return None
        return value if hashlib.sha256(value).digest() == digest else None

    def get(self, key: str) -> bytes | None:
        return self._load(self._name(key))

    def __setitem__(self, key: str, value: bytes) -> None:
        with self.open("new", "wb", os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            file.write(hashlib.sha256(value).digest() + value)
        os.rename(self.path / "new", self.path / self._name(key))

    def pop(self, key: str, default: None) -> bytes | None:
        value = self.get(key)
        (self.path / self._name(key)).unlink(missing_ok=True)
        return value

    def __len__(self) -> int:
        return sum(self._load(file.name) is not None for file in self.path.glob("key-*"))


# Closing any descriptor of a file drops the process's POSIX locks on it, and these hold
# between processes only: so a mutex for each folder comes first, by pid because of forks.
_mutexes: dict[tuple[int, str], threading.Lock] = {}


class FileStore(KeyValueStore):
    """A store in a folder that all its users can reach, such as one on NFS or Lustre.

    Shared with every process of the same user that opens the same `path`, on any machine
    that mounts it.  The folder is made (mode 0700) if it is not there, its files are 0600;
    file permissions are all that protects it, so a folder that others can write to, or that
    belongs to another user, is refused.  There is no secret.

    A change is made under a POSIX lock on the file ``lock`` (it vanishes with its holder,
    however that dies) by writing ``new`` and renaming it.  Old keys stay: put a fresh nonce
    into the keys, or use a fresh folder for each run.

    Args:
        path: the folder; its parent must exist.
        timeout: seconds, or a `timedelta`, to wait for keys, and for the lock.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, timeout: timedelta | float = _TIMEOUT
    ) -> None:
        self._timeout = _seconds(timeout, _TIMEOUT)
        try:
            self.path = os.path.realpath(os.fsdecode(path))
            self._folder = _Folder(Path(self.path))
            self._folder.path.mkdir(0o700, exist_ok=True)
            status = os.stat(self.path)
        except (TypeError, OSError) as error:
            raise InvalidCallError(f"path must be a folder, but got {path!r}: {error}") from error
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise InvalidCallError(
                f"path must be a folder of your own that nobody else can write to, but {path!r} "
                f"has mode {status.st_mode & 0o777:o}; use a new one, or run: chmod go-w {path}"
            )

    def __repr__(self) -> str:
        return f"FileStore({self.path!r})"

    def _do(self, op: str, keys: list[str], values: Sequence[Any], limit: float) -> Any:
        start = time.monotonic()
        if op not in ("get", "wait"):
            with self._locked(start + limit):
                return _apply(op, keys, values, self._folder)
        while True:
            found = {key: self._folder.get(key) for key in keys}
            missing = [key for key in keys if found[key] is None]
            if not missing:
                return found[keys[0]] if op == "get" else None
            waited = time.monotonic() - start
            if waited >= limit:
                raise TimeoutError(f"nobody has set {missing[:8]}")
            if waited > 1:
                os.utime(self.path)  # else an NFS client may long remember that a file is missing
            time.sleep(min(0.001 + waited / 10, 0.5, limit - waited))

    @contextlib.contextmanager
    def _locked(self, deadline: float) -> Iterator[None]:
        mutex = _mutexes.setdefault((os.getpid(), self.path), threading.Lock())
        if not mutex.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError("another thread holds the lock")
        try:
            with self._folder.open("lock", "wb", os.O_WRONLY | os.O_CREAT) as file:
                while True:
                    try:
                        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except (BlockingIOError, PermissionError):  # POSIX allows both
                        if time.monotonic() > deadline:
                            raise TimeoutError("another process holds the lock") from None
                    time.sleep(0.001)
                yield
        finally:
            mutex.release()


# ---- sockets: what both sides do ----


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer")
    return min(left, _LONGEST)


def _receive(sock: socket.socket, nbytes: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        sock.settimeout(_left(deadline))
        part = sock.recv(min(nbytes - len(data), 1 << 20))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "the other side hung up")
        data += part
    return bytes(data)


def _shake_hands(sock: socket.socket, secret: bytes, us: bytes, deadline: float) -> None:
    """Prove that we know the secret, without sending it, and have the other side prove it.

    Both sides send `_MAGIC` and 32 random bytes, their nonce.  Then first the client, then
    the server sends HMAC-SHA256 (RFC 2104) under the secret of b"client" or b"server", the
    client's and the server's nonce; 32 zeros where the other's was wrong.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    ours = os.urandom(32)
    sock.sendall(_MAGIC + ours)
    hello = _receive(sock, len(_MAGIC) + 32, deadline)
    if not hello.startswith(_MAGIC):
        raise InvalidCallError(f"port must be a TCPStore's, but what listens says {hello[:16]!r}")
    theirs = hello[len(_MAGIC) :]
    nonces = ours + theirs if us == b"client" else theirs + ours
    for side in (b"client", b"server"):
        proof = hmac.digest(secret, side + nonces, "sha256")
        if side == us:
            sock.sendall(proof)
        elif not hmac.compare_digest(proof, _receive(sock, 32, deadline)):
            sock.sendall(bytes(32))
            raise InvalidCallError(
                "secret (or MPICOLL_STORE_SECRET) must be the same as the master's"
            )


def _send(sock: socket.socket, message: object, deadline: float) -> None:
    body = json.dumps(message, default=lambda raw: {"b64": base64.b64encode(raw).decode()})
    sock.settimeout(_left(deadline))
    sock.sendall(len(body).to_bytes(4, "big") + body.encode())


def _receive_message(sock: socket.socket, deadline: float) -> Any:
    nbytes = int.from_bytes(_receive(sock, 4, deadline), "big")
    if nbytes > MAX_FRAME:
        raise OSError(errno.EMSGSIZE, f"a message of {nbytes} bytes is above {MAX_FRAME}")
    body = _receive(sock, nbytes, deadline)
    return json.loads(body, object_hook=lambda entry: base64.b64decode(entry["b64"]))


class _Server:
    """The dictionary in memory; one thread accepts, and one serves each connection."""

    def __init__(self, address: tuple[str, int], secret: bytes) -> None:
        self.pid = os.getpid()
        self._secret = secret
        self._listener = socket.create_server(address, backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._data: dict[str, bytes] = {}
        self._connections: set[socket.socket] = set()
        self._closed = False
        self._news = threading.Condition()  # guards the three above
        threading.Thread(target=self._accept, name="mpicoll-store", daemon=True).start()

    def close(self) -> None:
        """Hang up on everybody, which ends all threads; a forked child's copy does nothing."""
        if self.pid != os.getpid():
            return
        with self._news:
            self._closed = True
            self._news.notify_all()
            for sock in (self._listener, *self._connections):
                with contextlib.suppress(OSError):  # the other side has left
                    sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that uses it
            self._listener.close()

    def do(self, op: str, keys: list[str], values: Sequence[Any], limit: float) -> Any:
        with self._news:
            if op not in ("get", "wait"):
                self._news.notify_all()
                return _apply(op, keys, values, self._data)
            self._news.wait_for(lambda: self._closed or self._data.keys() >= set(keys), limit)
            if self._closed:
                raise ConnectionAbortedError(errno.ECONNABORTED, "the master closed the store")
            missing = [key for key in keys if key not in self._data]
            if missing:
                raise TimeoutError(f"nobody has set {missing[:8]}")
            return self._data[keys[0]] if op == "get" else None

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
                with self._news:
                    if self._closed or len(self._connections) >= MAX_CONNECTIONS:
                        sock.close()
                    else:
                        threading.Thread(target=self._serve, args=[sock], daemon=True).start()
                        self._connections.add(sock)
            except (OSError, RuntimeError):  # closed; or out of descriptors or threads, for now
                time.sleep(0.01)

    def _serve(self, sock: socket.socket) -> None:
        try:
            _shake_hands(sock, self._secret, b"server", time.monotonic() + HANDSHAKE_SECONDS)
            while True:
                op, keys, values, seconds = _receive_message(sock, math.inf)
                if not 0 <= seconds <= _LONGEST:
                    raise ValueError(f"can't wait {seconds} seconds")
                try:
                    answer = ["done", self.do(op, _checked_keys(keys), values, seconds)]
                except TimeoutError as error:
                    answer = ["late", str(error)]
                except InvalidCallError as error:
                    answer = ["refused", str(error)]
                _send(sock, answer, math.inf)
        except Exception:
            return  # it left, or broke the wire format: that costs this connection only
        finally:
            with self._news:
                self._connections.discard(sock)
                sock.close()


class TCPStore(KeyValueStore, Unique):
    """A store served over TCP (IPv4) by one process, the master, from background threads.

    Shared with every process that can connect to ``host_name:port`` and knows the secret.
    Both sides prove that they know it before anything else is read, without sending it.
    So the secret decides who may connect; it does not hide or seal what is sent then.  One
    that could be guessed can be found by whoever sees a handshake: make it with
    ``secrets.token_hex(16)``.  On loopback a secret may be left out and is then empty: every
    user of this machine can connect.  Elsewhere it is required.

    The keys live as long as the master's object, until `close`.  Threads that call at the
    same time use a connection each.  A forked child connects anew, and never serves.

    Args:
        host_name: where the master listens, and the others connect.
        port: the master's port; 0 lets the master pick one (see the attribute `port`).
        world_size: number of `TCPStore` objects that will be made, the master's included.
        is_master: whether this process serves.
        timeout: seconds, or a `timedelta`, for connecting (tried again and again) and calls.
        wait_for_workers: whether the master waits here until the ``world_size - 1`` others
            have connected and set their keys ``mpicoll/worker...``; not without `world_size`.
        multi_tenant: must be False: masters can't share a port.
        secret: str or bytes; if None, the environment's MPICOLL_STORE_SECRET.

    Attributes:
        host: where the server is.
        port: where it listens there.
    """

    _instead = "make another TCPStore of the same address; it serves the same keys"

    def __init__(
        self,
        host_name: str,
        port: int,
        world_size: int | None = None,
        is_master: bool = False,
        timeout: timedelta | float = _TIMEOUT,
        wait_for_workers: bool = True,
        multi_tenant: bool = False,
        *,
        secret: str | bytes | None = None,
    ) -> None:
        self._timeout = _seconds(timeout, _TIMEOUT)
        if not isinstance(port, int) or not (0 if is_master else 1) <= port < 65536:
            raise InvalidCallError(f"port must be in range [1, 65536), but got {port!r}")
        if world_size is not None and (not isinstance(world_size, int) or world_size < 1):
            raise InvalidCallError(f"world_size must be above 0, or None, but got {world_size!r}")
        if multi_tenant:
            raise InvalidCallError("multi_tenant must be False; share one TCPStore object instead")
        try:
            self._ip = socket.gethostbyname(host_name)
        except (OSError, TypeError, UnicodeError) as error:
            raise InvalidCallError(f"host_name must be found, but got {host_name!r}") from error
        self.host, self.port = host_name, port
        self._secret = self._checked_secret(secret)
        self._idle: list[tuple[int, socket.socket]] = []  # with the pid of each
        self._server: _Server | None = None
        if is_master:
            try:
                self._server = _Server((self._ip, port), self._secret)
            except OSError as error:
                raise InvalidCallError(f"host_name and port must be free here: {error}") from error
            self.port = self._server.port
            weakref.finalize(self, self._server.close)
            if world_size is not None and wait_for_workers:
                self.wait([f"mpicoll/worker{i}" for i in range(1, world_size)])
        else:
            self.set(f"mpicoll/worker{self.add('mpicoll/workers', 1)}", "")

    def __repr__(self) -> str:
        return f"TCPStore({self.host!r}, {self.port}, is_master={self._server is not None})"

    def close(self) -> None:
        """Hang up; the master stops serving, and everybody's waiting calls then raise."""
        self._closed = True
        while self._idle:
            self._idle.pop()[1].close()
        if self._server is not None:
            self._server.close()

    def _checked_secret(self, secret: object) -> bytes:
        if secret is None:
            secret = settings.store_secret() or b""
        if not isinstance(secret, (str, bytes)):
            raise InvalidCallError(f"secret must be str or bytes, but got a {type(secret)}")
        if not secret and not ipaddress.ip_address(self._ip).is_loopback:
            raise InvalidCallError(
                f"secret must be given where host_name is not loopback, but it is {self.host!r}; "
                "pass secret=secrets.token_hex(16) to all, or set MPICOLL_STORE_SECRET for all"
            )
        return secret.encode("utf-8", "surrogateescape") if isinstance(secret, str) else secret

    def _do(self, op: str, keys: list[str], values: Sequence[Any], limit: float) -> Any:
        if self._server is not None and self._server.pid == os.getpid():
            return self._server.do(op, keys, values, limit)
        deadline = time.monotonic() + limit
        sock = self._connection(deadline)
        try:
            _send(sock, [op, keys, values, _left(deadline)], deadline)
            status, result = _receive_message(sock, deadline + _GRACE)
        except BaseException:
            sock.close()  # half a conversation is of no use to the next call
            raise
        self._idle.append((os.getpid(), sock))
        if status == "late":
            raise TimeoutError(result)
        if status == "refused":
            raise InvalidCallError(result)
        return result

    def _connection(self, deadline: float) -> socket.socket:
        """Return an idle connection of this process, or try until the deadline to make one."""
        with contextlib.suppress(IndexError):
            while True:
                pid, sock = self._idle.pop()
                if pid == os.getpid():
                    return sock
                sock.close()  # our copy; the parent's stays open
        pause = 0.01
        while True:
            try:
                sock = socket.create_connection((self._ip, self.port), _left(deadline))
                try:
                    if sock.getsockname() == sock.getpeername():  # TCP can meet itself so
                        raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens there")
                    _shake_hands(sock, self._secret, b"client", deadline)
                    return sock
                except BaseException:
                    sock.close()
                    raise
            except OSError as error:
                time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
                if time.monotonic() >= deadline:
                    why = f"can't connect ({error}); is the master running?"
                    raise TimeoutError(why) from error
            pause = min(2 * pause, 0.5)
