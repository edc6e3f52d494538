"""Go on when ranks die: fit a model by gradient descent, with a checkpoint to go back to.

    mpirun --with-ft ulfm -n 4 python examples/survive.py --kill 1@25 --kill 3@60

`--kill RANK@STEP` ends that rank of the world, by SIGKILL, in the middle of that step.  The others
notice it in the call in which they wait, shrink the group to those that live, share the data anew,
read the last checkpoint, and go on.  It takes a launcher that lets the others live, as Open MPI's
does with `--with-ft ulfm`; elsewhere the launcher ends the job, and starting it again goes on from
the checkpoint.  A rank that came too late for a deadline is taken back by the same lines.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np

import mpicoll as mc

STEPS, EVERY = 100, 10  # a checkpoint after every so many steps
SHARDS = 24  # parts of the data, dealt out to however many ranks there are
RATE = 0.1


def shard(number):
    """Return the points of one part of the data, and their values."""
    random = np.random.default_rng(number)
    points = random.normal(size=(50, 8))
    return points, points @ np.arange(8.0) + random.normal(scale=0.1, size=50)


def gradient(weights, shards):
    """Return the gradient of the squared error, summed over these parts of the data."""
    total = np.zeros_like(weights)
    for points, values in shards:
        total += points.T @ (points @ weights - values) / len(values)
    return total


def fit(pg, checkpoint, deaths):
    """Take the steps that are left, from the last checkpoint, with the ranks of this group."""
    mine = [shard(number) for number in range(pg.rank(), SHARDS, pg.size())]
    state = np.zeros(9)  # the step, and the weights
    if pg.rank() == 0 and checkpoint.exists():
        state[:] = np.load(checkpoint)
    pg.broadcast(state, root=0).wait()
    while state[0] < STEPS:
        me = pg.ranks[pg.rank()]
        if deaths.get(me) == state[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        total = gradient(state[1:], mine)
        pg.allreduce(total).wait()
        state[1:] -= RATE * total / SHARDS
        state[0] += 1
        if pg.rank() == 0 and state[0] % EVERY == 0:
            part = checkpoint.with_suffix(".part.npy")
            np.save(part, state)
            os.replace(part, checkpoint)  # there whole, or the old one still
    return state[1:]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kill", action="append", default=[], metavar="RANK@STEP")
    parser.add_argument("--checkpoint", type=Path, help="a file that all ranks can read")
    args = parser.parse_args()
    deaths = {int(rank): int(step) for rank, step in (kill.split("@") for kill in args.kill)}

    pg = mc.new_group(timeout=60)
    folder = pg.broadcast_object(tempfile.mkdtemp() if pg.rank() == 0 else None, root=0)
    checkpoint = args.checkpoint or Path(folder, "survive.npy")
    while True:
        try:
            weights = fit(pg, checkpoint, deaths)
            break
        except (mc.RankFailedError, mc.RemoteRankError, mc.CollectiveTimeoutError) as error:
            before = pg.size()
            pg = pg.shrink_group()
            if pg.rank() == 0:
                print(f"{before} ranks, and {error}: going on with {pg.size()}", flush=True)

    if pg.rank() == 0:
        alone = np.zeros(8)
        for _ in range(STEPS):
            alone -= RATE * gradient(alone, map(shard, range(SHARDS))) / SHARDS
        checkpoint.unlink(missing_ok=True)
        if not args.checkpoint:
            os.rmdir(folder)
        if not np.allclose(weights, alone, rtol=1e-9):
            sys.exit("WRONG: one process alone finds other weights")
        print(f"correct: {pg.size()} ranks find the weights that one process alone finds")


if __name__ == "__main__":
    main()
