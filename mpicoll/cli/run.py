"""Run a Python program as torchrun would, under mpiexec or srun; its end is surely noticed.

    mpiexec -n 4 python -m mpicoll run program.py ARGUMENTS
    mpiexec -n 4 python -m mpicoll run -m package.module ARGUMENTS

The program finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its
environment, as MPI has them; MPI is initialized before it starts.  torchrun's own stay as they are.

Plain `python program.py` ends as surely, but for two things.  An exit code that is given by
`raise SystemExit(4)`, and not by `sys.exit(4)`, is known only here.  And here a program that fails
before its first group ends the job, as its peers may wait for it in calls that are not mpicoll's.
"""

from __future__ import annotations

import argparse
import os
import runpy
import socket
import sys
import time
from importlib.util import find_spec

from ..engine.exit import ending
from ..engine.tracebacks import block, describe, write
from ..runtime.library import MPI
from ..runtime.settings import (
    default_timeout,
    environment,
    launchers,
    machine,
    started_by_torchrun,
    tell_rank,
)
from ..runtime.watchdog import end_job, watchdog
from ..runtime.world import addresses
from .asked import agree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM names a module")
    parser.add_argument("program", metavar="PROGRAM", help="a script, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the program gets")


def run(args: argparse.Namespace) -> int:
    """Run the program in this process, as `__main__`; return 0 if it comes to its end."""
    if args.module:
        sys.path.insert(0, os.getcwd())
    missing = _missing(args.program, module=args.module)
    if launchers(environment()) and started_by_torchrun() is None:
        _tell_place(missing)
    agree([missing])
    sys.argv = [args.program, *args.arguments]
    own = os.getpid()
    try:
        if args.module:
            runpy.run_module(args.program, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(args.program)))
            runpy.run_path(args.program, run_name="__main__")
    except SystemExit as error:
        ending().note_exit(error.code)
        if os.getpid() == own and ending().code:
            _end_alone(ending().code)
        raise
    except BaseException as error:
        if os.getpid() == own and _ends_alone():
            write(
                block(
                    [MPI.COMM_WORLD.Get_rank()], describe(type(error), error, error.__traceback__)
                )
            )
            _end_alone(130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    return 0


def _missing(program: str, *, module: bool) -> str:
    """Return why there is nothing to run on this rank, or ""."""
    if module:
        there = find_spec(program.partition(".")[0]) is not None  # a part of it runpy would import
    else:
        there = os.path.exists(program)
    return "" if there else f"there is no {'module' if module else 'file'} {program!r} to run"


def _tell_place(missing: str) -> None:
    """Set the variables by which programs of torchrun know their place; or refuse to run any."""
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    host, port = "127.0.0.1", 0
    if rank == 0:
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
        host = (addresses() or [host])[0]
    with watchdog().guard(time.monotonic() + default_timeout(), "the start of `mpicoll run`"):
        everyone = world.allgather((machine(), host, port, missing))
    agree([place[3] for place in everyone])
    machines = [place[0] for place in everyone]
    if len(set(machines)) == 1:
        host = "127.0.0.1"
    else:
        host = everyone[0][1]
    here = [other for other in range(size) if machines[other] == machines[rank]]
    tell_rank(rank, size, (here.index(rank), len(here)), (host, everyone[0][2]))


def _ends_alone() -> bool:
    """Whether there never was a group, whose members hear of an end, but other ranks are there."""
    if ending().hooked or not (launchers(environment()) and MPI.Is_initialized()):
        return False
    return not MPI.Is_finalized() and MPI.COMM_WORLD.Get_size() > 1


def _end_alone(code: int) -> None:
    if _ends_alone():
        end_job(code, "the program ended early, before its first group")
