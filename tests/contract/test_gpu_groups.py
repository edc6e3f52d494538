"""Groups on GPU memory where there is no GPU: refused on all ranks, with the reason."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

import mpicoll as mc
from mpicoll.errors import CollectiveMismatchError, UnsupportedError
from mpicoll.transports import select
from mpicoll.transports.cuda import gpu as cuda

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(
        importlib.util.find_spec("cupy") is not None, reason="CuPy is here, and a GPU perhaps"
    ),
]


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize(
    "backend", ["auto", "staged", "nccl", "mpi"], ids=["auto", "staged", "nccl", "over mpi"]
)
def test_where_no_rank_has_cupy(device, backend):
    for _ in range(3):  # each attempt gives back what it had made
        with pytest.raises(UnsupportedError, match=r"rank 0 can't use a GPU. .*mpicoll\[cuda12\]"):
            mc.new_group(backend, timeout=20, device=device)
    with mc.new_group(timeout=20) as pg:
        pg.barrier().wait()


def test_where_one_rank_has_none(world, monkeypatch):
    """The others hear of it, in its words."""
    last = world.size - 1
    if world.rank != last:
        monkeypatch.setattr(cuda, "open_gpu", lambda wanted, place: None)
    with pytest.raises(UnsupportedError, match=rf"rank {last} can't use a GPU.*needs CuPy"):
        mc.new_group(timeout=20, device="cuda")


def test_what_was_asked_for_and_cant_be_had(monkeypatch):
    """A GPU that only says its number: the trial of MPI is a real one, and fails here."""
    monkeypatch.setattr(cuda, "open_gpu", lambda wanted, place: SimpleNamespace(device=0))
    with pytest.raises(UnsupportedError, match=r"rank 0 finds.*not CUDA-aware: .*cupy"):
        mc.new_group("mpi", timeout=20, device="cuda")
    with pytest.raises(UnsupportedError, match="'nccl' can't be had.*rank 0 says"):
        mc.new_group("nccl", timeout=20, device="cuda")


def test_each_rank_is_bound_by_its_place(monkeypatch):
    seen = []

    def refuse(wanted, place):
        seen.append((wanted, place))
        raise UnsupportedError("not today")

    monkeypatch.setattr(cuda, "open_gpu", refuse)
    monkeypatch.setattr(select, "local_rank", lambda environ: 5)
    with pytest.raises(UnsupportedError, match="not today"):
        mc.new_group(timeout=20, device="cuda:1")
    assert seen == [("cuda:1", 5)]


def test_ranks_that_want_different_memory(world):
    if world.size == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(CollectiveMismatchError, match="device='cuda'"):
        mc.new_group(timeout=20, device="cuda" if world.rank else "cpu")
