"""The command line: `python -m mpicoll COMMAND`.

A command is a module of this package with two functions: `add_arguments(parser)`, and
`run(args)`, which returns the exit status.  The module's docstring is the command's help.
Modules are imported when their help or they themselves are asked for, and import no MPI
before `run`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from .. import __version__

COMMANDS = ("demo", "doctor", "bench", "overhead", "run", "trace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m mpicoll", description="Collectives over MPI.")
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
    args = parser.parse_args(argv)
    status: int = args.run(args)
    return status
