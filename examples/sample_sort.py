"""Sort numbers that lie on all ranks, with a sample sort.

    mpiexec -n 4 python examples/sample_sort.py

Afterwards every rank's numbers are sorted, and all of rank i's come before all of rank i + 1's.
The algorithm: each rank sorts its own numbers and shows a few of them to all; from these samples
all ranks choose the same splitters, which cut the line into one range per rank; one uneven
`all_to_all_single` brings each number to the rank that owns its range.
(G. E. Blelloch et al., A comparison of sorting algorithms for the Connection Machine CM-2, 1991.)
"""

import sys

import numpy as np

import mpicoll as mc

SAMPLES = 64  # per rank: more samples, more even ranges


def sample_sort(pg, numbers):
    """Sort across the group; every rank must call this with a 1-d array of its own length."""
    numbers = np.sort(numbers)

    # Everybody sees everybody's samples, and so chooses the same splitters.
    positions = np.linspace(0, len(numbers) - 1, SAMPLES).astype(int)
    samples = np.empty(SAMPLES * pg.size(), dtype=numbers.dtype)
    pg.all_gather_single(samples, numbers[positions]).wait()
    splitters = np.sort(samples)[SAMPLES * np.arange(1, pg.size())]

    # The numbers are sorted, so what goes to a rank is one stretch of the array.
    ends = np.searchsorted(numbers, splitters)
    to_send = np.diff(ends, prepend=0, append=len(numbers))

    # Tell each rank how much will come from here, then send it.
    to_receive = np.empty_like(to_send)
    pg.all_to_all_single(to_receive, to_send, [], []).wait()
    received = np.empty(to_receive.sum(), dtype=numbers.dtype)
    pg.all_to_all_single(received, numbers, to_receive.tolist(), to_send.tolist()).wait()
    return np.sort(received)


def main():
    with mc.new_group() as pg:
        random = np.random.default_rng(pg.rank())
        mine = random.normal(size=200_000 + 1_000 * pg.rank())
        result = sample_sort(pg, mine)

        # Check it the slow way: bring everything to rank 0 and let NumPy sort it.
        lengths = pg.allgather_object((len(mine), len(result)))
        before = [np.empty(n) for n, _ in lengths] if pg.rank() == 0 else []
        after = [np.empty(n) for _, n in lengths] if pg.rank() == 0 else []
        pg.gather(before, mine, root=0).wait()
        pg.gather(after, result, root=0).wait()
        if pg.rank() == 0:
            held = [n for _, n in lengths]
            print(f"sorted {sum(held):,} numbers; the ranks hold {min(held):,} to {max(held):,}")
            if not np.array_equal(np.concatenate(after), np.sort(np.concatenate(before))):
                sys.exit("WRONG: NumPy sorts them otherwise")
            print("correct: NumPy sorts them the same")


if __name__ == "__main__":
    main()
