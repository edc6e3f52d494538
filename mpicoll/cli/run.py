"""Run a Python program whose end is surely noticed by its peers.

    mpiexec -n 4 python -m mpicoll run program.py ARGUMENTS
    mpiexec -n 4 python -m mpicoll run -m package.module ARGUMENTS

Plain `python program.py` does the same, but for one thing: an exit code that is given by
`raise SystemExit(4)`, and not by `sys.exit(4)`, is known only here.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys

from ..engine.exit import ending


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM names a module")
    parser.add_argument("program", metavar="PROGRAM", help="a script, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the program gets")


def run(args: argparse.Namespace) -> int:
    """Run the program in this process, as `__main__`; return 0 if it comes to its end."""
    sys.argv = [args.program, *args.arguments]
    try:
        if args.module:
            sys.path.insert(0, os.getcwd())
            runpy.run_module(args.program, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(args.program)))
            runpy.run_path(args.program, run_name="__main__")
    except SystemExit as error:
        ending().note_exit(error.code)
        raise
    return 0
