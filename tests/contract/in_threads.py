"""The contract on ranks that are threads of one process: MPICOLL_TEST_THREADS=3 python -m pytest.

A test function is called by every rank, each with fixtures of its own, in a world of its own.
"""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mpicoll.runtime.process import process
from mpicoll.testing import run

RANKS = int(os.environ.get("MPICOLL_TEST_THREADS", "0"))
LIMIT = 45.0  # seconds that a test may take
SHARED = {"monkeypatch", "capsys", "capfd", "recwarn"}  # they change what the threads share


class World:
    """The test's own channel beside the library, as mpi4py's communicator would be."""

    def __init__(self) -> None:
        self.comm = process().mpi.COMM_WORLD.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        self.barrier = self.comm.Barrier

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def allgather(self, given: Any) -> list[Any]:
        met = self.comm._next(pickle.dumps(given)).given
        return [pickle.loads(met[rank]) for rank in range(self.size)]

    def bcast(self, given: Any, root: int = 0) -> Any:
        return self.allgather(given)[root]

    def gather(self, given: Any, root: int = 0) -> list[Any] | None:
        found = self.allgather(given)
        return found if self.rank == root else None

    def send(self, given: Any, dest: int, tag: int = 0) -> None:
        self.comm.Send(pickle.dumps(given), dest, tag)

    def recv(self, source: int = -1, tag: int = -1) -> Any:
        status = process().mpi.Status()
        while (found := self.comm.Improbe(source, tag, status)) is None:
            pass
        room = np.empty(status.Get_count(), np.uint8)
        found.Recv(room)
        return pickle.loads(room.tobytes())


class OneRank:
    """The fixtures of one rank, for one test."""

    def __init__(self, item: pytest.Function) -> None:
        self.item = item
        self.values: dict[str, Any] = {}
        self.closers: list[Callable[[], Any]] = []
        self.params = item.callspec.params if hasattr(item, "callspec") else {}

    def value(self, name: str) -> Any:
        if name not in self.values:
            self.values[name] = self._make(name)
        return self.values[name]

    def _make(self, name: str) -> Any:
        definitions = self.item._fixtureinfo.name2fixturedefs.get(name)
        if definitions is None or is_builtin(definitions[-1]):
            return self.params[name] if name in self.params else self.item.funcargs[name]
        function = definitions[-1].func
        request = SimpleNamespace(
            param=self.params.get(name),
            node=self.item,
            getfixturevalue=self.value,
            addfinalizer=self.closers.append,
        )
        names = definitions[-1].argnames
        made = function(**{n: request if n == "request" else self.value(n) for n in names})
        if inspect.isgenerator(made):
            self.closers.append(partial(next, made, None))
            return next(made)
        return made

    def call(self) -> None:
        try:
            names = self.item._fixtureinfo.argnames
            arguments = {name: self.value(name) for name in names}
            for mark in self.item.iter_markers("usefixtures"):
                for name in mark.args:
                    self.value(name)
            self.item.obj(**arguments)
        finally:
            for close in reversed(self.closers):
                close()


def is_builtin(definition: Any) -> bool:
    return definition.func.__module__.startswith("_pytest")


class InThreads:
    """The hooks."""

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        for item in items:
            definitions = item._fixtureinfo.name2fixturedefs
            mark = item.get_closest_marker("mpi")
            if mark is not None and mark.kwargs.get("min_size", 1) > RANKS:
                item.add_marker(pytest.mark.skip("it is for more ranks"))
            if SHARED & set(definitions) or item.get_closest_marker("processes"):
                item.add_marker(pytest.mark.skip("it changes, or counts, what the threads share"))
            item.fixturenames[:] = [
                name
                for name in item.fixturenames
                if name in definitions and is_builtin(definitions[name][-1]) and name != "request"
            ]

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool:
        run(RANKS, lambda: OneRank(pyfuncitem).call(), timeout=LIMIT)
        return True
