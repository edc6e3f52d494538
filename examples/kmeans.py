"""Find ten clusters among handwritten digits: k-means on data that is spread over the ranks.

    mpiexec -n 4 python examples/kmeans.py        (needs scikit-learn, which carries the digits)

In each round a rank assigns its own images to the nearest centroid and adds them up; one
`allreduce_coalesced` makes the sums, the counts and the number of changes of all ranks, and with
these every rank moves the centroids by itself, to the same places.  (S. P. Lloyd, Least squares
quantization in PCM, 1982.)
"""

import sys

import numpy as np
from sklearn.datasets import load_digits

import mpicoll as mc

CLUSTERS = 10


def nearest(images, centroids):
    """Return each image's nearest centroid."""
    distances = ((images[:, None, :] - centroids[None, :, :]) ** 2).sum(axis=2)
    return distances.argmin(axis=1)


def kmeans(images, centroids, add_up):
    """Move the centroids until no image changes its cluster; return them and the rounds it took.

    `add_up` adds a list of arrays over all who hold images, in place.
    """
    labels = np.full(len(images), -1)
    for rounds in range(1, 1000):
        old, labels = labels, nearest(images, centroids)
        sums = np.zeros_like(centroids)
        np.add.at(sums, labels, images)
        counts = np.bincount(labels, minlength=CLUSTERS)
        changes = np.array([np.count_nonzero(labels != old)])
        add_up([sums, counts, changes])
        if changes[0] == 0:
            return centroids, rounds
        occupied = counts > 0  # an empty cluster stays where it is
        centroids[occupied] = sums[occupied] / counts[occupied, None]
    raise RuntimeError("k-means did not settle")


def main():
    with mc.new_group() as pg:
        images, digits = load_digits(return_X_y=True)  # pixels are whole numbers: sums are exact
        mine = np.array_split(np.arange(len(images)), pg.size())[pg.rank()]

        # Rank 0 chooses the first centroids.
        first = np.empty((CLUSTERS, images.shape[1]))
        if pg.rank() == 0:
            first[:] = np.random.default_rng(0).choice(images, CLUSTERS, replace=False)
        pg.broadcast(first, root=0).wait()

        centroids, rounds = kmeans(
            images[mine], first.copy(), lambda arrays: pg.allreduce_coalesced(arrays).wait()
        )

        # How pure are the clusters? Count each digit in each of them.
        table = np.zeros((CLUSTERS, 10), dtype=np.int64)
        np.add.at(table, (nearest(images[mine], centroids), digits[mine]), 1)
        pg.allreduce(table).wait()

        if pg.rank() == 0:
            purity = table.max(axis=1).sum() / table.sum()
            print(f"{table.sum()} images, {rounds} rounds, purity {purity:.1%}")
            alone, _ = kmeans(images, first.copy(), lambda arrays: None)
            if not np.array_equal(centroids, alone):
                sys.exit("WRONG: one process alone finds other centroids")
            print("correct: one process alone finds the same centroids")


if __name__ == "__main__":
    main()
