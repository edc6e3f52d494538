"""Arrays that the program lets go of while a call uses them: the Work keeps them, or the group.

On bare mpi4py each of these is a segmentation fault, or someone else's data overwritten.
"""

from __future__ import annotations

import contextlib
import gc
import warnings

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll as mc
from mpicoll.engine.progress import engine
from tests.contract.arrays import KINDS
from tests.contract.test_property import KIND_OF, TORCH, Step
from tests.soak import soak

pytestmark = [pytest.mark.mpi, pytest.mark.limit(soak(1800, 60))]

ASYNCHRONOUS = sorted(KIND_OF.keys() - {"allgather_object"})
# Elements, and how often: of 4 bytes, and of what takes one path after the other.
OFTEN = soak(200 if MPI.COMM_WORLD.size == 2 else 20, 3)
SIZES = {1: OFTEN, 250: OFTEN, 75_000: soak(OFTEN, 1)} | soak({1_100_000: 3}, {})


def step(kind, count, turn, n):
    """A call of `count` float32; roots, neighbours and values change from turn to turn."""
    return Step(
        kind=kind,
        dtype=np.dtype("f4"),
        shape=(count,),
        op="SUM",
        root=turn % n,
        seed=turn % 10,
        extra=tuple((turn + r) % 4 for r in range(n)),
        arrays=0,
        group=0,
        wait=0,
        delays=(0,) * n,
    )


def start(pg, count, turn, kind):
    """Start every kind of call; nobody but the Works holds what they read."""
    started = []
    for name in ASYNCHRONOUS:
        works, results = KIND_OF[name](pg, step(name, count, turn, pg.size()), kind.array)
        started.append((name, works if isinstance(works, list) else [works], results))
    return started


@pytest.mark.filterwarnings("ignore::mpicoll.DroppedWorkWarning")
@pytest.mark.parametrize("dropped", ["input", "output", "both"])
@pytest.mark.parametrize("count", SIZES)
def test_dropped_while_in_flight(pg, count, dropped):
    for turn in range(SIZES[count]):
        kind = KINDS[turn % 2 if TORCH else 0]
        started = start(pg, count, turn, kind)
        if dropped == "output":
            started = [(name, works, []) for name, works, _ in started]
        elif dropped == "both":  # and the Works with them
            del started
            started = []
        gc.collect(1)  # all this is young
        junk = [np.full(count, 7, np.float32) for _ in range(4 * pg.size() + 20)]
        for name, works, results in started:
            mc.wait_all(works)
            for got, expected in results:
                assert kind.same(got, expected), (name, turn)
        pg.barrier().wait()
        assert all((x == 7).all() for x in junk), turn


def test_these_are_all_asynchronous_calls():
    """A collective that is added to groups has its place here."""
    returns_work = {
        name
        for name, method in vars(mc.ProcessGroup).items()
        if not name.startswith("_")
        and getattr(method, "__annotations__", {}).get("return") == "Work"
    }
    others = {"send", "recv", "recv_anysource"}  # tried by `ring`
    assert returns_work == {*ASYNCHRONOUS, *others} - {"ring"}


# ---- what is dropped under way, and has a result, warns ----


def late(pg):
    """Have rank 0 come last: it waits until all others are in the call that `between` makes."""
    if pg.rank() == 0:
        for r in range(1, pg.size()):
            pg.recv(np.empty(1), r, tag=77).wait()


def here(pg):
    if pg.rank() != 0:
        pg.send(np.ones(1), 0, tag=77).wait()


def warned(caught):
    assert all(issubclass(w.category, mc.DroppedWorkWarning) for w in caught), caught
    return [(w.filename, w.lineno) for w in caught]


DROPPED = {  # calls that have a result on every rank but 0
    "allreduce": lambda pg, x, y: pg.allreduce(x),
    "allreduce, large": lambda pg, x, y: pg.allreduce(np.ones(100_000)),
    "broadcast": lambda pg, x, y: pg.broadcast(x, 0),
    "reduce": lambda pg, x, y: pg.reduce(x, pg.size() - 1),
    "scan": lambda pg, x, y: pg.scan(x),
    "all_gather_single": lambda pg, x, y: pg.all_gather_single(y, x),
    "allreduce_coalesced": lambda pg, x, y: pg.allreduce_coalesced([x, y]),
}


@pytest.mark.parametrize("name", DROPPED)
def test_a_work_that_is_dropped_under_way_warns_with_its_line(pg, name):
    call, x, y = DROPPED[name], np.ones(3), np.ones(3 * pg.size())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):  # once is enough
            late(pg)
            call(pg, x, y)
            here(pg)
            pg.barrier().wait()
    last = pg.rank() == pg.size() - 1
    if pg.rank() > 0 and (last or name != "reduce"):
        assert warned(caught) == [(__file__, call.__code__.co_firstlineno)]
        assert f"{name.partition(',')[0]}(float64[" in str(caught[0].message)
        assert "wait()" in str(caught[0].message)
    elif pg.size() == 1:
        assert not caught


KEPT = {  # calls, and what is done before the Work is dropped, that are no mistakes
    "waited for": (lambda pg, x: pg.allreduce(x), lambda pg, work: work.wait()),
    "waited for with all": (lambda pg, x: pg.allreduce(x), lambda pg, work: mc.wait_all([work])),
    "its future": (lambda pg, x: pg.allreduce(x), lambda pg, work: work.get_future().result()),
    "on the host": (lambda pg, x: pg.allreduce(x), lambda pg, work: work.synchronize()),
    "asked for": (lambda pg, x: pg.allreduce(x), lambda pg, work: until(work.is_completed)),
    "a later one": (lambda pg, x: pg.allreduce(x), lambda pg, work: pg.barrier().wait()),
    "a barrier": (lambda pg, x: pg.barrier(), lambda pg, work: None),
    "what only gives": (lambda pg, x: pg.broadcast(x, pg.size() - 1), lambda pg, work: None),
    "what fails": (lambda pg, x: pg.allreduce(np.ones(1 + pg.rank())), lambda pg, work: None),
}


def until(true):
    while not true():
        pass


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_mistake_does_not_warn(pg, name):
    call, then = KEPT[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        late(pg)
        work = call(pg, np.ones(3))
        here(pg)
        if name == "what only gives" and pg.rank() < pg.size() - 1:
            work.wait()
        if pg.rank() > 0:
            then(pg, work)
        elif name == "a later one":
            pg.barrier().wait()
        else:
            until(work.is_completed)
        del work
        for _ in range(4 if name == "what fails" else 1):  # the next calls raise what failed
            with contextlib.suppress(mc.CollectiveMismatchError):
                pg.barrier().wait()
    assert not warned(caught)


def test_a_work_that_the_collector_frees_inside_the_engine_does_not_warn(pg):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        late(pg)
        work = pg.allreduce(np.ones(3))
        here(pg)
        pg.barrier().wait()  # so that is over, and nobody has asked for it
        cycle = [work]
        cycle.append(cycle)
        del work, cycle
        engine().between_steps(gc.collect)
    assert not caught


@pytest.mark.parametrize("how", ["the environment", "a filter"])
def test_the_warning_can_be_turned_off(pg, monkeypatch, how):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "a filter":
            warnings.filterwarnings("ignore", category=mc.DroppedWorkWarning)
        else:
            monkeypatch.setenv("MPICOLL_WARN_DROPPED", "0")
        late(pg)
        pg.allreduce(np.ones(3))
        here(pg)
        pg.barrier().wait()
    assert not caught
