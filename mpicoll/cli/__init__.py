"""The command line: `mpicoll COMMAND`, or `python -m mpicoll COMMAND`.

A command is a module of this package with two functions: `add_arguments(parser)`, and
`run(args)`, which returns the exit status.  The module's docstring is the command's help.
They import no MPI before `run`, and raise a `Refusal` where they can't do what was asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .asked import Parser, Refusal, refuse

COMMANDS = ("demo", "doctor", "bench", "overhead", "run", "trace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    script = os.path.basename(sys.argv[0]) == "mpicoll"
    prog = "mpicoll" if script else "python -m mpicoll"
    try:
        args = _parser(prog).parse_args(argv)
        status: int = args.run(args)
    except Refusal as why:
        return refuse(prog, why)
    return status


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Collectives over MPI.")
    parser.add_argument("--version", action="version", version=f"mpicoll {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f".{name}", __name__)
        text = module.__doc__ or ""
        subparser = subparsers.add_parser(
            name,
            help=text.partition("\n")[0].rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser
