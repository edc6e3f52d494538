"""The end of a program in which the compiled core has left a call behind."""

from __future__ import annotations

import pytest

from mpicoll.transports.shm import core


@pytest.mark.skipif(not core.available(), reason="there is no compiled core here")
@pytest.mark.parametrize("n", [2, 3])
def test_an_end_with_a_call_that_came_to_nothing(job, n):
    """Rank 0 was interrupted after it had posted a call; its program catches that, and ends."""
    script = """
import math
from mpicoll.engine.progress import engine
pg, x = mc.new_group(timeout=20), np.ones(3)
pg.allreduce(x).wait()
outcome, start = "", time.monotonic()
if RANK == 0:
    def strike(*_, **__):
        raise KeyboardInterrupt
    engine()._poll.next, pg._call = math.inf, strike
    try:
        pg.allreduce(x)
    except KeyboardInterrupt:
        outcome = "interrupted"
else:
    time.sleep(0.5)
    try:
        pg.allreduce(x).wait()  # with what rank 0 gave, or not
        pg.barrier().wait()
    except MpicollError as error:
        outcome = str(error)
report(outcome=outcome, took=time.monotonic() - start)
"""
    ended = job(n, script)
    assert ended["outcome"][0] == "interrupted"
    assert all("interrupted when its peers" in said for said in ended["outcome"][1:])
    assert max(ended["took"]) < 5
