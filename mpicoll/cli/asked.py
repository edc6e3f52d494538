"""What a command was asked for: read, or refused in one sentence of one rank, and by all.

What a rank reads in its arguments, all read alike, before MPI is started.  What may differ between
them, such as what is installed and which files are there, they tell each other: a rank that refused
by itself would leave the others waiting in MPI's initialization.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn, TypeVar

from ..errors import InvalidCallError, UnsupportedError
from ..groups.group import ProcessGroup
from ..groups.new import new_group
from ..runtime.settings import environment, launchers
from ..transports.select import OWN

STATUS = 2  # as argparse's
LATE = 1.0  # seconds that the other ranks give rank 0 to speak

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
    """Return whether this is the rank that speaks, as the launcher says; MPI may not know yet."""
    started = launchers(environment())
    return not started or started[0].rank == 0


def refuse(prog: str, why: object) -> int:
    """Say why on rank 0, and return the exit status."""
    if is_rank_0():
        print(f"{prog}: {why}", file=sys.stderr, flush=True)
    else:
        mpi = sys.modules.get("mpi4py.MPI")
        if mpi is None or not mpi.Is_initialized():
            time.sleep(LATE)  # the first that fails is the end of all under some launchers
    return STATUS


def group(backend: str = "auto", device: str = "cpu", missing: str = "") -> ProcessGroup:
    """Return the group of all ranks, or refuse it on all where it or what one needs can't be had.

    Args:
        missing: what this rank needs and lacks, in a sentence; or "".
    """
    try:
        made = new_group(backend, device=device)
    except (InvalidCallError, UnsupportedError) as error:
        raise Refusal(error) from error
    agree(made.allgather_object(missing))
    return made


def agree(missing: Sequence[str]) -> None:
    """Refuse what a rank can't do; told what all said, every rank refuses it in the same words."""
    for rank, why in enumerate(missing):
        if why:
            raise Refusal(why if rank == 0 else f"rank {rank}: {why}")


def lacks(what: str, *modules: str, install: str) -> str:
    """Return which modules are not installed that something needs; "" if all are."""
    missing = [name for name in modules if find_spec(name) is None]
    return f"{what} needs {' and '.join(missing)}: pip install {install}" if missing else ""


def unwritable(option: str, path: Path) -> str:
    """Return why a file can't be written by rank 0, or ""; its folder is made."""
    try:
        if is_rank_0():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
    except OSError as error:
        return f"{option}: {str(path)!r} can't be written: {error.strerror}"
    return ""


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
