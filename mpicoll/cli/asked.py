"""What a command was asked for: read, or refused in one sentence of one rank.

All ranks are asked the same, and most refuse alike.  Rank 0 says why.  The others leave it the
time to do so, as the first that ends with a failure is the end of all under most launchers; if they
are still there then, they refuse what rank 0 did not, and say so themselves.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TypeVar

from ..errors import InvalidCallError, UnsupportedError
from ..groups.group import ProcessGroup
from ..groups.new import new_group
from ..runtime.settings import environment, launchers
from ..transports.select import OWN

STATUS = 2  # as argparse's
LATE = 3.0  # seconds that the other ranks give rank 0

BACKENDS = OWN

Number = TypeVar("Number", int, float)


class Refusal(Exception):
    """The command can't do what it was asked for; the text is a sentence for its user."""


class Parser(argparse.ArgumentParser):
    """A parser that raises a `Refusal`, where argparse would print the usage on every rank."""

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise Refusal(f"{message}. See {self.prog} --help")


def is_rank_0() -> bool:
    """Return whether this is the rank that speaks, before MPI says so."""
    return _rank() == 0


def _rank() -> int:
    started = launchers(environment())
    return started[0].rank if started else 0


def refuse(prog: str, why: object) -> int:
    """Say why, once, and return the exit status."""
    rank, text = _rank(), f"{prog}: {why}"
    if rank:
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is not None and mpi.Is_initialized():
            return STATUS  # rank 0 is there and has refused the same: MPI ends when all have
        time.sleep(LATE)
        text = f"rank {rank}: {text}"
    print(text, file=sys.stderr, flush=True)
    return STATUS


def group(backend: str = "auto", device: str = "cpu") -> ProcessGroup:
    """Return the group of all ranks, or refuse it where that can't be had."""
    try:
        return new_group(backend, device=device)
    except (InvalidCallError, UnsupportedError) as error:
        raise Refusal(error) from error


def needs(what: str, *modules: str, install: str) -> None:
    """Refuse where a module is not installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise Refusal(f"{what} needs {' and '.join(missing)}: pip install {install}")


def writable(option: str, path: Path) -> None:
    """Refuse where a file can't be written; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise Refusal(f"{option}: {str(path)!r} can't be written: {error.strerror}") from error


# ---- types of options, as argparse takes them ----


def several(known: Collection[str]) -> Callable[[str], list[str]]:
    """Read names with commas between them, of which there are these."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise _wrong(f"must be of {', '.join(known)}, but has {name!r}")
        return names

    return read


def sizes(text: str) -> list[int]:
    """Read numbers of bytes with commas between them."""
    return [_above_0(int, part, "whole numbers from 1 up, with commas") for part in text.split(",")]


def count(text: str) -> int:
    """Read a number of times."""
    return _above_0(int, text, "a whole number from 1 up")


def duration(text: str) -> float:
    """Read seconds."""
    return _above_0(float, text, "a number of seconds above 0")


def _above_0(kind: type[Number], text: str, wanted: str) -> Number:
    try:
        number = kind(text)
    except ValueError:
        number = kind(0)
    if not 0 < number < math.inf:
        raise _wrong(f"must be {wanted}, but has {text!r}")
    return number


def _wrong(text: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(text)
