"""Start more ranks in the middle of a program: they join the group, take their share, and leave.

    mpiexec -n 2 python examples/grow.py

It integrates 4 / (1 + x^2) from 0 to 1, which is pi, first with the ranks that `mpiexec` started,
then with one more, which runs this same file.  Open MPI's launcher needs room for it:
`mpiexec --oversubscribe -n 2 ...`.
"""

import sys

import numpy as np

import mpicoll as mc

POINTS = 1_000_000


def integrate(pg):
    """Each rank sums its points of the midpoint rule; the allreduce puts them together."""
    x = (np.arange(pg.rank(), POINTS, pg.size()) + 0.5) / POINTS
    total = np.array([np.sum(4 / (1 + x * x)) / POINTS])
    pg.allreduce(total, timeout=30).wait()
    return float(total[0])


def main():
    """Integrate alone, then with the help of a rank that wasn't there before."""
    with mc.new_group() as pg:
        few = integrate(pg)
        with pg.spawn([sys.executable, __file__, "--help-out"], 1, timeout=60) as more:
            many = integrate(more)
            if pg.rank() == 0:
                fine = np.isclose(few, np.pi) and np.isclose(many, np.pi)
                print(f"pi is {few:.9f} by {pg.size()} ranks, {many:.9f} by {more.size()}")
                print(f"correct: {fine}")


def help_out():
    """Be one of the ranks that were started."""
    with mc.parent_group(timeout=60) as pg:
        integrate(pg)


if __name__ == "__main__":
    help_out() if "--help-out" in sys.argv else main()
