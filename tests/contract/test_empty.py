"""Arrays in the node's shared memory: `ProcessGroup.empty`."""

import numpy as np
import pytest

import mpicoll as mc

LARGE = 300_000  # elements: beyond what travels beside a record


def test_it_is_an_array(pg):
    x = pg.empty((3, 4), "int16")
    assert x.shape == (3, 4) and x.dtype == np.int16 and x.flags.writeable
    x[...] = pg.rank()
    pg.barrier().wait()
    assert (x == pg.rank()).all()


@pytest.mark.parametrize("count", [0, 1, LARGE])
@pytest.mark.parametrize("kind", ["allreduce", "reduce", "reduce_scatter"])
def test_reductions_in_place(pg, kind, count):
    n, rank, root = pg.size(), pg.rank(), pg.size() - 1
    rng = np.random.default_rng(7)
    every = rng.integers(-1000, 1000, (n, count * n)).astype(np.float32)
    x = pg.empty(count * n)
    x[...] = every[rank]
    total = every.sum(axis=0)
    for _ in range(2):  # the second on data that peers have touched
        if kind == "allreduce":
            pg.allreduce(x).wait()
            np.testing.assert_array_equal(x, total)
        elif kind == "reduce":
            pg.reduce(x, root).wait()
            np.testing.assert_array_equal(x, total if rank == root else every[rank])
        else:
            out = np.empty(count, np.float32)
            pg.reduce_scatter_single(out, x).wait()
            np.testing.assert_array_equal(out, total[rank * count : (rank + 1) * count])
        pg.barrier().wait()
        x[...] = every[rank]
        pg.barrier().wait()


def test_same_bits_as_without(pg):
    x = pg.empty(LARGE, np.float64)
    x[...] = np.random.default_rng(pg.rank()).standard_normal(LARGE)
    y = x.copy()
    pg.allreduce(x).wait()
    pg.allreduce(y).wait()
    np.testing.assert_array_equal(x, y)


def test_parts_of_it_at_offsets_of_their_own(pg):
    x = pg.empty(2 * LARGE + pg.size())
    part = x[pg.rank() : pg.rank() + LARGE]
    part[...] = pg.rank() + 1
    pg.allreduce(part).wait()
    assert (part == pg.size() * (pg.size() + 1) / 2).all()


def test_some_ranks_give_one_and_others_don_t(pg):
    shared, own = pg.empty(LARGE), np.empty(LARGE, np.float32)
    for x in (shared if pg.rank() % 2 else own, own if pg.rank() % 2 else shared, shared):
        x[...] = pg.rank() + 1
        pg.allreduce(x).wait()
        assert (x == pg.size() * (pg.size() + 1) / 2).all()


def test_it_outlives_its_group(fresh):
    x = fresh.empty(LARGE)
    x[...] = fresh.rank()
    fresh.shutdown()
    x += 1
    assert (x == fresh.rank() + 1).all()


def test_dropped_ones_give_their_memory_back(pg):
    def mapped():
        with open("/proc/self/maps") as maps:
            return sum("mpicoll-" in line for line in maps)

    before = mapped()
    for _ in range(20):
        pg.allreduce(pg.empty(LARGE)).wait()
    pg.barrier().wait()
    assert mapped() <= before + 2


@pytest.mark.parametrize(
    ("shape", "dtype"), [(-1, "float32"), ("three", "float32"), (3, "nonsense"), (3, object)]
)
def test_bad_arguments(pg, shape, dtype):
    with pytest.raises((mc.InvalidCallError, mc.UnsupportedError)):
        pg.empty(shape, dtype)
    x = np.ones(1, np.float32)
    pg.allreduce(x).wait()
    assert x == pg.size()


def test_mismatch(pg):
    if pg.size() < 2:
        pytest.skip("needs two ranks")
    with pytest.raises(mc.CollectiveMismatchError):
        pg.empty(3 + (pg.rank() == 1))
    pg.barrier().wait()
