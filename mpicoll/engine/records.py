"""Records: what a rank says of a call when it arrives, field by field.

Ranks compare the highest and the lowest of each field.  Beside its record each says how much data
it has, the extent, of which the largest counts.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Generator
from typing import TypeAlias

from .call import Call

SEQ, KIND, DTYPE, OP, ROOT, COUNT, DIGEST, STATE = range(8)
FIELDS = 8
REFUSED, LEAVING = 1, 2  # what a record's state can be, besides 0

Record: TypeAlias = "tuple[int, ...]"
Meets: TypeAlias = "Generator[int, None, tuple[Record, Record, int]]"
"""Steps that end in each field's maximum and minimum over the ranks, and the largest extent."""

BOTH = struct.Struct(f"{2 * FIELDS + 1}q")  # highest, minus lowest, and the largest extent


def record_of(call: Call, seq: int) -> Record:
    """Return a call's record, of which `seq` is the number."""
    dtype = call.dtype
    return (
        seq,
        call.kind.code,
        -1 if dtype is None else dtype.code,
        -1 if call.op is None else call.op.code,
        call.root,
        call.count,
        call.digest,
        LEAVING if call.leaving else REFUSED if call.refused else 0,
    )


def pack(into: bytearray, highest: Record, lowest: Record, extent: int) -> None:
    """Write highest and lowest of each field, and an extent, so that their maximum is both's.

    The minimum of a field is minus the maximum of minus it.
    """
    BOTH.pack_into(into, 0, *highest, *map(operator.neg, lowest), extent)


def unpacked(both: bytes | bytearray | memoryview) -> tuple[Record, Record, int]:
    """Return highest and lowest of each field, and the largest extent."""
    fields = BOTH.unpack_from(both)
    return fields[:FIELDS], tuple(map(operator.neg, fields[FIELDS:-1])), fields[-1]
