"""The tables of NCCL's types and operators, and when NCCL is for a group."""

from __future__ import annotations

import os
import re

import pytest

from mpicoll.arrays.dtypes import BY_NAME, reduction
from mpicoll.arrays.ops import BY_NAME as OPS
from mpicoll.arrays.ops import ReduceOp
from mpicoll.errors import UnsupportedError
from mpicoll.runtime.settings import order_nccl_launches
from mpicoll.transports.cuda.nccl import TYPES, Rule, rule
from mpicoll.transports.select import no_nccl

# As NCCL's header has them.
HEADER_TYPES = ["int8", "uint8", "int32", "uint32", "int64", "uint64"]
HEADER_TYPES += ["float16", "float32", "float64", "bfloat16"]
HEADER_OPS = {"SUM": 0, "PRODUCT": 1, "MAX": 2, "MIN": 3, "AVG": 4}


def test_the_numbers_of_the_types():
    assert {name: i for i, name in enumerate(HEADER_TYPES)} == TYPES


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("op", OPS)
def test_every_pair(name, op):
    """What is reduced by NCCL has its number; all else goes through the host, or is refused."""
    found = rule(BY_NAME[name], OPS[op])
    integer = name in TYPES and "float" not in name
    real = name in TYPES and "float" in name
    by_nccl = (
        (integer and op in ("SUM", "PRODUCT", "MIN", "MAX"))
        or (real and op in ("SUM", "PRODUCT", "AVG"))
        or (name in ("complex64", "complex128") and op == "SUM")
    )
    assert (found is not None) == by_nccl
    if found is None:
        return
    assert found.op == HEADER_OPS[op] and found.factor is None
    assert found.each == (2 if name.startswith("complex") else 1)
    part = {"complex64": "float32", "complex128": "float64"}.get(name, name)
    assert HEADER_TYPES[found.kind] == part


def test_premul_sum_multiplies_first():
    assert rule(BY_NAME["float32"], ReduceOp.PREMUL_SUM(0.5)) == Rule(7, 0, 1, 0.5)
    assert rule(BY_NAME["float64"], ReduceOp.PREMUL_SUM(2)) == Rule(8, 0, 1, 2.0)
    for name in ("float16", "bfloat16", "complex64"):
        assert rule(BY_NAME[name], ReduceOp.PREMUL_SUM(2)) is None


@pytest.mark.parametrize(
    "table, own, options, word",
    [
        ([[1, 22900], [2, 22900]], 0, {}, ""),
        ([[1, 22900]], 0, {}, ""),
        ([[1, 0], [2, 22900]], 0, {}, "has no NCCL"),
        ([[1, 22900], [2, 22900]], 0, {"threads": False}, "MPI_THREAD_MULTIPLE"),
        ([[1, 23007], [2, 23007], [1, 23007]], 0, {}, r"ranks \[0, 2\] share a GPU.*=1"),
        ([[1, 23007], [2, 23007], [1, 23007]], 1, {}, ""),
        ([[1, 23007], [1, 23007]], 0, {"shares": True}, ""),
        ([[1, 22907], [1, 22907]], 0, {"shares": True}, "2.30 or newer"),
    ],
)
def test_when_nccl_is_for_a_group(table, own, options, word):
    why = no_nccl(table, own, **{"shares": False, "threads": True} | options)
    assert bool(why) == bool(word) and re.search(word, why)


def test_launches_keep_their_order_unless_somebody_wants_otherwise(monkeypatch):
    monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT", raising=False)
    order_nccl_launches()
    assert os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] == "1"
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "0")
    order_nccl_launches()
    assert os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] == "0"


def test_what_is_refused_everywhere_is_no_rule():
    for dtype in BY_NAME.values():
        for op in OPS.values():
            try:
                reduction(dtype, op, 2)
            except UnsupportedError:
                assert rule(dtype, op) is None, (dtype.name, op)
