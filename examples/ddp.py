"""Train a classifier by DistributedDataParallel over mpicoll, and compare it with others.

    mpiexec -n 2 python examples/ddp.py

Nothing in it is mpicoll's but the backend's name: rank, size and the store come from MPI.  The data
are scikit-learn's handwritten digits, and each rank takes its part of every batch.  The same is
trained over gloo, and by each rank alone on the whole batches: all three must have the same
weights, up to rounding.
"""

import argparse

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mpicoll.torch  # noqa: F401  (not needed where mpicoll is installed)

EPOCHS, BATCH = 10, 96


def network():
    """Return the same network on every rank."""
    torch.manual_seed(0)
    layers = nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)
    return nn.Sequential(*layers).double()


def batches(images, labels):
    """Return the batches of all epochs, the same on every rank."""
    random = np.random.default_rng(1)
    for _ in range(EPOCHS):
        order = torch.from_numpy(random.permutation(len(labels)))
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield images[batch], labels[batch]


def train(model, data, rank=0, size=1):
    """Train on this rank's part of every batch."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for images, labels in data:
        part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
        # The sum over this part, so scaled that the ranks' average is the batch's mean.
        loss = nn.functional.cross_entropy(model(images[part]), labels[part], reduction="sum")
        sgd.zero_grad()
        (loss * size / BATCH).backward()
        sgd.step()


def differ(model, other):
    """Return by how much the weights of two models differ, at most."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def main():
    """Train over mpicoll, over gloo and alone, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", help="a file for the weights")
    options = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images / 16), torch.from_numpy(labels)
    dist.init_process_group("mpicoll")
    rank, size = dist.get_rank(), dist.get_world_size()

    model = DistributedDataParallel(network())
    train(model, batches(images, labels), rank, size)
    by_gloo = DistributedDataParallel(network(), process_group=dist.new_group(backend="gloo"))
    train(by_gloo, batches(images, labels), rank, size)
    alone = network()
    train(alone, batches(images, labels))

    off = torch.tensor([differ(model, by_gloo), differ(model, alone)])
    dist.all_reduce(off, dist.ReduceOp.MAX)
    if rank == 0:
        right = (model(images).argmax(1) == labels).double().mean().item()
        print(f"{size} ranks: {right:.1%} of the images right")
        print(f"weights differ from gloo's by {off[0]:.1e}, from one process's by {off[1]:.1e}")
        print(f"correct: {bool((off < 1e-9).all())}")
        if options.save:
            torch.save(model.module.state_dict(), options.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
