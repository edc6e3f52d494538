"""Key-value stores through which groups of processes find one another.

A store is a small shared dictionary: one process sets a key, another waits for it.  The
shape is that of PyTorch's c10d stores, so that theirs and ours can stand in for each other.
`FileStore` keeps the dictionary in a shared folder, `TCPStore` in one process that serves
it over sockets, `PrefixStore` is a corner of another store.  Values are bytes; a str is
stored as UTF-8.  Nothing is ever unpickled.

The wire format of `TCPStore`.  Numbers are big-endian.  The server speaks first; until step
3 has succeeded it reads nothing but the 64 bytes of step 2, and these within
`HANDSHAKE_SECONDS`::

    1. server -> client   b"mpicoll1", server nonce (32 random bytes)
    2. client -> server   client nonce (32), HMAC(secret, b"client" + server nonce + client nonce)
    3. server -> client   0, HMAC(secret, b"server" + server nonce + client nonce)
                          or 1 and 32 zeros where the secret is wrong; then it hangs up

HMAC is HMAC-SHA256 (RFC 2104).  Then the client sends one request at a time and the server
answers each.  Both are frames of one shape, at most `MAX_FRAME` bytes after the first four::

    length of the rest (u32), code (u8), fields, each: length (u32), bytes

    request         code   fields                       fields of the answer
    SET              1     key, value
    GET              2     seconds (f64), key           value
    ADD              3     key, amount (i64)            new value (i64)
    WAIT             4     seconds (f64), keys ...
    CHECK            5     keys ...                     b"1" or b"0"
    DELETE           6     key                          b"1" or b"0"
    COMPARE_SET      7     key, expected, desired       value
    NUM_KEYS         8                                  count (i64)
    JOIN             9                                  (counted by wait_for_workers)

    answer's code    0 done; 1 timed out, fields = the missing keys; 2 refused, field = why

The server hangs up on whoever sends anything else.  GET and WAIT are answered when the keys
are there or the seconds have passed; in between, a client that sends is hung up on.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import fcntl
import hashlib
import heapq
import hmac
import ipaddress
import operator
import os
import random
import secrets
import selectors
import socket
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn, Protocol, TypeVar, cast, runtime_checkable

from . import config
from .errors import (
    CollectiveTimeoutError,
    GroupClosedError,
    InvalidCallError,
    TransportError,
    UnsupportedError,
)

MAX_KEY = 1024  # bytes of a key in UTF-8, prefixes included
MAX_VALUE = 16 << 20  # bytes of a value
MAX_FRAME = 2 * MAX_VALUE + (1 << 20)  # a compare_set carries two values
MAX_CONNECTIONS = 4096  # served at once; further ones wait in the listen queue
MAX_STRANGERS = 128  # of these, not yet through the handshake
HANDSHAKE_SECONDS = 3.0  # for a stranger to prove that it knows the secret

_TIMEOUT = timedelta(seconds=300)  # torch's default
_FOREVER = 1e6  # seconds; more than a socket's or a lock's timeout can hold is cut to this
_GRACE = 0.1  # seconds a client gives the server's own "timed out" to arrive

_Self = TypeVar("_Self", bound="KeyValueStore")


@runtime_checkable
class Store(Protocol):
    """What mpicoll needs of a store: any of c10d's will do, and any of ours."""

    def set(self, key: str, value: str, /) -> object:
        """Store `value` under `key`."""

    def get(self, key: str, /) -> bytes:
        """Wait for `key` and return its value."""

    def add(self, key: str, amount: int, /) -> int:
        """Add `amount` to the number under `key`, 0 if there is none; return the sum."""

    def wait(self, keys: list[str], timeout: timedelta = ..., /) -> object:
        """Wait until all `keys` are there."""


def _seconds(timeout: object, default: float) -> float:
    return min(config.seconds(timeout, default), _FOREVER)


def _checked_key(key: object, name: str = "key") -> str:
    if not isinstance(key, str):
        raise InvalidCallError(f"{name} must be a str, but got {key!r}")
    try:
        nbytes = len(key.encode())
    except UnicodeEncodeError as error:
        raise InvalidCallError(f"{name} must be encodable as UTF-8, but got {key!r}") from error
    if nbytes > MAX_KEY:
        raise InvalidCallError(
            f"{name} must be at most {MAX_KEY} bytes long, prefixes included, but "
            f"{key[:32]!r}... has {nbytes}; shorten it, or use a digest of it"
        )
    return key


def _checked_keys(keys: object) -> list[str]:
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Sequence):
        raise InvalidCallError(f"keys must be a list of str, but got {keys!r}; write [key]")
    return [_checked_key(key, f"keys[{i}]") for i, key in enumerate(keys)]


def _checked_value(value: object, name: str = "value") -> bytes:
    if isinstance(value, str):
        try:
            raw = value.encode()
        except UnicodeEncodeError as error:
            raise InvalidCallError(
                f"{name} must be encodable as UTF-8, but got {value[:32]!r}; pass bytes"
            ) from error
    elif isinstance(value, (bytes, bytearray, memoryview)):
        raw = bytes(value)
    else:
        raise InvalidCallError(
            f"{name} must be str or bytes, but got {value!r}; write str({name}) or encode it"
        )
    if len(raw) > MAX_VALUE:
        raise InvalidCallError(
            f"{name} must be at most {MAX_VALUE} bytes long, but has {len(raw)}; "
            "a store is for addresses, not for data: send that through a group"
        )
    return raw


def _in_int64(number: int) -> bool:
    return -(1 << 63) <= number < 1 << 63


def _sum(key: str, old: bytes | None, amount: int) -> int:
    """What `add` makes of the `old` value; numbers are kept as decimal text, as in c10d."""
    try:
        number = 0 if old is None else int(old if len(old) <= 32 else b"too long")
    except ValueError as error:
        raise InvalidCallError(
            f"key {key!r} must hold a whole number for add, but holds {cast(bytes, old)[:32]!r}; "
            "delete_key it, or count under another key"
        ) from error
    total = number + amount
    if not _in_int64(total):
        raise InvalidCallError(
            f"amount must keep key {key!r} within 64 bits, but {number} + {amount} does not fit"
        )
    return total


def _exchanged(old: bytes | None, expected: bytes, desired: bytes) -> tuple[bytes | None, bytes]:
    """`compare_set`: (the value to store, or None for no change; the value to return)."""
    if old is None:
        return (None, expected) if expected else (desired, desired)
    return (desired, desired) if old == expected else (None, old)


class KeyValueStore(abc.ABC):
    """What `FileStore`, `TCPStore` and `PrefixStore` have in common: the calls.

    All calls may be made by several threads at once.  An error leaves the store usable.

    Raises:
        InvalidCallError: an argument is wrong; the message says which and what to do.
        GroupClosedError: after `close`.
        TransportError: the folder or the connection failed; `code` is the errno.  Whether
            a change that was under way was made is then unknown.
        CollectiveTimeoutError: the deadline passed; nothing was changed, except possibly
            by a call whose answer from a `TCPStore` server was lost.
    """

    _timeout: float
    _closed = False

    def set(self, key: str, value: str | bytes) -> None:
        """Store `value` under `key`, replacing what was there."""
        checked, raw = _checked_key(key), _checked_value(value)
        self._check_open()
        self._set(checked, raw)

    def get(self, key: str) -> bytes:
        """Return the value of `key`; wait for it up to the store's timeout."""
        checked = _checked_key(key)
        self._check_open()
        return self._get(checked)

    def add(self, key: str, amount: int) -> int:
        """Add `amount` to the number under `key` in one step and return the sum.

        A missing key counts as 0 and is made, so ``add(key, 0)`` reads a counter.  The
        number is kept as decimal text: ``set(key, "7")`` starts it at 7.
        """
        checked = _checked_key(key)
        try:
            number = operator.index(amount)
        except TypeError as error:
            raise InvalidCallError(f"amount must be an int, but got {amount!r}") from error
        if not _in_int64(number):
            raise InvalidCallError(f"amount must fit 64 bits, but got {amount!r}")
        self._check_open()
        return self._add(checked, number)

    def wait(self, keys: Sequence[str], timeout: timedelta | float | None = None) -> None:
        """Wait until all `keys` are there, up to `timeout`, or else the store's own."""
        checked = _checked_keys(keys)
        limit = None if timeout is None else _seconds(timeout, _FOREVER)
        self._check_open()
        self._wait(checked, limit)

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all `keys` are there now."""
        checked = _checked_keys(keys)
        self._check_open()
        return self._check(checked)

    def delete_key(self, key: str) -> bool:
        """Remove `key`; return whether it was there."""
        checked = _checked_key(key)
        self._check_open()
        return self._delete(checked)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        """Store `desired` under `key` if it now holds `expected`; return what it then holds.

        As in c10d, a missing `key` is made if `expected` is empty; otherwise it stays
        missing and `expected` is returned.
        """
        checked = _checked_key(key)
        old, new = _checked_value(expected, "expected"), _checked_value(desired, "desired")
        self._check_open()
        return self._compare_set(checked, old, new)

    @abc.abstractmethod
    def num_keys(self) -> int:
        """Return how many keys the store holds; a `PrefixStore` counts its whole store."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of what this object holds; calls after it raise.  May be called twice."""

    @property
    def timeout(self) -> timedelta:
        """How long a call may take where it is not told otherwise."""
        return timedelta(seconds=self._timeout)

    def set_timeout(self, timeout: timedelta | float) -> None:
        """Set how long a call of this object may take; the other users' is their own."""
        self._timeout = _seconds(timeout, self._timeout)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise GroupClosedError(f"{self!r} is closed; make a new one")

    def _late(
        self, op: str, start: float, missing: Sequence[str] = (), why: str = ""
    ) -> CollectiveTimeoutError:
        """The error of a call that began at `start` and has passed its deadline."""
        elapsed = time.monotonic() - start
        names = ", ".join(map(repr, missing[:8])) + (" ..." if len(missing) > 8 else "")
        if not why:
            why = f"nobody has set {names}" if missing else "no answer"
        return CollectiveTimeoutError(
            f"store {op} timed out after {elapsed:.2f} s on {self!r}: {why}",
            op=f"store {op}",
            elapsed=elapsed,
        )

    @abc.abstractmethod
    def _set(self, key: str, value: bytes) -> None: ...

    @abc.abstractmethod
    def _get(self, key: str) -> bytes: ...

    @abc.abstractmethod
    def _add(self, key: str, amount: int) -> int: ...

    @abc.abstractmethod
    def _wait(self, keys: list[str], limit: float | None) -> None: ...

    @abc.abstractmethod
    def _check(self, keys: list[str]) -> bool: ...

    @abc.abstractmethod
    def _delete(self, key: str) -> bool: ...

    @abc.abstractmethod
    def _compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes: ...


class PrefixStore(KeyValueStore):
    """A corner of another store: key ``k`` is ``prefix/k`` there, as in c10d.

    Shares everything with `store`, its timeout included; several parties keep apart on one
    store by their prefixes.  A prefix protects nothing.  `store` may be one of c10d's.
    `close` closes this view, not `store`.

    Raises:
        UnsupportedError: `store` lacks the call (a `Store` needs only set, get, add, wait).
    """

    def __init__(self, prefix: str, store: Store) -> None:
        self._prefix = _checked_key(prefix, "prefix")
        if not isinstance(store, Store):
            raise InvalidCallError(
                f"store must have set, get, add and wait, but got {store!r}; "
                "pass a FileStore, a TCPStore or a store of torch.distributed"
            )
        self.underlying_store = store

    def __repr__(self) -> str:
        return f"PrefixStore({self._prefix!r}, {self.underlying_store!r})"

    def num_keys(self) -> int:
        """Return how many keys the underlying store holds, under whatever prefix (as in c10d)."""
        self._check_open()
        return int(self._beneath("num_keys")())

    def close(self) -> None:
        """Close this view; the store beneath stays open."""
        self._closed = True

    @property
    def timeout(self) -> timedelta:
        """The timeout of the store beneath."""
        return cast(timedelta, self._beneath("timeout"))

    def set_timeout(self, timeout: timedelta | float) -> None:
        """Set the timeout of the store beneath."""
        self._beneath("set_timeout")(timedelta(seconds=_seconds(timeout, _FOREVER)))

    def _beneath(self, name: str) -> Any:
        try:
            return getattr(self.underlying_store, name)
        except AttributeError as error:
            raise UnsupportedError(
                f"{name} needs a store that has it, but {self.underlying_store!r} does not; "
                "use a FileStore or a TCPStore"
            ) from error

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{key}"

    def _set(self, key: str, value: bytes) -> None:
        self._beneath("set")(self._full(key), value)

    def _get(self, key: str) -> bytes:
        return self.underlying_store.get(self._full(key))

    def _add(self, key: str, amount: int) -> int:
        return self.underlying_store.add(self._full(key), amount)

    def _wait(self, keys: list[str], limit: float | None) -> None:
        full = [self._full(key) for key in keys]
        if limit is None:
            self.underlying_store.wait(full)
        else:
            self.underlying_store.wait(full, timedelta(seconds=limit))

    def _check(self, keys: list[str]) -> bool:
        return bool(self._beneath("check")([self._full(key) for key in keys]))

    def _delete(self, key: str) -> bool:
        return bool(self._beneath("delete_key")(self._full(key)))

    def _compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        return bytes(self._beneath("compare_set")(self._full(key), expected, desired))


# --- a shared folder -------------------------------------------------------------------

_MAGIC_FILE = b"mpicoll file 1\n"
_LOCK, _NEW, _USERS, _KEY = "lock", "new", "users", "key-"

# POSIX locks hold between processes only, and closing any descriptor of the file drops
# them: within a process this mutex, one per folder, comes first.  The pid is in the key so
# that a forked child starts with fresh ones.
_mutexes: dict[tuple[int, int, int], threading.Lock] = {}


class FileStore(KeyValueStore):
    """A store in a folder that all its users can reach, such as one on NFS or Lustre.

    Shared with every process of the same user that opens the same `path`, on any machine
    that mounts it.  The folder is made (mode 0700) if it is not there, its files are 0600;
    file permissions are all that protects it, so a folder that others can write to, or that
    belongs to another user, is refused.  There is no secret.

    One file per key, named by the key's SHA-256.  A change is made under a POSIX lock on the
    file ``lock`` (it vanishes with its holder, however that dies) by writing ``new`` and
    renaming it, so readers need no lock and never see half a value.  Files that a crash
    left half written count as missing.  Old keys stay: put a fresh nonce into the keys, or
    use a fresh folder for each run.

    Args:
        path: the folder; its parent must exist.
        world_size: if above 0, the folder is removed when that many users have opened it
            and all who opened it have closed it; a user that was killed keeps it there.
        timeout: seconds, or a `timedelta`, that `get` and `wait` wait for a key, and any
            call for the lock.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        world_size: int = -1,
        *,
        timeout: timedelta | float = 300.0,
    ) -> None:
        self._timeout = _seconds(timeout, 300.0)
        if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size == 0:
            raise InvalidCallError(
                f"world_size must be the number of users, or -1 if unknown, but got {world_size!r}"
            )
        try:
            self.path = os.path.abspath(os.fspath(path))
        except TypeError as error:
            raise InvalidCallError(f"path must be a folder's name, but got {path!r}") from error
        self._world_size = world_size
        self._pid = os.getpid()
        self._make_folder()
        if world_size > 0:
            with self._locked("open"):
                self._count_user(opened=1)

    def __repr__(self) -> str:
        return f"FileStore({self.path!r})"

    def num_keys(self) -> int:
        """Return how many keys the folder holds."""
        self._check_open()
        try:
            names = [name for name in os.listdir(self.path) if name.startswith(_KEY)]
        except OSError as error:
            self._fail("list the folder", error)
        return sum(self._read_file(name) is not None for name in names)

    def close(self) -> None:
        """End this user's part; the last of `world_size` users removes the folder."""
        if self._closed:
            return
        if self._world_size > 0 and self._pid == os.getpid():
            with self._locked("close"):
                opened, closed = self._count_user(closed=1)
                if opened == closed >= self._world_size:
                    self._remove_files()
        self._closed = True

    def _fail(self, what: str, error: OSError) -> NoReturn:
        raise TransportError(f"{self!r}: can't {what}: {error}", code=error.errno or 0) from error

    def _make_folder(self) -> None:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
            status = os.stat(self.path)
        except FileNotFoundError as error:
            raise InvalidCallError(
                f"path must be a folder, or a name in one that exists, but got {self.path!r}"
            ) from error
        except OSError as error:
            self._fail("make the folder", error)
        if not os.path.isdir(self.path):
            raise InvalidCallError(
                f"path must be a folder, but {self.path!r} is a file; mpicoll's FileStore keeps "
                "one file per key: give it a name that does not exist yet"
            )
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise InvalidCallError(
                f"path must be a folder of your own that nobody else can write to, but "
                f"{self.path!r} has owner {status.st_uid} and mode {status.st_mode & 0o777:o}; "
                f"use a new folder in it, or run: chmod go-w {self.path}"
            )

    def _name(self, key: str) -> str:
        return _KEY + hashlib.sha256(key.encode()).hexdigest()

    def _open(self, name: str, flags: int) -> int:
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(os.path.join(self.path, name), flags, 0o600)

    def _read_file(self, name: str) -> bytes | None:
        """The value in a file, or None if there is no such file or it is half written."""
        for _ in range(3):
            try:
                with open(self._open(name, os.O_RDONLY), "rb") as file:
                    content = file.read()
                break
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.ESTALE:  # NFS: it was replaced while we read
                    self._fail("read a value", error)
        else:
            return None
        head = len(_MAGIC_FILE) + 12
        if len(content) < head or not content.startswith(_MAGIC_FILE):
            return None
        key_nbytes, value_nbytes = struct.unpack_from("!IQ", content, len(_MAGIC_FILE))
        if len(content) != head + key_nbytes + value_nbytes:
            return None
        return content[head + key_nbytes :]

    def _write_file(self, name: str, content: bytes) -> None:
        """Under the lock: put a whole file in place.  A dead holder's ``new`` is truncated."""
        try:
            with open(self._open(_NEW, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                file.write(content)
            os.rename(os.path.join(self.path, _NEW), os.path.join(self.path, name))
        except OSError as error:
            self._fail("write a value", error)

    def _write(self, key: str, value: bytes) -> None:
        raw = key.encode()
        head = _MAGIC_FILE + struct.pack("!IQ", len(raw), len(value))
        self._write_file(self._name(key), head + raw + value)

    def _read(self, key: str) -> bytes | None:
        return self._read_file(self._name(key))

    @contextlib.contextmanager
    def _locked(self, op: str) -> Iterator[None]:
        """Hold the folder's lock, or raise when the store's timeout has passed."""
        start = time.monotonic()
        deadline = start + self._timeout
        try:
            folder = os.stat(self.path)
        except OSError as error:
            self._fail("find the folder", error)
        whose = (os.getpid(), folder.st_dev, folder.st_ino)
        mutex = _mutexes.setdefault(whose, threading.Lock())
        if not mutex.acquire(timeout=self._timeout):
            raise self._late(op, start, why="another thread holds the lock")
        try:
            try:
                fd = self._lock_file(deadline)
            except OSError as error:
                if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                    raise TransportError(
                        f"{self!r}: this file system has no locks between processes ({error}); "
                        "use another folder, or a TCPStore",
                        code=error.errno,
                    ) from error
                self._fail("lock the folder", error)
            if fd is None:
                raise self._late(op, start, why="another process holds the lock")
            try:
                yield
            finally:
                os.close(fd)  # drops the lock
        finally:
            mutex.release()

    def _lock_file(self, deadline: float) -> int | None:
        delay = 0.0002
        while True:
            fd = self._open(_LOCK, os.O_RDWR | os.O_CREAT)
            try:
                while True:
                    try:
                        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except OSError as error:
                        if error.errno not in (errno.EACCES, errno.EAGAIN):
                            raise
                    left = deadline - time.monotonic()
                    if left <= 0:
                        os.close(fd)
                        return None
                    time.sleep(min(delay * (0.5 + random.random()), left))
                    delay = min(2 * delay, 0.01)
                # The holder before us may have removed the folder's files, this one too.
                if os.fstat(fd).st_nlink:
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _set(self, key: str, value: bytes) -> None:
        with self._locked("set"):
            self._write(key, value)

    def _get(self, key: str) -> bytes:
        start = time.monotonic()
        while True:
            self._await("get", [key], start, self._timeout)
            value = self._read(key)
            if value is not None:  # else somebody deleted it in between
                return value

    def _add(self, key: str, amount: int) -> int:
        with self._locked("add"):
            total = _sum(key, self._read(key), amount)
            self._write(key, str(total).encode())
        return total

    def _wait(self, keys: list[str], limit: float | None) -> None:
        self._await("wait", keys, time.monotonic(), self._timeout if limit is None else limit)

    def _await(self, op: str, keys: list[str], start: float, limit: float) -> None:
        """Look again and again, at intervals of a tenth of the time already waited."""
        missing = [key for key in keys if self._read(key) is None]
        refreshed = start
        while missing:
            now = time.monotonic()
            if now - start >= limit:
                raise self._late(op, start, missing)
            if now - refreshed > 1:
                # An NFS client may remember for half a minute that a file was missing;
                # changing the folder makes it look.
                with contextlib.suppress(OSError):
                    os.utime(self.path)
                refreshed = now
            pause = min(0.001 + (now - start) / 10, 0.05)
            time.sleep(min(pause, start + limit - now))
            missing = [key for key in keys if self._read(key) is None]

    def _check(self, keys: list[str]) -> bool:
        return all(self._read(key) is not None for key in keys)

    def _delete(self, key: str) -> bool:
        with self._locked("delete_key"):
            there = self._read(key) is not None
            try:
                os.unlink(os.path.join(self.path, self._name(key)))
            except FileNotFoundError:
                return False
            except OSError as error:
                self._fail("delete a key", error)
        return there

    def _compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        with self._locked("compare_set"):
            new, result = _exchanged(self._read(key), expected, desired)
            if new is not None:
                self._write(key, new)
        return result

    def _count_user(self, opened: int = 0, closed: int = 0) -> tuple[int, int]:
        """Under the lock: count who came and who left; return both counts."""
        try:
            with open(self._open(_USERS, os.O_RDONLY), "rb") as file:
                before = file.read()
        except FileNotFoundError:
            before = b""
        except OSError as error:
            self._fail("count the users", error)
        if len(before) == 16:
            counts = struct.unpack("!QQ", before)
            opened, closed = opened + counts[0], closed + counts[1]
        self._write_file(_USERS, struct.pack("!QQ", opened, closed))
        return opened, closed

    def _remove_files(self) -> None:
        """Under the lock: remove what is ours; a folder that holds other files stays."""
        try:
            names = [name for name in os.listdir(self.path) if name.startswith(_KEY)]
            for name in [*names, _NEW, _USERS, _LOCK]:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.path, name))
            os.rmdir(self.path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                self._fail("remove the folder", error)


# --- sockets: what both sides know -----------------------------------------------------

_MAGIC = b"mpicoll1"
_NONCE = _PROOF = 32
_SET, _GET, _ADD, _WAIT, _CHECK, _DELETE, _COMPARE_SET, _NUM_KEYS, _JOIN = range(1, 10)
_DONE, _LATE, _REFUSED = range(3)


class _ProtocolError(Exception):
    """The other side sent what the wire format does not allow."""


def _proof(secret: bytes, side: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(secret, side + server_nonce + client_nonce, "sha256")


def _frame(code: int, fields: Sequence[bytes]) -> bytes:
    nbytes = 1 + sum(4 + len(field) for field in fields)
    parts = [struct.pack("!IB", nbytes, code)]
    for field in fields:
        parts += (struct.pack("!I", len(field)), field)
    return b"".join(parts)


def _parsed(payload: bytes) -> tuple[int, list[bytes]]:
    """Code and fields of a frame, without its first four bytes."""
    if not payload:
        raise _ProtocolError("an empty frame")
    fields, at = [], 1
    while at < len(payload):
        if at + 4 > len(payload):
            raise _ProtocolError("a field without a length")
        (nbytes,) = struct.unpack_from("!I", payload, at)
        at += 4
        if at + nbytes > len(payload):
            raise _ProtocolError("a field longer than its frame")
        fields.append(payload[at : at + nbytes])
        at += nbytes
    return payload[0], fields


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Where `host` is, IPv4 first, so that both sides of "localhost" try the same first."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
            raise  # the name server is not answering yet
        raise InvalidCallError(
            f"host_name must be a host's name or address, but {host!r} can't be found: {error}"
        ) from error
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return [(entry[0], entry[4]) for entry in found]


def _tune(sock: socket.socket) -> None:
    """Send small messages at once; notice within about a minute a host that went away."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# --- sockets: the server ---------------------------------------------------------------


class _Peer:
    """The server's side of one connection."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.nonce: bytes | None = secrets.token_bytes(_NONCE)  # None once it is proven
        self.inbox = bytearray()
        self.want = _NONCE + _PROOF  # bytes of inbox until something can be done with it
        self.in_frame = False  # whether a frame's length is known, and `want` is that
        self.outbox = memoryview(b"")
        self.request: tuple[int, list[bytes]] | None = None  # a GET or WAIT for these keys
        self.deadline = deadline  # of the handshake or the request


class _Server:
    """One thread that serves the dictionary; only that thread touches the data."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self.secret = secret
        self.pid = os.getpid()
        self.users: set[object] = set()  # guarded by _servers_lock
        self.host = host
        self._listener = self._bind(host, port)
        self.port: int = self._listener.getsockname()[1]
        self._data: dict[bytes, bytes] = {}
        self._peers: set[_Peer] = set()
        self._strangers = 0
        self._blocked: dict[bytes, set[_Peer]] = {}  # by the first key each one misses
        self._alarms: list[tuple[float, int, _Peer]] = []
        self._alarm_count = 0
        self._accept_after = 0.0
        self._listening = False
        self._joined = 0
        self._joined_changed = threading.Condition()
        self._released: deque[tuple[object, threading.Event]] = deque()
        self._wake_in, self._wake_out = socket.socketpair()
        for sock in (self._wake_in, self._wake_out, self._listener):
            sock.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="mpicoll-store", daemon=True)

    @staticmethod
    def _bind(host: str, port: int) -> socket.socket:
        last: OSError | None = None
        try:
            addresses = _addresses(host, port)
        except socket.gaierror as error:
            raise TransportError(f"can't look up host_name {host!r}: {error}") from error
        for family, address in addresses:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address)
                sock.listen(1024)
                return sock
            except OSError as error:
                sock.close()
                last = error
        number = last.errno if last else 0
        remedy = {
            errno.EADDRINUSE: "port is in use: choose another, or 0 for any that is free",
            errno.EADDRNOTAVAIL: "host_name must be this machine's where is_master=True",
            errno.EACCES: "port must be 1024 or above, or 0",
        }.get(number or 0)
        if remedy:
            raise InvalidCallError(f"{remedy}; got {host!r}, {port}: {last}") from last
        raise TransportError(f"can't listen at {host}:{port}: {last}", code=number or 0) from last

    def start(self) -> None:
        self._thread.start()

    # Called by other threads.

    def release(self, user: object) -> threading.Event:
        """Say that `user` is done; the last one ends the server.  Takes no lock: GC-safe."""
        done = threading.Event()
        if self.pid == os.getpid():
            self._released.append((user, done))
            with contextlib.suppress(OSError):  # full: it will wake; closed: it has ended
                self._wake_in.send(b"x")
            if not self._thread.is_alive():
                done.set()
        else:
            done.set()
        return done

    def wait_joined(self, count: int, seconds: float) -> int:
        with self._joined_changed:
            self._joined_changed.wait_for(lambda: self._joined >= count, seconds)
            return self._joined

    def abandon(self) -> None:
        """Close all descriptors: the thread's last act, and a forked child's first."""
        for sock in (self._listener, self._wake_in, self._wake_out):
            sock.close()
        for peer in list(self._peers):
            peer.sock.close()
        self._selector.close()

    # The thread.

    def _run(self) -> None:
        try:
            while self._drain_released():
                now = time.monotonic()
                self._pause_or_listen(now)
                for ready, events in self._selector.select(self._until_alarm(now)):
                    if ready.fileobj is self._listener:
                        self._accept()
                    elif ready.data is not None and ready.data in self._peers:
                        self._step(ready.data, events)
                self._expire()
        finally:
            with _servers_lock:
                if _shared.get((self.host, self.port)) is self:
                    del _shared[self.host, self.port]
            self.abandon()
            while self._released:
                self._released.popleft()[1].set()

    def _drain_released(self) -> bool:
        """Take note of the users that are done; return whether any are left."""
        with contextlib.suppress(BlockingIOError):
            while self._wake_out.recv(64):
                pass
        waiting = []
        with _servers_lock:
            while self._released:
                user, done = self._released.popleft()
                self.users.discard(user)
                waiting.append((user, done))
            if not self.users:
                self._released.extend(waiting)  # told when all is closed
                if _shared.get((self.host, self.port)) is self:
                    del _shared[self.host, self.port]
                return False
        for _, done in waiting:
            done.set()
        return True

    def _pause_or_listen(self, now: float) -> None:
        room = len(self._peers) < MAX_CONNECTIONS and self._strangers < MAX_STRANGERS
        listen = room and now >= self._accept_after
        if listen and not self._listening:
            self._selector.register(self._listener, selectors.EVENT_READ, None)
        elif self._listening and not listen:
            self._selector.unregister(self._listener)
        self._listening = listen

    def _until_alarm(self, now: float) -> float | None:
        times = [self._alarms[0][0]] if self._alarms else []
        if now < self._accept_after:
            times.append(self._accept_after)
        return max(0.0, min(times) - now) if times else None

    def _set_alarm(self, peer: _Peer, deadline: float) -> None:
        peer.deadline = deadline
        self._alarm_count += 1
        heapq.heappush(self._alarms, (deadline, self._alarm_count, peer))
        if len(self._alarms) > 2 * len(self._peers) + 64:  # mostly of calls long answered
            self._alarms = [alarm for alarm in self._alarms if self._is_valid(*alarm)]
            heapq.heapify(self._alarms)

    def _is_valid(self, deadline: float, _: int, peer: _Peer) -> bool:
        return peer in self._peers and peer.deadline == deadline

    def _expire(self) -> None:
        now = time.monotonic()
        while self._alarms and self._alarms[0][0] <= now:
            alarm = heapq.heappop(self._alarms)
            if not self._is_valid(*alarm):
                continue  # it was in time
            peer = alarm[2]
            if peer.request is None:
                self._drop(peer)
            else:
                _, keys = peer.request
                self._unblock(peer)
                self._answer(peer, _LATE, [key for key in keys if key not in self._data])

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self._accept_after = time.monotonic() + 0.1
            return
        peer = _Peer(sock, 0.0)
        self._peers.add(peer)
        self._strangers += 1
        try:
            sock.setblocking(False)
            _tune(sock)
            self._selector.register(sock, selectors.EVENT_READ, peer)
        except OSError:
            self._drop(peer)
            return
        self._set_alarm(peer, time.monotonic() + HANDSHAKE_SECONDS)
        self._send(peer, _MAGIC + (peer.nonce or b""))

    def _drop(self, peer: _Peer) -> None:
        if peer not in self._peers:
            return
        self._unblock(peer)
        self._peers.discard(peer)
        if peer.nonce is not None:
            self._strangers -= 1
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(peer.sock)
        peer.sock.close()

    def _step(self, peer: _Peer, events: int) -> None:
        """Move one connection on; whatever is wrong with it costs that connection only."""
        try:
            if events & selectors.EVENT_WRITE:
                self._send(peer, b"")
            elif self._receive(peer):
                message = bytes(peer.inbox)
                peer.inbox.clear()
                if peer.nonce is not None:
                    self._greet(peer, message)
                elif peer.in_frame:
                    peer.in_frame, peer.want = False, 4
                    self._serve(peer, *_parsed(message))
                else:
                    (peer.want,) = struct.unpack("!I", message)
                    peer.in_frame = True
                    if not 0 < peer.want <= MAX_FRAME:
                        raise _ProtocolError(f"a frame of {peer.want} bytes")
        except BlockingIOError:
            return
        except (OSError, MemoryError, _ProtocolError):
            self._drop(peer)

    def _receive(self, peer: _Peer) -> bool:
        """Read no more than is due; return whether that is complete."""
        if peer.request is not None:
            peer.sock.recv(1)  # it left, or it talks out of turn
            raise _ProtocolError("a request while another is waiting")
        data = peer.sock.recv(min(peer.want - len(peer.inbox), 1 << 20))
        if not data:
            raise _ProtocolError("it left")
        peer.inbox += data
        return len(peer.inbox) == peer.want

    def _greet(self, peer: _Peer, message: bytes) -> None:
        nonce, proof = cast(bytes, peer.nonce), message[_NONCE:]
        client_nonce = message[:_NONCE]
        if not hmac.compare_digest(proof, _proof(self.secret, b"client", nonce, client_nonce)):
            self._send(peer, b"\1" + bytes(_PROOF))
            raise _ProtocolError("the wrong secret")
        peer.nonce = None
        self._strangers -= 1
        peer.want, peer.deadline = 4, 0.0
        self._send(peer, b"\0" + _proof(self.secret, b"server", nonce, client_nonce))

    def _send(self, peer: _Peer, data: bytes) -> None:
        """Send what can be sent; while some is left, read nothing from this peer."""
        if data:
            peer.outbox = memoryview(data)
        before = bool(peer.outbox) and not data
        try:
            sent = peer.sock.send(peer.outbox)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(peer)
            return
        peer.outbox = peer.outbox[sent:]
        if bool(peer.outbox) != before:
            events = selectors.EVENT_WRITE if peer.outbox else selectors.EVENT_READ
            self._selector.modify(peer.sock, events, peer)

    def _answer(self, peer: _Peer, code: int, fields: Sequence[bytes] = ()) -> None:
        self._send(peer, _frame(code, fields))

    def _serve(self, peer: _Peer, code: int, fields: list[bytes]) -> None:
        count = {_SET: 2, _GET: 2, _ADD: 2, _DELETE: 1, _COMPARE_SET: 3, _NUM_KEYS: 0, _JOIN: 0}
        if len(fields) != count.get(code, len(fields)) or (code == _WAIT and not fields):
            raise _ProtocolError(f"request {code} with {len(fields)} fields")
        keys = {_GET: fields[1:], _WAIT: fields[1:], _CHECK: fields}.get(code, fields[:1])
        if any(len(key) > MAX_KEY for key in keys):
            raise _ProtocolError("a key too long")
        if code in (_GET, _WAIT):
            if len(fields[0]) != 8:
                raise _ProtocolError("seconds of a wrong size")
            (seconds,) = struct.unpack("!d", fields[0])
            if not 0 <= seconds <= _FOREVER:
                raise _ProtocolError("seconds out of range")
            peer.request = (code, keys)
            self._answer_or_block(peer)
            if peer.request is not None:
                self._set_alarm(peer, time.monotonic() + seconds)
        elif code == _SET:
            self._store(fields[0], fields[1])
            self._answer(peer, _DONE)
        elif code == _ADD:
            if len(fields[1]) != 8:
                raise _ProtocolError("an amount of a wrong size")
            (amount,) = struct.unpack("!q", fields[1])
            try:
                name = fields[0].decode("utf-8", "backslashreplace")
                total = _sum(name, self._data.get(fields[0]), amount)
            except InvalidCallError as error:
                self._answer(peer, _REFUSED, [str(error).encode()])
                return
            self._store(fields[0], str(total).encode())
            self._answer(peer, _DONE, [struct.pack("!q", total)])
        elif code == _CHECK:
            self._answer(peer, _DONE, [b"1" if all(k in self._data for k in keys) else b"0"])
        elif code == _DELETE:
            there = self._data.pop(fields[0], None) is not None
            self._answer(peer, _DONE, [b"1" if there else b"0"])
        elif code == _COMPARE_SET:
            new, result = _exchanged(self._data.get(fields[0]), fields[1], fields[2])
            if new is not None:
                self._store(fields[0], new)
            self._answer(peer, _DONE, [result])
        elif code == _NUM_KEYS:
            self._answer(peer, _DONE, [struct.pack("!q", len(self._data))])
        elif code == _JOIN:
            with self._joined_changed:
                self._joined += 1
                self._joined_changed.notify_all()
            self._answer(peer, _DONE)
        else:
            raise _ProtocolError(f"an unknown request {code}")

    def _store(self, key: bytes, value: bytes) -> None:
        if len(value) > MAX_VALUE:
            raise _ProtocolError("a value too long")
        self._data[key] = value
        for peer in self._blocked.pop(key, ()):
            self._answer_or_block(peer)

    def _answer_or_block(self, peer: _Peer) -> None:
        code, keys = cast("tuple[int, list[bytes]]", peer.request)
        missing = next((key for key in keys if key not in self._data), None)
        if missing is not None:
            self._blocked.setdefault(missing, set()).add(peer)
            return
        peer.request, peer.deadline = None, 0.0
        self._answer(peer, _DONE, [self._data[keys[0]]] if code == _GET else ())

    def _unblock(self, peer: _Peer) -> None:
        if peer.request is not None:
            for key in peer.request[1]:
                waiting = self._blocked.get(key)
                if waiting is not None:
                    waiting.discard(peer)
                    if not waiting:
                        del self._blocked[key]
        peer.request, peer.deadline = None, 0.0


_servers: weakref.WeakSet[_Server] = weakref.WeakSet()
_servers_lock = threading.Lock()
_shared: dict[tuple[str, int], _Server] = {}  # multi_tenant servers; guarded by _servers_lock


def _after_fork_in_child() -> None:
    """A child serves nobody: without this its copies would keep the port and hide our end."""
    global _servers_lock
    _servers_lock = threading.Lock()
    _shared.clear()
    for server in list(_servers):
        server.abandon()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _serving(host: str, port: int, secret: bytes, multi_tenant: bool, user: object) -> _Server:
    """Start a server, or with `multi_tenant` join the one that this process already has."""
    with _servers_lock:
        server = _shared.get((host, port)) if multi_tenant and port else None
        if server is not None:
            if not hmac.compare_digest(server.secret, secret):
                raise InvalidCallError(
                    f"secret must be the same for all tenants of {host}:{port} in this process; "
                    "use one secret, or another port"
                )
            server.users.add(user)
            return server
        server = _Server(host, port, secret)
        server.users.add(user)
        if multi_tenant:
            _shared[host, server.port] = server
        _servers.add(server)
    server.start()
    return server


# --- sockets: the client ---------------------------------------------------------------


def _receive(sock: socket.socket, nbytes: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        _limit(sock, deadline)
        part = sock.recv(min(nbytes - len(data), 1 << 20))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "the server hung up")
        data += part
    return bytes(data)


def _limit(sock: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    sock.settimeout(left)


def _dismiss(idle: deque[tuple[int, socket.socket]], server: _Server | None, user: object) -> None:
    """What a `TCPStore` that nobody holds any more leaves to be closed."""
    while idle:
        idle.pop()[1].close()
    if server is not None:
        server.release(user)


class TCPStore(KeyValueStore):
    """A store served over TCP by one process, the master, from a background thread.

    Shared with every process that can connect to ``host_name:port`` and knows the secret.
    Both sides prove that they know it before anything else is read, without sending it.
    So the secret decides who may connect; it does not hide or seal what is sent then: on a
    network where others can listen or interfere, tunnel it.  A secret that could be guessed
    can be found by whoever sees a handshake: make one with ``secrets.token_hex(16)``.

    On loopback a secret may be left out and is then empty: every user of this machine can
    connect.  Elsewhere it is required.

    The keys live as long as the master's object, until `close`.  A connection belongs to
    the process that made it: after a fork the child connects anew, and never serves.
    Threads that wait at the same time use a connection each.

    Args:
        host_name: where the master listens, and the others connect.
        port: the master's port; 0 lets the master pick one (see the attribute `port`).
        world_size: number of `TCPStore` objects that will be made, the master's included.
        is_master: whether this process serves.
        timeout: seconds, or a `timedelta`, for connecting (tried again and again), and then
            for each call.
        wait_for_workers: whether the master waits here until the ``world_size - 1`` others
            have connected; without a `world_size` nobody waits.
        multi_tenant: whether masters in one process with the same host and port share one
            server; it ends when the last of them is closed.
        secret: str or bytes; if None, the environment's MPICOLL_STORE_SECRET.

    Attributes:
        host, port: where the server is.

    Raises:
        InvalidCallError: an argument, or the secret, is wrong; or the port is in use.
        CollectiveTimeoutError: no server, or not enough workers, within `timeout`.
    """

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
        start = time.monotonic()
        self._timeout = _seconds(timeout, _TIMEOUT.total_seconds())
        if not isinstance(host_name, str) or not host_name:
            raise InvalidCallError(f"host_name must be a host's name, but got {host_name!r}")
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
            raise InvalidCallError(f"port must be in range [0, 65536), but got {port!r}")
        if port == 0 and not is_master:
            raise InvalidCallError("port must be the master's `port`, but got 0 on a client")
        if world_size is not None and (
            isinstance(world_size, bool) or not isinstance(world_size, int) or world_size == 0
        ):
            raise InvalidCallError(
                f"world_size must be the number of users, or None, but got {world_size!r}"
            )
        self.host, self.port, self._is_master = host_name, port, bool(is_master)
        self._secret = self._find_secret(secret)
        self._idle: deque[tuple[int, socket.socket]] = deque()  # with the pid of each
        user = object()
        server = None
        if is_master:
            server = _serving(host_name, port, self._secret, multi_tenant, user)
            self.port = server.port
        self._server = server
        self._user = user
        self._finalizer = weakref.finalize(self, _dismiss, self._idle, server, user)
        try:
            self._request("connect", _JOIN, ())
            if server is not None and world_size is not None and wait_for_workers:
                left = max(0.0, start + self._timeout - time.monotonic())
                joined = server.wait_joined(world_size, left)
                if joined < world_size:
                    raise self._late(
                        "connect",
                        start,
                        why=f"only {joined - 1} of {world_size - 1} workers have connected; "
                        "start the others, or pass wait_for_workers=False",
                    )
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"TCPStore({self.host!r}, {self.port}, is_master={self._is_master})"

    def num_keys(self) -> int:
        """Return how many keys the server holds."""
        self._check_open()
        (count,) = self._request("num_keys", _NUM_KEYS, (), answers=1)
        return self._number(count)

    def close(self) -> None:
        """Hang up; the master stops serving, and everybody's waiting calls then raise."""
        self._closed = True
        if self._finalizer.detach() is None:
            return
        _dismiss(self._idle, None, self._user)
        if self._server is not None:
            self._server.release(self._user).wait(2.0)

    def _find_secret(self, secret: str | bytes | None) -> bytes:
        if secret is None:
            secret = config.store_secret() or ""
        if not isinstance(secret, (str, bytes)):
            raise InvalidCallError(f"secret must be str or bytes, but got a {type(secret)}")
        raw = secret.encode("utf-8", "surrogateescape") if isinstance(secret, str) else secret
        if not raw and not self._on_loopback():
            raise InvalidCallError(
                f"secret must be given where host_name is not this machine's loopback, but "
                f"host_name is {self.host!r}; pass the same secret= to all, or set "
                "MPICOLL_STORE_SECRET for all (make one with secrets.token_hex(16))"
            )
        return raw

    def _on_loopback(self) -> bool:
        try:
            found = _addresses(self.host, self.port)
        except socket.gaierror:
            return False
        return all(ipaddress.ip_address(a[0].partition("%")[0]).is_loopback for _, a in found)

    def _set(self, key: str, value: bytes) -> None:
        self._request("set", _SET, (key.encode(), value))

    def _get(self, key: str) -> bytes:
        return self._request("get", _GET, (), [key], self._timeout, answers=1)[0]

    def _add(self, key: str, amount: int) -> int:
        fields = (key.encode(), struct.pack("!q", amount))
        return self._number(self._request("add", _ADD, fields, answers=1)[0])

    def _wait(self, keys: list[str], limit: float | None) -> None:
        self._request("wait", _WAIT, (), keys, self._timeout if limit is None else limit)

    def _check(self, keys: list[str]) -> bool:
        return self._request("check", _CHECK, [k.encode() for k in keys], answers=1)[0] == b"1"

    def _delete(self, key: str) -> bool:
        return self._request("delete_key", _DELETE, (key.encode(),), answers=1)[0] == b"1"

    def _compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        fields = (key.encode(), expected, desired)
        return self._request("compare_set", _COMPARE_SET, fields, answers=1)[0]

    def _number(self, field: bytes) -> int:
        return int.from_bytes(field, "big", signed=True)

    def _request(
        self,
        op: str,
        code: int,
        fields: Sequence[bytes],
        awaited: Sequence[str] | None = None,
        limit: float | None = None,
        answers: int = 0,
    ) -> list[bytes]:
        """Send one request and return the fields of its answer.

        With `awaited`, a GET or WAIT for these keys: the server answers by the deadline.
        """
        start = time.monotonic()
        deadline = start + (self._timeout if limit is None else limit)
        sock = self._borrow(op, start, deadline)
        try:
            if awaited is not None:
                left = struct.pack("!d", max(0.0, deadline - time.monotonic()))
                fields = [left, *(key.encode() for key in awaited)]
                deadline += _GRACE
            frame = _frame(code, fields)
            if len(frame) > MAX_FRAME:
                raise InvalidCallError(
                    f"keys must be at most {MAX_FRAME} bytes together, but have {len(frame)}; "
                    "wait for them in parts"
                )
            _limit(sock, deadline)
            sock.sendall(frame)
            (nbytes,) = struct.unpack("!I", _receive(sock, 4, deadline))
            if nbytes > MAX_FRAME:
                raise _ProtocolError(f"a frame of {nbytes} bytes")
            status, results = _parsed(_receive(sock, nbytes, deadline))
            if status not in (_DONE, _LATE, _REFUSED) or (
                status == _DONE and len(results) != answers
            ):
                raise _ProtocolError(f"answer {status} with {len(results)} fields")
        except BaseException as error:
            sock.close()  # half a conversation is of no use to the next call
            if isinstance(error, TimeoutError) and error.errno is None:
                raise self._late(op, start, awaited or ()) from None
            if isinstance(error, (OSError, _ProtocolError)):
                raise TransportError(
                    f"store {op} failed on {self!r}: {error}; the master has closed the store, "
                    "has died, or can't be reached",
                    code=getattr(error, "errno", 0) or 0,
                ) from error
            raise
        self._give_back(sock)
        if status == _LATE:
            raise self._late(op, start, [r.decode("utf-8", "backslashreplace") for r in results])
        if status == _REFUSED:
            raise InvalidCallError(b" ".join(results).decode("utf-8", "backslashreplace"))
        return results

    def _borrow(self, op: str, start: float, deadline: float) -> socket.socket:
        """Return an idle connection of this process, or a new one; a deque needs no lock."""
        pid = os.getpid()
        while True:
            try:
                owner, sock = self._idle.pop()
            except IndexError:
                return self._connect(op, start, deadline)
            if owner == pid:
                return sock
            sock.close()  # our copy; the parent's stays open

    def _give_back(self, sock: socket.socket) -> None:
        self._idle.append((os.getpid(), sock))
        if self._closed:
            _dismiss(self._idle, None, self._user)

    def _connect(self, op: str, start: float, deadline: float) -> socket.socket:
        """Try until the deadline; only what waiting can't mend is raised at once."""
        delay, last = 0.01, "whoever listens there does not answer"
        while True:
            try:
                for family, address in _addresses(self.host, self.port):
                    sock = socket.socket(family, socket.SOCK_STREAM)
                    try:
                        self._greet(sock, address, deadline)
                        return sock
                    except BaseException as error:
                        sock.close()
                        if not isinstance(error, OSError):
                            raise
                        last = str(error) or last  # empty where only the time ran out
            except socket.gaierror as error:
                last = str(error)
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._late(
                    op,
                    start,
                    why=f"can't connect to {self.host}:{self.port} ({last}); is the master "
                    "running, and does it listen at this host_name and port?",
                )
            time.sleep(min(delay * (0.5 + random.random()), left))
            delay = min(2 * delay, 0.5)

    def _greet(self, sock: socket.socket, address: Any, deadline: float) -> None:
        """Connect, prove that we know the secret, and have the server prove it."""
        _limit(sock, min(deadline, time.monotonic() + 5))
        sock.connect(address)
        if sock.getsockname() == sock.getpeername():
            # TCP lets a client that tries a free port often enough meet itself there.
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens there")
        _tune(sock)
        hello = _receive(sock, len(_MAGIC) + _NONCE, deadline)
        if not hello.startswith(_MAGIC):
            raise TransportError(
                f"port must be that of an mpicoll TCPStore, but what listens at "
                f"{self.host}:{self.port} says {hello[:16]!r}; choose another port"
            )
        server_nonce, client_nonce = hello[len(_MAGIC) :], secrets.token_bytes(_NONCE)
        proof = _proof(self._secret, b"client", server_nonce, client_nonce)
        _limit(sock, deadline)
        sock.sendall(client_nonce + proof)
        verdict = _receive(sock, 1 + _PROOF, deadline)
        expected = b"\0" + _proof(self._secret, b"server", server_nonce, client_nonce)
        if not hmac.compare_digest(verdict, expected):
            which = "refuses ours" if verdict[0] else "does not know it"
            raise InvalidCallError(
                f"secret must be the master's, but the server at {self.host}:{self.port} {which}; "
                "pass the same secret= to all, or set the same MPICOLL_STORE_SECRET for all"
            )
