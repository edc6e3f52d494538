"""Arrays of one call that overlap where one of them is written: they are refused.

The one exception is what a rank gives to itself: it may lie where it is to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from ..arrays.buffers import Buffer, is_tensor
from ..errors import InvalidCallError
from .call import Call

Named: TypeAlias = "Sequence[tuple[str, Buffer]]"
Used: TypeAlias = "list[tuple[int, int, str, bool]]"
"""Memory: begin, end, the argument that it is a part of, and whether it is written."""


def separate(call: Call, rank: int, writes: Named, reads: Named) -> Call:
    """Refuse memory that is written while something else of the call uses it.

    What this rank gives to itself may lie where it is to come: there the call is in place.
    """
    if (
        len(writes) == len(reads) == 1
        and writes[0][1].device is None
        and not np.may_share_memory(writes[0][1].array, reads[0][1].array)
    ):
        return call  # exact for contiguous arrays, and four times faster than what follows
    written, read = used_by(writes, write=True), used_by(reads, write=False)
    found = overlap(written + read)
    if not found:
        return call
    assert call.send is not None and call.recv is not None
    own = [blocks.place(rank if len(blocks.counts) > 1 else 0) for blocks in (call.send, call.recv)]
    if own[0] == own[1] and own[0][1]:
        call.in_place = True
        start, end = own[0][0], sum(own[0])
        name = reads[rank if len(reads) > 1 else 0][0]
        rest = [use for use in read if use[2] != name]
        rest += [
            part
            for first, last, given, _ in read
            if given == name
            for part in ((first, start, name, False), (end, last, name, False))
            if part[0] < part[1]
        ]
        found = overlap(written + rest)
        if not found:
            return call
    raise refusal(found, [*writes, *reads])


def used_by(named: Named, *, write: bool) -> Used:
    """Return the memory of arrays, each with the name of its argument."""
    used = []
    for name, b in named:
        if b.nbytes:
            start = b.address
            used.append((start, start + b.nbytes, name, write))
    return used


def overlap(used: Used) -> list[tuple[str, bool]]:
    """Return two arguments that overlap where one of them is written, and whether each is."""
    reach, reach_name = -1, ""  # the furthest byte used so far
    written, written_name = -1, ""  # the furthest byte written so far
    used.sort()
    for start, end, name, write in used:
        if start < written:
            return [(written_name, True), (name, write)]
        if write and start < reach:
            return [(name, True), (reach_name, False)]
        if end > reach:
            reach, reach_name = end, name
        if write and end > written:
            written, written_name = end, name
    return []


def refusal(found: list[tuple[str, bool]], named: Named) -> InvalidCallError:
    """Say which two arguments overlap, and what to pass instead."""
    (a, _), (b, write) = found
    owner = next(buffer.owner for name, buffer in named if name == b)
    copied = f"{b}.copy()" if hasattr(owner, "copy") else f"np.array({b})"
    if is_tensor(owner):
        copied = f"{b}.clone()"
    if write:
        return InvalidCallError(
            f"{a} and {b} overlap in memory, and both are written: make y = {copied}, pass y, and "
            "take the result from y"
        )
    return InvalidCallError(
        f"{a} and {b} overlap in memory, and {a} is written: pass {copied} for {b}"
    )
