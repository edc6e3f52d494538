"""The checks of calls that take several arrays at once: each array is one part of the call."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine import calls
from ..engine.calls import Call


def allreduce(rank: int, size: int, tensors: Sequence[object], op: object) -> Call:
    arrays = calls.several(tensors, "tensors")
    parts = [calls.allreduce(rank, size, x, op) for x in arrays]
    return calls.coalesced("allreduce_coalesced", parts, "tensors")


def allgather(
    rank: int,
    size: int,
    output_lists: Sequence[Sequence[object]],
    input_list: Sequence[object],
) -> Call:
    inputs = calls.several(input_list, "input_list")
    by_input = calls.transposed(output_lists, size, len(inputs))
    parts = [calls.allgather(rank, size, outs, x) for outs, x in zip(by_input, inputs, strict=True)]
    return calls.coalesced("allgather_coalesced", parts, "output_lists", "input_list")


def all_gather_single(
    rank: int, size: int, outputs: Sequence[object], inputs: Sequence[object]
) -> Call:
    found = calls.pairs(outputs, inputs, "outputs", "inputs")
    parts = [calls.all_gather_single(rank, size, out, x) for out, x in found]
    return calls.coalesced("all_gather_single_coalesced", parts, "outputs", "inputs")


def reduce_scatter_single(
    rank: int, size: int, outputs: Sequence[object], inputs: Sequence[object], op: object
) -> Call:
    found = calls.pairs(outputs, inputs, "outputs", "inputs")
    parts = [calls.reduce_scatter_single(rank, size, out, x, op) for out, x in found]
    return calls.coalesced("reduce_scatter_single_coalesced", parts, "outputs", "inputs")
