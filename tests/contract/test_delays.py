"""Shared memory with ranks out of step: random delays before and after all that they share."""

import random
import time
from dataclasses import replace

import pytest

from mpicoll.cli.trials import TRIALS
from mpicoll.transports import select
from tests.soak import soak


@pytest.fixture
def tuning(way):
    """Have a call of any size go this way."""
    if way == "inline":
        return select.tuning
    return replace(select.tuning, inline=-1)


@pytest.mark.parametrize("way", ["inline", "slots"])
@pytest.mark.parametrize("count", [5, 20_000, 200_000])
def test_every_collective_with_delays_in_every_step(fresh, count, way):
    fresh._core = None  # in C nothing can be delayed
    memory, dice = fresh._caller.resources.shared, random.Random(1000 * count + fresh.rank())
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

    post, payloads = memory.post, memory.payloads

    def late_post(record, extent):
        dawdle()
        return post(record, extent)

    def late_payloads(seq, dtype):  # before they are written, and before they are read
        dawdle()
        return payloads(seq, dtype)

    memory.announce, memory.reached = late_announce, late_reached
    memory.post, memory.payloads = late_post, late_payloads
    for _ in range(soak(30, 1)):
        for name, make in TRIALS.items():
            trial = make(fresh, count)
            trial.call()
            assert trial.agrees(), name
