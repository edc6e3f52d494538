"""Shared memory with ranks out of step: random delays before every flag and after every wait."""

import random
import time

import pytest

from mpicoll.cli.trials import TRIALS


@pytest.mark.parametrize("count", [5, 1000, 200_000])
def test_every_collective_with_delays_in_every_step(fresh, count):
    memory, dice = fresh._ground.shared, random.Random(1000 * count + fresh.rank())
    if memory is None:
        pytest.skip("the group doesn't go through shared memory")
    announce, reached = memory.announce, memory.reached

    def dawdle():
        if dice.random() < 0.3:
            time.sleep(dice.random() * 2e-3)

    def late_announce(flag):
        dawdle()
        announce(flag)

    def late_reached(word, value):
        yield from reached(word, value)
        dawdle()

    memory.announce, memory.reached = late_announce, late_reached
    for _ in range(3):
        for name, make in TRIALS.items():
            trial = make(fresh, count)
            trial.call()
            assert trial.agrees(), name
