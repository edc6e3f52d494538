import copy
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from mpicoll.arrays.ops import BY_NAME, ReduceOp, as_reduce_op
from mpicoll.errors import InvalidCallError


def test_codes_are_small_stable_and_distinct():
    codes = {name: op.code for name, op in BY_NAME.items()}
    codes["PREMUL_SUM"] = ReduceOp.PREMUL_SUM(1).code
    assert codes == {
        "SUM": 0, "AVG": 1, "PRODUCT": 2, "MIN": 3, "MAX": 4,
        "BAND": 5, "BOR": 6, "BXOR": 7, "PREMUL_SUM": 8,
    }  # fmt: skip


@pytest.mark.parametrize("name", BY_NAME)
def test_class_attributes(name):
    op = getattr(ReduceOp, name)
    assert isinstance(op, ReduceOp)
    assert (op.name, op.factor, repr(op)) == (name, None, f"ReduceOp.{name}")
    assert as_reduce_op(op) is op
    for twin in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert twin == op
        assert hash(twin) == hash(op)


def test_immutable():
    with pytest.raises(AttributeError):
        ReduceOp.SUM.name = "MAX"


def test_equality_is_by_name_and_factor():
    assert ReduceOp.PREMUL_SUM(2) == ReduceOp.PREMUL_SUM(2.0)
    assert ReduceOp.PREMUL_SUM(2) != ReduceOp.PREMUL_SUM(3)
    assert len({ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PREMUL_SUM(2), ReduceOp.PREMUL_SUM(2)}) == 3
    assert ReduceOp.SUM != "SUM"


@pytest.mark.parametrize(
    ("factor", "kept"),
    [
        (2, 2.0), (0.5, 0.5), (Fraction(1, 4), 0.25), (np.float32(0.5), 0.5), (np.int8(-3), -3.0),
        (np.float16(2), 2.0), (1j, 1j), (2 + 0j, 2.0), (np.complex64(1 + 2j), 1 + 2j),
    ],
)  # fmt: skip
def test_factor(factor, kept):
    op = ReduceOp.PREMUL_SUM(factor)
    assert op.factor == kept
    assert type(op.factor) is type(kept)
    assert repr(op) == f"ReduceOp.PREMUL_SUM({kept!r})"


@pytest.mark.parametrize(
    "factor",
    [
        None, True, "2", float("nan"), float("inf"), complex(0, float("inf")), 10**400,
        Decimal(1), [2], np.array([1.0]),
    ],
)  # fmt: skip
def test_factor_refused(factor):
    with pytest.raises(InvalidCallError, match="factor must be a finite number"):
        ReduceOp.PREMUL_SUM(factor)


@pytest.mark.parametrize(
    "op", [None, "SUM", "sum", 0, sum, np.add, ReduceOp, ReduceOp.PREMUL_SUM, object()]
)
def test_refused(op):
    with pytest.raises(InvalidCallError, match=r"op must be one of ReduceOp\.SUM.*but got"):
        as_reduce_op(op)


def test_mpi4py_ops_are_refused():
    class Op:  # its class has this name, in the module mpi4py.MPI
        pass

    Op.__module__ = "mpi4py.MPI"
    with pytest.raises(InvalidCallError, match="op must be one of"):
        as_reduce_op(Op())


def test_torch():
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    for name, ours in BY_NAME.items():
        member = getattr(dist.ReduceOp, name)
        assert as_reduce_op(member) is ours
        assert as_reduce_op(dist.ReduceOp(member)) is ours
    with pytest.raises(InvalidCallError, match="PREMUL_SUM"):
        as_reduce_op(dist.ReduceOp.PREMUL_SUM)
    premul = dist._make_nccl_premul_sum(0.25)
    assert as_reduce_op(premul) == ReduceOp.PREMUL_SUM(0.25)
