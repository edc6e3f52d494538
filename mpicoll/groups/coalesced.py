"""The checks of calls that take several arrays at once: each array is one part of the call."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine import checks, kinds
from ..engine.call import Call


def allreduce(rank: int, size: int, tensors: Sequence[object], op: object) -> Call:
    arrays = checks.several(tensors, "tensors")
    parts = [checks.allreduce(rank, size, x, op) for x in arrays]
    return checks.coalesced(kinds.ALLREDUCE_COALESCED, parts, "tensors")


def allgather(
    rank: int,
    size: int,
    output_lists: Sequence[Sequence[object]],
    input_list: Sequence[object],
) -> Call:
    inputs = checks.several(input_list, "input_list")
    by_input = checks.transposed(output_lists, size, len(inputs))
    parts = [
        checks.allgather(rank, size, outs, x) for outs, x in zip(by_input, inputs, strict=True)
    ]
    return checks.coalesced(kinds.ALLGATHER_COALESCED, parts, "output_lists", "input_list")


def all_gather_single(
    rank: int, size: int, outputs: Sequence[object], inputs: Sequence[object]
) -> Call:
    found = checks.pairs(outputs, inputs, "outputs", "inputs")
    parts = [checks.all_gather_single(rank, size, out, x) for out, x in found]
    return checks.coalesced(kinds.ALL_GATHER_SINGLE_COALESCED, parts, "outputs", "inputs")


def reduce_scatter_single(
    rank: int, size: int, outputs: Sequence[object], inputs: Sequence[object], op: object
) -> Call:
    found = checks.pairs(outputs, inputs, "outputs", "inputs")
    parts = [checks.reduce_scatter_single(rank, size, out, x, op) for out, x in found]
    return checks.coalesced(kinds.REDUCE_SCATTER_SINGLE_COALESCED, parts, "outputs", "inputs")
