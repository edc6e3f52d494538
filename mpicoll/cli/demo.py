"""Check every collective against NumPy, then train a classifier on all ranks.

Start it under MPI:

    mpiexec -n 4 python -m mpicoll demo

First comes a table of every collective: whether its result was NumPy's on every rank, every time,
and the time it took when each rank handed in 1 KiB and 1 MiB (the median of some calls, each as
long as on its slowest rank).  Then a small network learns to read handwritten digits, its gradients
averaged through mpicoll; rank 0 does the same once more alone, and both must read the test images
equally well.  A picture of the loss curves goes to out/demo.png.  The exit status is 0 if
everything agreed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import __version__
from ..arrays.ops import ReduceOp
from ..errors import MpicollError
from ..groups.group import ProcessGroup
from . import digits as classifier
from .asked import group, lacks, unwritable
from .trials import TRIALS, Maker

SIZES = {"1 KiB": (1 << 10, 10), "1 MiB": (1 << 20, 5)}  # bytes that a rank hands in, calls
LEGEND = """\
  result  correct: each call gave on every rank what NumPy computes
  time    of a call in which each rank hands in so many bytes: the median of a few calls, each as
          long as on its slowest rank"""
TOLERANCE = 1e-8  # between the ranks' training and one process's; rounding makes far less


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo.png"),
        metavar="FILE",
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument(
        "--progress",
        choices=("auto", "always", "never"),
        default="auto",
        help="the progress bar; auto: if standard error is a terminal",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo on this rank; every rank returns the same exit status."""
    missing = lacks("the demo", "sklearn", "matplotlib", install="'mpicoll[demo]'")
    with group(missing=missing or unwritable("--out", args.out)) as pg:
        say = print_now if pg.rank() == 0 else keep_quiet
        say(f"mpicoll {__version__}: {pg!r}")
        collectives_agree = show_collectives(pg, say)
        training_agrees = show_training(pg, say, args)
    return 0 if collectives_agree and training_agrees else 1


def print_now(text: str) -> None:
    """Print a line at once: standard output is a pipe to mpiexec."""
    print(text, flush=True)


def keep_quiet(text: str) -> None:
    """Print nothing: this is not rank 0."""


# ----------------------------------------------------------------------------------- collectives


def show_collectives(pg: ProcessGroup, say: Callable[[str], None]) -> bool:
    """Print the table; return whether every collective agreed with NumPy on every rank."""
    say(f"\nEvery collective, checked against NumPy.\n{LEGEND}\n")
    heads = "".join(f"{f'time, {size}':>14}" for size in SIZES)
    say(f"  {'collective':<34}{'result':<10}{heads}")
    agreeing = 0
    for name, make in TRIALS.items():
        outcomes = [try_out(pg, make, nbytes // 4, calls) for nbytes, calls in SIZES.values()]
        agrees = all(outcome.correct for outcome in outcomes)
        agreeing += agrees
        say(
            f"  {name:<34}{'correct' if agrees else 'WRONG':<10}"
            + "".join(f"{in_words(outcome.seconds):>14}" for outcome in outcomes)
        )
        for error in {outcome.error for outcome in outcomes if outcome.error is not None}:
            say(f"      {error}")
    say(f"\n  {agreeing} of {len(TRIALS)} agree with NumPy on all {pg.size()} ranks")
    return agreeing == len(TRIALS)


class Outcome(NamedTuple):
    """What came of one collective at one size: on all ranks, but the error is this rank's."""

    correct: bool
    seconds: float
    error: str | None


def try_out(pg: ProcessGroup, make: Maker, count: int, calls: int) -> Outcome:
    """Make a call several times; every rank of the group must call this.

    A call that raises is wrong, but the group may be usable all the same: go on.
    """
    seconds = np.empty(calls + 1)  # the first call warms up
    correct = np.ones(1, dtype=np.uint8)
    error = None
    for i in range(len(seconds)):
        trial = make(pg, count)
        pg.barrier().wait()
        begin = time.perf_counter()
        try:
            trial.call()
        except MpicollError as raised:
            error = f"{type(raised).__name__}: {raised}"
        seconds[i] = time.perf_counter() - begin
        correct[0] &= error is None and trial.agrees()
    pg.allreduce(seconds, op=ReduceOp.MAX).wait()
    pg.allreduce(correct, op=ReduceOp.MIN).wait()
    return Outcome(bool(correct[0]), float(np.median(seconds[1:])), error)


def in_words(seconds: float) -> str:
    """Return a time with three digits and a unit."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.3g} s"


# -------------------------------------------------------------------------------------- training


def show_training(pg: ProcessGroup, say: Callable[[str], None], args: argparse.Namespace) -> bool:
    """Train together and on rank 0 alone; print and draw both; return whether they agree."""
    digits = classifier.load()
    tested = len(digits.test_labels)
    say(f"\nTraining on {len(digits.labels):,} handwritten digits, testing on {tested}:\n")
    bar = progress_bar(pg, classifier.EPOCHS, args.progress)
    together = classifier.train(pg, digits, bar)

    # Rank 0 does the same alone; then each rank compares its weights, and rank 0 the rest.
    weights = np.empty_like(together.weights)
    if pg.rank() == 0:
        alone = classifier.train(None, digits, lambda epoch, loss: None)
        weights[:] = alone.weights
    pg.broadcast(weights, root=0).wait()
    difference = np.array([np.abs(together.weights - weights).max()])
    pg.allreduce(difference, op=ReduceOp.MAX).wait()

    verdict = np.zeros(1, dtype=np.uint8)
    if pg.rank() == 0:
        of_losses = float(np.max(np.abs(together.losses - alone.losses) / alone.losses))
        of_weights = float(difference[0])
        verdict[0] = together.correct == alone.correct and max(of_losses, of_weights) <= TOLERANCE
        together_is = f"{classifier.ranks(pg.size())}, averaging gradients"
        for who, outcome in ((together_is, together), ("one process", alone)):
            say(
                f"  {who:<34}loss {outcome.losses[-1]:.6f}, test accuracy "
                f"{outcome.correct / tested:.2%} ({outcome.correct} of {tested})"
            )
        say(
            f"  {'The same' if verdict[0] else 'NOT THE SAME'}: the losses differ by "
            f"{of_losses:.0e} at most, the weights by {of_weights:.0e} ({TOLERANCE:g} is allowed)"
        )
        classifier.draw(args.out, pg.size(), together, alone, tested)
        say(f"\nThe loss curves are in {args.out.resolve()}")
    pg.broadcast(verdict, root=0).wait()
    return bool(verdict[0])


def progress_bar(pg: ProcessGroup, epochs: int, when: str) -> Callable[[int, float], None]:
    """Return what draws the progress bar: nothing, unless on rank 0 and wanted."""
    wanted = when == "always" or (when == "auto" and sys.stderr.isatty())

    def draw(epoch: int, loss: float) -> None:
        done = 30 * epoch // epochs
        line = f"  [{'#' * done:.<30}] epoch {epoch} of {epochs}, loss {loss:.4f}"
        end = "\r" if epoch < epochs else f"\r{'':<{len(line)}}\r"
        print(f"\r{line}", end=end, file=sys.stderr, flush=True)

    return draw if wanted and pg.rank() == 0 else lambda epoch, loss: None
