"""`ReduceOp`: the operators of reductions, under the names and spellings of `torch.distributed`.

An operator is a name, a small stable number for the wire, and for PREMUL_SUM a factor.
What an operator does to a dtype stands in `dtypes.py`.
"""

from __future__ import annotations

import cmath
import numbers
import reprlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import InvalidCallError


@dataclass(frozen=True, slots=True, repr=False)
class ReduceOp:
    """How elements combine: SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR or PREMUL_SUM(factor).

    Attributes:
        name: such as ``"SUM"``.
        code: a small number, the same in every process.
        factor: what PREMUL_SUM multiplies this rank's elements by; None for the others.
    """

    name: str
    code: int = field(compare=False)
    factor: float | complex | None = None

    SUM: ClassVar[ReduceOp]
    AVG: ClassVar[ReduceOp]
    PRODUCT: ClassVar[ReduceOp]
    MIN: ClassVar[ReduceOp]
    MAX: ClassVar[ReduceOp]
    BAND: ClassVar[ReduceOp]
    BOR: ClassVar[ReduceOp]
    BXOR: ClassVar[ReduceOp]

    @staticmethod
    def PREMUL_SUM(factor: complex) -> ReduceOp:
        """Return the operator that multiplies this rank's elements by `factor`, then sums.

        Each rank may give its own factor.  A complex factor without imaginary part is a real one.

        Raises:
            InvalidCallError: `factor` is not a finite number.
        """
        return ReduceOp("PREMUL_SUM", 8, _finite(factor))

    def __repr__(self) -> str:
        """Return the operator as it is written in a program."""
        return f"ReduceOp.{self.name}" + ("" if self.factor is None else f"({self.factor!r})")


BY_NAME = {
    name: ReduceOp(name, code)
    for code, name in enumerate(("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"))
}
for _name, _op in BY_NAME.items():
    setattr(ReduceOp, _name, _op)


def as_reduce_op(op: object) -> ReduceOp:
    """Return `op` as ours; takes `ReduceOp` and the members of `torch.distributed.ReduceOp`.

    Raises:
        InvalidCallError: `op` is neither, or PREMUL_SUM without its factor.
    """
    if type(op) is ReduceOp:
        return op
    kind = type(op)
    if kind.__module__.startswith("torch.") and kind.__name__ in ("ReduceOp", "RedOpType"):
        member: Any = getattr(op, "op", op)  # c10d's ReduceOp object holds a RedOpType
        name = str(member.name)
        if name in BY_NAME:
            return BY_NAME[name]
        if name == "PREMUL_SUM" and member is not op:
            return ReduceOp(name, 8, _finite(getattr(op, "factor", None)))
    raise InvalidCallError(
        f"op must be one of ReduceOp.{', '.join(BY_NAME)}, ReduceOp.PREMUL_SUM(factor), or their "
        f"namesakes of torch.distributed.ReduceOp, but got {reprlib.repr(op)} ({kind.__name__})"
    )


def _finite(factor: Any) -> float | complex:
    """Return `factor` as a float, or as a complex number where it has an imaginary part."""
    if not isinstance(factor, bool) and isinstance(factor, numbers.Complex):
        try:
            value = complex(factor)
        except OverflowError:  # an int beyond the floats
            value = complex("nan")
        if cmath.isfinite(value):
            return value if value.imag else value.real
    raise InvalidCallError(
        f"factor must be a finite number, as in ReduceOp.PREMUL_SUM(0.5), "
        f"but got {reprlib.repr(factor)} ({type(factor).__name__})"
    )
