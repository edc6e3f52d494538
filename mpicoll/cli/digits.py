"""A classifier for handwritten digits, trained by all ranks of a group together.

The data are the 1,797 scanned digits of the UCI repository, 8 x 8 pixels each, which scikit-learn
carries.  The network has one hidden layer and is written out in NumPy.

Every step takes one batch, the same whatever the number of ranks; each rank computes the gradient
of its part of it, and `allreduce` with `AVG` makes the batch's gradient of the parts.  The parts
may be of unequal length, so a rank scales its sum over images by size / length of the batch: the
average of those is the mean over the batch.  Up to rounding, the number of ranks is therefore
invisible in the result, which is what the demo shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..arrays.ops import ReduceOp
from ..groups.group import ProcessGroup

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

PIXELS, HIDDEN, CLASSES = 64, 48, 10
EPOCHS = 40
BATCH = 100
STEP, MOMENTUM = 0.2, 0.9


@dataclass(frozen=True)
class Digits:
    """Images (one row of pixels each, 0 to 1) and their labels, for training and for the test."""

    images: Floats
    labels: Labels
    test_images: Floats
    test_labels: Labels


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: each epoch's mean loss, the weights, the test images it got right."""

    losses: Floats
    weights: Floats
    correct: int


def load() -> Digits:
    """Return the digits in an order that is the same everywhere; every fifth is for the test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order] / 16, labels[order].astype(np.int64)
    test = np.arange(len(images)) % 5 == 0
    return Digits(images[~test], labels[~test], images[test], labels[test])


class Network:
    """Pixels, a hidden layer of rectified units, a softmax over the classes.

    All parameters lie in one flat array, so that a gradient is one array and one `allreduce`.
    """

    def __init__(self, flat: Floats) -> None:
        shapes = [(PIXELS, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,)]
        ends = np.cumsum([np.prod(shape) for shape in shapes])
        parts = np.split(flat[: ends[-1]], ends[:-1])
        self.flat = flat[: ends[-1]]
        self.w1, self.b1, self.w2, self.b2 = (
            part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)
        )

    SIZE = PIXELS * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES

    def scores(self, images: Floats) -> tuple[Floats, Floats]:
        """Return the hidden layer and each class's logarithmic probability, a row per image."""
        hidden = np.maximum(images @ self.w1 + self.b1, 0)
        scores = hidden @ self.w2 + self.b2
        scores -= scores.max(axis=1, keepdims=True)
        scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return hidden, scores

    def gradient(self, images: Floats, labels: Labels, into: Network) -> float:
        """Write the sum over images of the loss's gradient `into` a network; return that loss."""
        hidden, scores = self.scores(images)
        chosen = np.arange(len(labels)), labels
        loss = -scores[chosen].sum()
        error = np.exp(scores)
        error[chosen] -= 1
        into.w2[:] = hidden.T @ error
        into.b2[:] = error.sum(axis=0)
        error = (error @ self.w2.T) * (hidden > 0)
        into.w1[:] = images.T @ error
        into.b1[:] = error.sum(axis=0)
        return float(loss)


def train(
    pg: ProcessGroup | None, digits: Digits, after_epoch: Callable[[int, float], None]
) -> Outcome:
    """Train on all ranks of a group, or with None in this process alone.

    Every rank of the group must call this, with the same digits.  `after_epoch` is told the
    epoch's number, from 1, and its mean loss.
    """
    rank, size = (pg.rank(), pg.size()) if pg is not None else (0, 1)
    random = np.random.default_rng(1)
    network = Network(random.normal(0, 0.1, Network.SIZE))
    velocity = np.zeros(Network.SIZE)
    sums = np.empty(Network.SIZE + 1)  # the gradient and, last, the loss
    gradient = Network(sums)
    losses = np.zeros(EPOCHS)

    for epoch in range(EPOCHS):
        order = random.permutation(len(digits.labels))
        for batch in np.split(order, range(BATCH, len(order), BATCH)):
            mine = np.array_split(batch, size)[rank]
            sums[-1] = network.gradient(digits.images[mine], digits.labels[mine], gradient)
            sums *= size / len(batch)
            if pg is not None:
                pg.allreduce(sums, op=ReduceOp.AVG).wait()
            velocity *= MOMENTUM
            velocity -= STEP * gradient.flat
            network.flat += velocity
            losses[epoch] += sums[-1] * len(batch) / len(order)
        after_epoch(epoch + 1, float(losses[epoch]))

    mine = np.array_split(np.arange(len(digits.test_labels)), size)[rank]
    guesses = network.scores(digits.test_images[mine])[1].argmax(axis=1)
    correct = np.array([np.count_nonzero(guesses == digits.test_labels[mine])])
    if pg is not None:
        pg.allreduce(correct).wait()
    return Outcome(losses, network.flat, int(correct[0]))


def ranks(size: int) -> str:
    """Return a number of ranks in words."""
    return f"{size} rank{'s' if size > 1 else ''}"


def draw(path: Path, size: int, together: Outcome, alone: Outcome, tested: int) -> None:
    """Write a picture of both runs' loss curves."""
    from matplotlib.figure import Figure

    epochs = np.arange(1, EPOCHS + 1)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, alone.losses, color="#f2b134", linewidth=7, label="one process")
    axes.plot(
        epochs,
        together.losses,
        color="#1f4e79",
        linewidth=1.5,
        marker="o",
        markersize=3.5,
        label=f"{ranks(size)}, gradients averaged by mpicoll",
    )
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean training loss (cross-entropy)")
    axes.set_xlim(0, EPOCHS + 1)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    other = "either way" if together.correct == alone.correct else f"but alone {alone.correct}"
    axes.set_title(
        f"Handwritten digits: {together.correct} of {tested} test images right, {other}", loc="left"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
