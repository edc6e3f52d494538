"""Groups of one world that merge: two and three of them, over every store."""

from __future__ import annotations

import socket

import pytest

import mpicoll as mc
from mpicoll.runtime.library import MPI
from tests.contract.arrays import NUMPY, data, reduced

pytestmark = pytest.mark.mpi(min_size=2)


def file_store(folder, port):
    return mc.FileStore(str(folder))


def tcp_store(folder, port, **options):
    world = MPI.COMM_WORLD
    return mc.TCPStore("127.0.0.1", port, world.size, world.rank == 0, **options)


def torch_store(name):
    def make(folder, port):
        module = pytest.importorskip("torch.distributed", reason="torch is not installed")
        world = MPI.COMM_WORLD
        if name == "FileStore":
            return module.FileStore(str(folder / "torch"), world.size)
        return module.TCPStore("127.0.0.1", port, world.size, world.rank == 0)

    return make


STORES = {
    "FileStore": file_store,
    "TCPStore": tcp_store,
    "TCPStore with a secret": lambda *a: tcp_store(*a, secret="open sesame"),
    "PrefixStore": lambda *a: mc.PrefixStore("a", mc.PrefixStore("b", file_store(*a))),
    "torch FileStore": torch_store("FileStore"),
    "torch TCPStore": torch_store("TCPStore"),
}


@pytest.fixture
def port(world):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return world.bcast(probe.getsockname()[1])


def check(merged, ranks):
    assert list(merged.ranks) == ranks
    me = MPI.COMM_WORLD.rank
    assert merged.rank() == ranks.index(me)
    parts = [data(r, 100) for r in ranks]
    x = data(me, 100)
    merged.scan(x).wait()
    assert NUMPY.same(x, reduced("SUM", parts[: merged.rank() + 1]))


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("store", STORES)
def test_merge(pg, store, groups, folder, port):
    """Groups follow each other by lowest world rank; each keeps its own, reversed, order."""
    n, me = pg.size(), pg.rank()
    if n < groups:
        pytest.skip(f"takes {groups} ranks")
    mine = pg.split(me % groups, key=-me)
    shared = STORES[store](folder, port)
    merged = mine.merge_remote_group(shared, n, timeout=20, group_name="all", group_desc="again")
    expected = [r for first in range(groups) for r in reversed(range(first, n, groups))]
    check(merged, expected)
    assert (merged.group_name, merged.group_desc) == ("all", "again")
    total = merged.allgather_object(merged.group_name)
    assert total == ["all"] * n
    pg.barrier().wait()  # nobody takes the store away before all have used it


def test_merges_through_one_store_do_not_see_each_others_keys(pg, folder):
    n, me = pg.size(), pg.rank()
    mine = pg.split(int(me > 0))
    for _ in range(3):
        merged = mine.merge_remote_group(mc.FileStore(str(folder)), n, timeout=20)
        check(merged, list(range(n)))
        merged.shutdown()


def test_sides_of_unequal_size_and_a_merge_of_merges(pg, folder):
    n, me = pg.size(), pg.rank()
    if n < 3:
        pytest.skip("takes three ranks")
    mine = pg.split_group([0, 1][::-1]) if me < 2 else pg.split_group(list(range(2, n)))
    store = mc.FileStore(str(folder))
    merged = mine.merge_remote_group(store, n, timeout=20)
    check(merged, [1, 0, *range(2, n)])
    again = merged.split(me % 2).merge_remote_group(store, n, timeout=20)
    check(again, [*range(0, n, 2), *range(1, n, 2)])
