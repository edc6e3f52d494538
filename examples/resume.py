"""Go on where the job was stopped: power iteration with a checkpoint, for jobs that are requeued.

    mpiexec -n 4 python examples/resume.py --checkpoint resume.npz
    sbatch scripts/slurm/requeue.sbatch examples/resume.py --checkpoint resume.npz

Each rank holds some rows of a matrix, and the vector whole.  After every few steps rank 0 writes
the vector to the checkpoint, which is read at the next start: whatever ends the job, be it its time
limit, costs the steps since then, and no more.  The number of ranks may change in between.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np

import mpicoll as mc

N = 50  # rows of the matrix
MATRIX = 2 * np.eye(N) - np.eye(N, k=1) - np.eye(N, k=-1)
STEPS, EVERY = 100, 20  # a checkpoint after every so many steps


def save(path, step, x):
    """Write a checkpoint: whoever reads sees all of it, or the one before."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        np.savez(file, step=step, x=x)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load(pg, path):
    """Return the step and the vector to begin with: rank 0 reads, so that all have the same."""
    state = np.zeros(1 + N)
    if pg.rank() == 0:
        if path and path.exists():
            with np.load(path) as found:
                state[0], state[1:] = found["step"], found["x"]
            print(f"going on after step {state[0]:.0f}", flush=True)
        else:
            state[1] = 1.0
    pg.broadcast(state, root=0).wait()
    return int(state[0]), state[1:]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, help="a file where every node can read it")
    parser.add_argument("--pause", type=float, default=0, help="seconds between steps")
    args = parser.parse_args()

    with mc.new_group(timeout=60) as pg:
        shares = np.array_split(MATRIX, pg.size())
        mine, parts = shares[pg.rank()], [np.empty(len(share)) for share in shares]
        step, x = load(pg, args.checkpoint)
        while step < STEPS:
            pg.allgather(parts, mine @ x).wait()
            x = np.concatenate(parts)
            x /= np.linalg.norm(x)
            step += 1
            if args.checkpoint and pg.rank() == 0 and step % EVERY == 0:
                save(args.checkpoint, step, x)
            time.sleep(args.pause)

        if pg.rank() == 0:
            alone = np.eye(N)[0]
            for _ in range(STEPS):
                alone = MATRIX @ alone
                alone /= np.linalg.norm(alone)
            print(f"largest eigenvalue of the matrix, after {STEPS} steps: {x @ MATRIX @ x:.6f}")
            if not np.allclose(x, alone, rtol=1e-9):
                sys.exit("WRONG: one process alone, in one go, finds another vector")
            print("correct: one process alone, in one go, finds the same vector")


if __name__ == "__main__":
    main()
