"""More elements than one MPI call takes: every path in pieces, with the limit lowered; and, in
the soak run, for real."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpicoll.transports import select
from tests.contract import test_collectives as collectives
from tests.contract import test_objects as objects
from tests.contract import test_p2p as messages
from tests.contract.arrays import NUMPY
from tests.soak import SOAK

pytestmark = pytest.mark.mpi
SIZED = [
    (collectives.test_allreduce, "SUM"),
    (collectives.test_allreduce, "MIN"),
    (collectives.test_allreduce, "AVG"),
    (collectives.test_broadcast,),
    (collectives.test_reduce_leaves_the_inputs_of_others_alone,),
    (collectives.test_allgather_of_differing_sizes,),
    (collectives.test_all_gather_single, False),
    (collectives.test_gather_of_differing_sizes,),
    (collectives.test_scatter_of_differing_sizes,),
    (collectives.test_reduce_scatter_of_differing_sizes, "SUM"),
    (collectives.test_reduce_scatter_of_differing_sizes, "MAX"),
    (collectives.test_reduce_scatter_single, "SUM"),
    (collectives.test_alltoall_of_differing_sizes,),
    (collectives.test_all_to_all_single_even, "none"),
    (collectives.test_all_to_all_single_uneven_with_zero_rows,),
    (collectives.test_scan_and_exscan, "SUM"),
    (collectives.test_scan_and_exscan, "MAX"),
    (collectives.test_allreduce_coalesced,),
    (collectives.test_reduce_scatter_single_coalesced,),
]


def most(elements):
    """Tune the transports so that one call of MPI is given so many elements at most."""
    return replace(select.tuning, mpi_elements=elements)


@pytest.mark.parametrize(
    ("size", "tuning"),
    [(0, most(5)), (4, most(5)), (5, most(5)), (1000, most(64))],
    ids=["0", "4", "5", "1000"],
)
@pytest.mark.parametrize("call", SIZED, ids=lambda c: "-".join([c[0].__name__, *map(str, c[1:])]))
def test_in_pieces(pg, call, size):
    function, *more = call
    function(pg, NUMPY, size, *more)


@pytest.mark.parametrize("size", [0, 5, 6, 1000, 2000])
@pytest.mark.parametrize("tuning", [most(5)], ids=["5"])
def test_messages_in_pieces(pg, size):
    messages.test_ring(pg, NUMPY, size)


@pytest.mark.parametrize("tuning", [most(4096)], ids=["4096"])
def test_objects_in_pieces(pg):
    objects.test_broadcast_object(pg)
    objects.test_allgather_object(pg)
    objects.test_gather_object(pg)
    objects.test_scatter_object(pg)


@pytest.mark.limit(600)
@pytest.mark.skipif(not SOAK, reason="large counts: only with --soak")
def test_more_than_two_to_the_31_elements(fresh):
    n, me = fresh.size(), fresh.rank()
    if n > 2:
        pytest.skip("two ranks use 13 GB already")
    count = 2**31 + 5
    places = [0, 2**30 - 1, 2**30, 2**31 - 1, 2**31, count - 1]
    x = np.full(count, me + 1, np.uint8)
    x[places] = [10 * (me + 1) + i for i in range(len(places))]
    fresh.allreduce(x, timeout=300).wait()
    assert x[places].tolist() == [
        sum(10 * (r + 1) + i for r in range(n)) for i in range(len(places))
    ]
    assert np.count_nonzero(x != n * (n + 1) // 2) == len(places)
    x[:] = me
    x[places] += 7
    fresh.broadcast(x, n - 1, timeout=300).wait()
    assert np.count_nonzero(x == n - 1) == count - len(places)
    sending = fresh.send(x, (me + 1) % n, timeout=300)
    y = np.empty_like(x)
    fresh.recv(y, (me - 1) % n, timeout=300).wait()
    sending.wait()
    assert np.array_equal(x, y)
