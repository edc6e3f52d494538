"""Let a hot plate cool: the heat equation in two dimensions, with halo exchange.

    mpiexec -n 4 python examples/heat.py

The square plate's edges are kept at temperature 0.  Each rank holds some of the grid's rows and,
above and below them, one row more: its halo, a copy of the neighbour's outermost row, which it
needs for the five-point stencil and asks for before each step.  While the halo travels, the rows
that don't need it are computed.

The plate starts as sin(pi x) sin(pi y).  On the grid, too, that shape only shrinks: each step
multiplies it by 1 - 8 r sin(pi h / 2)**2, so that the exact result is known.
"""

import sys

import numpy as np

import mpicoll as mc

POINTS = 255  # inside the edges, in each direction
STEPS = 400
R = 0.2  # time step / h**2; the explicit scheme is stable up to 0.25


def stencil(plate, new, rows):
    """Write one time step of some inner rows into `new`."""
    above, here, below = (slice(rows.start + d, rows.stop + d) for d in (-1, 0, 1))
    new[here, 1:-1] = plate[here, 1:-1] + R * (
        plate[above, 1:-1]
        + plate[below, 1:-1]
        + plate[here, :-2]
        + plate[here, 2:]
        - 4 * plate[here, 1:-1]
    )


def step(pg, plate, new):
    """Compute one time step of this rank's rows; every rank must call this."""
    last = len(plate) - 2  # rows 1 ... last are ours, 0 and last + 1 are the halo
    works = []
    if pg.rank() > 0:
        up = pg.rank() - 1
        works += [pg.recv(plate[0], up), pg.send(plate[1], up)]
    if pg.rank() < pg.size() - 1:
        down = pg.rank() + 1
        works += [pg.recv(plate[last + 1], down), pg.send(plate[last], down)]

    stencil(plate, new, slice(2, last))  # no halo needed
    mc.wait_all(works)
    stencil(plate, new, slice(1, 2))
    stencil(plate, new, slice(last, last + 1))


def main():
    with mc.new_group() as pg:
        h = 1 / (POINTS + 1)
        mine = np.array_split(np.arange(1, POINTS + 1), pg.size())[pg.rank()]
        y = np.arange(mine[0] - 1, mine[-1] + 2) * h  # with the halo
        x = np.arange(POINTS + 2) * h
        start = np.outer(np.sin(np.pi * y), np.sin(np.pi * x))
        start[:, [0, -1]] = 0
        start[y == 0] = 0
        start[y == 1] = 0
        plate, new = start.copy(), start.copy()

        for _ in range(STEPS):
            step(pg, plate, new)
            plate, new = new, plate

        exact = start * (1 - 8 * R * np.sin(np.pi * h / 2) ** 2) ** STEPS
        error = np.array([np.abs(plate - exact)[1:-1].max()])
        heat = np.array([start[1:-1].sum(), plate[1:-1].sum()]) * h**2
        pg.allreduce(error, op=mc.ReduceOp.MAX).wait()
        pg.allreduce(heat).wait()
        if pg.rank() == 0:
            before, after = heat
            print(f"{STEPS} steps on {POINTS} x {POINTS} points: heat {before:.4f} -> {after:.4f}")
            if not error[0] < 1e-12:
                sys.exit(f"WRONG: off the exact result by {error[0]:.1e}")
            print(f"correct: within {error[0]:.0e} of the exact result")


if __name__ == "__main__":
    main()
