"""One pure checker per collective.

A checker turns a user's arguments into a `Call`, or refuses them with an error that names
argument, value and remedy.  It touches no MPI and sends nothing: what is refused here is
refused before anything is sent.
"""

from __future__ import annotations

import math
import operator
import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..arrays.buffers import Blocks, Buffer, as_buffer, is_tensor
from ..arrays.device import UNKNOWN
from ..arrays.dtypes import from_numpy, instead, reduction
from ..arrays.ops import as_reduce_op
from ..errors import InvalidCallError, UnsupportedError, interrupts
from ..runtime import settings
from . import kinds
from .call import (
    ANY,
    ANY_SOURCE,
    NULL,
    PROC_NULL,
    UNEVEN,
    Call,
    Members,
    Pieces,
    Shape,
    digest,
)
from .kinds import Kind
from .overlap import overlap, refusal, separate, used_by

# ---- the pieces of a check ----


def integer(value: object, name: str) -> int:
    """Return an integer argument as an int."""
    if isinstance(value, bool):
        raise InvalidCallError(f"{name} must be an integer, but got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidCallError(f"{name} must be an integer, but got {value!r}") from None


def rank_in(value: object, name: str, size: int) -> int:
    """Return a rank argument as an int inside the group."""
    rank = integer(value, name)
    if not 0 <= rank < size:
        raise InvalidCallError(
            f"{name} must be a rank of this group, in [0, {size}), but got {rank}{_OF_THE_WORLD}"
        )
    return rank


_OF_THE_WORLD = ": pg.ranks.index(i) is the one that the world's rank i has in group pg"


def _peer(value: object, name: str, size: int) -> int:
    """Return the rank that a message goes to or comes from, or `ANY` or `NULL`."""
    if value is PROC_NULL:
        return NULL
    if value is ANY_SOURCE and name == "src":
        return ANY
    rank = integer(value, name)
    if not 0 <= rank < size:
        other = "mpicoll.ANY_SOURCE for any rank, " if name == "src" else ""
        raise InvalidCallError(
            f"{name} must be a rank of this group, in [0, {size}), {other}or mpicoll.PROC_NULL for "
            f"none, but got {rank}{_OF_THE_WORLD}"
        )
    return rank


def int32(value: object, name: str) -> int:
    """Return an integer argument that MPI takes as a C int."""
    number = integer(value, name)
    if not -(2**31) <= number < 2**31:
        raise InvalidCallError(f"{name} must be in [-2**31, 2**31), but got {number}")
    return number


def color(value: object) -> int | None:
    """Check the color of a split; a bool is one of two."""
    if value is None:
        return None
    number = int(value) if isinstance(value, (bool, np.bool_)) else integer(value, "color")
    if not 0 <= number < 2**31:
        raise InvalidCallError(f"color must be None or in [0, 2**31), but got {number}")
    return number


def _tag(value: object, highest: int) -> int:
    tag = integer(value, "tag")
    if not 0 <= tag <= highest:
        raise InvalidCallError(f"tag must be in [0, {highest}], but got {tag}")
    return tag


def _list(value: object, name: str, length: int) -> Sequence[object]:
    if not isinstance(value, (list, tuple)):
        value = _rows(value, name, length)
    if len(value) == 1 and length != 1 and isinstance(value[0], (list, tuple)):
        value = value[0]  # c10d's list-of-lists form
    if len(value) != length:
        raise InvalidCallError(
            f"{name} must have {length} arrays, one per rank of the group, but has {len(value)}"
        )
    return value


def _rows(value: object, name: str, length: int) -> Sequence[object]:
    """Return views of an array's rows, which stand for a list of arrays."""
    array: Any = value
    if (isinstance(value, np.ndarray) or is_tensor(value)) and array.ndim:
        return [array[i, ...] for i in range(len(array))]
    raise InvalidCallError(
        f"{name} must be a list of {length} arrays, one per rank, or a NumPy array or tensor of "
        f"{length} rows, but got {type(value).__name__}"
    )


def _buffers(value: object, name: str, length: int, *, write: bool) -> list[Buffer]:
    arrays = _list(value, name, length)
    if length == 1 and isinstance(arrays[0], (list, tuple)):
        arrays = _list(arrays[0], name, 1)
    found = [as_buffer(x, f"{name}[{i}]", write=write) for i, x in enumerate(arrays)]
    for i, buffer in enumerate(found):
        _alike(found[0], f"{name}[0]", buffer, f"{name}[{i}]", write=write)
    return found


def _alike(a: Buffer, a_name: str, b: Buffer, b_name: str, *, write: bool = False) -> None:
    """Refuse two arrays of one call that differ in dtype or in where they lie.

    `write` says that results land in `b`.
    """
    if a.device != b.device and _apart(a.device, b.device):
        raise InvalidCallError(
            f"{a_name} and {b_name} must lie in the same memory, but are {_place(a.device)} and "
            f"{_place(b.device)}: make a copy of {b_name} there, and pass that"
            + (", and copy the result back" if write else "")
        )
    if a.dtype is not b.dtype:
        raise InvalidCallError(
            f"{a_name} and {b_name} must have one dtype, but are {a.dtype.name} and "
            f"{b.dtype.name}: {_converted(a, a_name, b, b_name, write)}"
        )


def _converted(a: Buffer, a_name: str, b: Buffer, b_name: str, write: bool) -> str:
    """Write down how to give `b` the dtype of `a`."""
    if is_tensor(b.owner):
        made = f"{b_name}.to(torch.{a.dtype.name})"
        if not write:
            return f"pass {made}"
        back = f"{b_name}.detach().copy_(y)"
        return f"make y = {made}, pass y, and copy the result back: {back}"
    kind = f"{a_name}.dtype" if isinstance(a.owner, np.ndarray) else f'"{a.dtype.name}"'
    if hasattr(b.owner, "astype"):
        return instead(b_name, f"{b_name}.astype({kind})", write)
    return instead(b_name, f"np.array({b_name}, dtype={kind})", write)


def _apart(a: int | None, b: int | None) -> bool:
    """Return whether two arrays surely lie in different memories."""
    if a is None or b is None:
        return a is not b
    return a != b and UNKNOWN not in (a, b)


def _place(device: int | None) -> str:
    if device is None:
        return "on the host"
    return "in GPU memory" if device == UNKNOWN else f"on GPU {device}"


def _named(name: str, buffers: Sequence[Buffer]) -> list[tuple[str, Buffer]]:
    return [(f"{name}[{i}]", buffer) for i, buffer in enumerate(buffers)]


def _even(counts: Sequence[int]) -> int:
    return counts[0] if counts and counts.count(counts[0]) == len(counts) else UNEVEN


# ---- one checker per collective ----


def _in_place(kind: Kind, tensor: object, *, write: bool = True) -> Call:
    buffer = as_buffer(tensor, "tensor", write=write)
    blocks = Blocks.single(buffer)
    return Call(kind, blocks, blocks if write else None, count=buffer.count, outputs=(tensor,))


def _reducing(call: Call, op: object, size: int) -> Call:
    call.op = as_reduce_op(op)
    assert call.dtype is not None
    call.reduction = reduction(call.dtype, call.op, size)
    return call


def allreduce(rank: int, size: int, tensor: object, op: object) -> Call:
    return _reducing(_in_place(kinds.ALLREDUCE, tensor), op, size)


def broadcast(rank: int, size: int, tensor: object, root: object) -> Call:
    root = rank_in(root, "root", size)
    call = _in_place(kinds.BROADCAST, tensor, write=rank != root)
    call.root = root
    return call


def reduce(rank: int, size: int, tensor: object, root: object, op: object) -> Call:
    root = rank_in(root, "root", size)
    call = _reducing(_in_place(kinds.REDUCE, tensor, write=rank == root), op, size)
    call.root = root
    return call


def scan(rank: int, size: int, tensor: object, op: object) -> Call:
    return _prefix(kinds.SCAN, size, tensor, op)


def exscan(rank: int, size: int, tensor: object, op: object) -> Call:
    return _prefix(kinds.EXSCAN, size, tensor, op)


def _prefix(kind: Kind, size: int, tensor: object, op: object) -> Call:
    call = _reducing(_in_place(kind, tensor), op, size)
    assert call.op is not None
    if call.op.name == "AVG":
        raise UnsupportedError(
            f"op=ReduceOp.AVG has no agreed meaning in {kind}: use ReduceOp.SUM, then divide"
        )
    return call


def allgather(rank: int, size: int, output_tensors: object, input_tensor: object) -> Call:
    outputs = _buffers(output_tensors, "output_tensors", size, write=True)
    source = as_buffer(input_tensor, "input_tensor", write=False)
    _alike(outputs[0], "output_tensors[0]", source, "input_tensor")
    if outputs[rank].count != source.count:
        raise InvalidCallError(
            f"output_tensors[{rank}] must have as many elements as this rank's input_tensor, "
            f"{source.count}, but has {outputs[rank].count}"
        )
    recv = Blocks.each(outputs)
    call = Call(
        kinds.ALLGATHER,
        Blocks.single(source),
        recv,
        count=_even(recv.counts),
        digest=digest(*recv.counts),
        outputs=tuple(b.owner for b in outputs),
    )
    return separate(call, rank, _named("output_tensors", outputs), [("input_tensor", source)])


def all_gather_single(rank: int, size: int, output: object, source: object) -> Call:
    into = as_buffer(output, "output", write=True)
    taken = as_buffer(source, "input", write=False)
    _alike(into, "output", taken, "input")
    if into.count != size * taken.count:
        raise InvalidCallError(
            f"output must have {size} x {taken.count} = {size * taken.count} elements "
            f"(the group's size times input's), but has {into.count}; for inputs of several sizes "
            "there is allgather"
        )
    call = Call(
        kinds.ALL_GATHER_SINGLE,
        Blocks.single(taken),
        Blocks.split(into, (taken.count,) * size),
        count=taken.count,
        outputs=(output,),
    )
    return separate(call, rank, [("output", into)], [("input", taken)])


def gather(
    rank: int, size: int, output_tensors: object, input_tensor: object, root: object
) -> Call:
    root = rank_in(root, "root", size)
    source = as_buffer(input_tensor, "input_tensor", write=False)
    if rank != root:  # its list is not looked at
        return Call(kinds.GATHER, Blocks.single(source), root=root, count=source.count)
    outputs = _buffers(output_tensors, "output_tensors", size, write=True)
    _alike(outputs[0], "output_tensors[0]", source, "input_tensor")
    if outputs[rank].count != source.count:
        raise InvalidCallError(
            f"output_tensors[{rank}] must have as many elements as the root's own input_tensor, "
            f"{source.count}, but has {outputs[rank].count}"
        )
    recv = Blocks.each(outputs)
    call = Call(
        kinds.GATHER,
        Blocks.single(source),
        recv,
        root=root,
        count=_even(recv.counts),
        outputs=tuple(b.owner for b in outputs),
    )
    return separate(call, rank, _named("output_tensors", outputs), [("input_tensor", source)])


def scatter(
    rank: int, size: int, output_tensor: object, input_tensors: object, root: object
) -> Call:
    root = rank_in(root, "root", size)
    into = as_buffer(output_tensor, "output_tensor", write=True)
    if rank != root:  # its list is not looked at
        return Call(
            kinds.SCATTER,
            None,
            Blocks.single(into),
            root=root,
            count=into.count,
            outputs=(output_tensor,),
        )
    sources = _buffers(input_tensors, "input_tensors", size, write=False)
    _alike(into, "output_tensor", sources[0], "input_tensors[0]")
    if sources[rank].count != into.count:
        raise InvalidCallError(
            f"input_tensors[{rank}] must have as many elements as the root's own output_tensor, "
            f"{into.count}, but has {sources[rank].count}"
        )
    send = Blocks.each(sources)
    call = Call(
        kinds.SCATTER,
        send,
        Blocks.single(into),
        root=root,
        count=_even(send.counts),
        outputs=(output_tensor,),
    )
    return separate(call, rank, [("output_tensor", into)], _named("input_tensors", sources))


def reduce_scatter(rank: int, size: int, output: object, source: object, op: object) -> Call:
    into = as_buffer(output, "output", write=True)
    sources = _buffers(source, "input", size, write=False)
    _alike(into, "output", sources[0], "input[0]")
    if sources[rank].count != into.count:
        raise InvalidCallError(
            f"input[{rank}] must have as many elements as this rank's output, {into.count}, "
            f"but has {sources[rank].count}"
        )
    send = Blocks.each(sources)
    call = Call(
        kinds.REDUCE_SCATTER,
        send,
        Blocks.single(into),
        count=_even(send.counts),
        digest=digest(*send.counts),
        outputs=(output,),
    )
    separate(call, rank, [("output", into)], _named("input", sources))
    return _reducing(call, op, size)


def reduce_scatter_single(rank: int, size: int, output: object, source: object, op: object) -> Call:
    into = as_buffer(output, "output", write=True)
    taken = as_buffer(source, "input", write=False)
    _alike(into, "output", taken, "input")
    if taken.count != size * into.count:
        raise InvalidCallError(
            f"input must have {size} x {into.count} = {size * into.count} elements "
            f"(the group's size times output's), but has {taken.count}; for outputs of several "
            "sizes there is reduce_scatter"
        )
    call = Call(
        kinds.REDUCE_SCATTER_SINGLE,
        Blocks.split(taken, (into.count,) * size),
        Blocks.single(into),
        count=into.count,
        outputs=(output,),
    )
    separate(call, rank, [("output", into)], [("input", taken)])
    return _reducing(call, op, size)


def alltoall(rank: int, size: int, output_tensors: object, input_tensors: object) -> Call:
    outputs = _buffers(output_tensors, "output_tensors", size, write=True)
    sources = _buffers(input_tensors, "input_tensors", size, write=False)
    _alike(outputs[0], "output_tensors[0]", sources[0], "input_tensors[0]")
    send, recv = Blocks.each(sources), Blocks.each(outputs)
    if send.counts[rank] != recv.counts[rank]:
        raise InvalidCallError(
            f"output_tensors[{rank}] must have as many elements as input_tensors[{rank}], "
            f"{send.counts[rank]}, but has {recv.counts[rank]}"
        )
    call = Call(
        kinds.ALLTOALL,
        send,
        recv,
        count=_even(send.counts + recv.counts),
        outputs=tuple(b.owner for b in outputs),
    )
    writes, reads = _named("output_tensors", outputs), _named("input_tensors", sources)
    return separate(call, rank, writes, reads)


def all_to_all_single(
    rank: int,
    size: int,
    output: object,
    source: object,
    output_split_sizes: object,
    input_split_sizes: object,
) -> Call:
    into = as_buffer(output, "output", write=True)
    taken = as_buffer(source, "input", write=False)
    _alike(into, "output", taken, "input")
    out_row, out_counts = _splits(into, output_split_sizes, "output", size)
    in_row, in_counts = _splits(taken, input_split_sizes, "input", size)
    if out_row != in_row and into.count and taken.count:
        raise InvalidCallError(
            "output and input must have rows of one size (elements per entry of dimension 0), "
            f"but have {out_row} and {in_row}"
        )
    if out_counts[rank] != in_counts[rank]:
        raise InvalidCallError(
            f"output_split_sizes[{rank}] must equal input_split_sizes[{rank}], what this rank "
            f"sends itself: {in_counts[rank]} elements against {out_counts[rank]}"
        )
    call = Call(
        kinds.ALL_TO_ALL_SINGLE,
        Blocks.split(taken, in_counts),
        Blocks.split(into, out_counts),
        count=_even(in_counts + out_counts),
        outputs=(output,),
    )
    return separate(call, rank, [("output", into)], [("input", taken)])


def _splits(buffer: Buffer, sizes: object, side: str, size: int) -> tuple[int, tuple[int, ...]]:
    """Return elements per row, and elements per peer, of one side of all_to_all_single."""
    name = f"{side}_split_sizes"
    if not buffer.shape:
        raise InvalidCallError(f"{side} must have a dimension 0 to split, but is 0-dimensional")
    rows = buffer.shape[0]
    row = 1
    for extent in buffer.shape[1:]:
        row *= extent
    if sizes is None or (isinstance(sizes, (list, tuple)) and not sizes):
        if rows % size:
            raise InvalidCallError(
                f"{side} has {rows} rows, which {size} ranks can't share equally: give {name}"
            )
        return row, (rows // size * row,) * size
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Iterable):
        raise InvalidCallError(f"{name} must be a list of integers, but got {sizes!r}")
    given = [integer(n, f"{name}[{i}]") for i, n in enumerate(sizes)]
    if len(given) != size:
        raise InvalidCallError(
            f"{name} must have {size} entries, one per rank, but has {len(given)}"
        )
    for i, n in enumerate(given):
        if n < 0:
            raise InvalidCallError(f"{name}[{i}] must not be negative, but is {n}")
    if sum(given) != rows:
        raise InvalidCallError(
            f"{name} must add up to {side}'s {rows} rows, but adds up to {sum(given)}"
        )
    return row, tuple(n * row for n in given)


def coalesced(kind: Kind, parts: Sequence[Call], names: str, in_names: str = "") -> Call:
    """Bundle checked calls of one kind into one; `in_names` is the argument that they read."""
    if not parts:
        raise InvalidCallError(f"{names} must hold at least one array, but is empty")
    reads: list[tuple[str, Buffer]] = []
    writes: list[tuple[str, Buffer]] = []
    numbers: list[int] = []
    for i, part in enumerate(parts):
        assert part.dtype is not None and part.send is not None and part.recv is not None
        sent, got = part.send, part.recv
        if part.in_place:  # the one is a part of the other
            whole = (in_names, sent) if sent.total > got.total else (names, got)
            writes += [(f"{whole[0]}[{i}]", b) for b in whole[1].buffers]
        else:
            writes += [(f"{names}[{i}]", b) for b in got.buffers]
            if sent is not got:
                reads += [(f"{in_names}[{i}]", b) for b in sent.buffers]
        if _apart(parts[0].device, part.device):
            raise InvalidCallError(
                f"{names}[0] and {names}[{i}] must lie in the same memory, but are "
                f"{_place(parts[0].device)} and {_place(part.device)}: copy one of them, or make "
                "a call for each"
            )
        numbers += [part.dtype.code, part.count, part.digest]
    found = overlap(used_by(writes, write=True) + used_by(reads, write=False))
    if found:
        raise refusal(found, writes + reads)
    return Call(
        kind,
        parts=tuple(parts),
        op=parts[0].op,
        count=len(parts),
        digest=digest(*numbers),
        outputs=tuple(out for part in parts for out in part.outputs),
    )


def several(value: object, name: str) -> Sequence[object]:
    """Return the list argument of a coalesced call."""
    if not isinstance(value, (list, tuple)):
        raise InvalidCallError(
            f"{name} must be a list, but got {type(value).__name__}: for one array pass [{name}]"
        )
    return value


def pairs(outputs: object, inputs: object, out_name: str, in_name: str) -> list[tuple[Any, Any]]:
    """Return the outputs and inputs of a coalesced call, two by two."""
    outs, ins = several(outputs, out_name), several(inputs, in_name)
    if len(outs) != len(ins):
        raise InvalidCallError(
            f"{out_name} and {in_name} must have one length, but have {len(outs)} and {len(ins)}"
        )
    return list(zip(outs, ins, strict=True))


def transposed(lists: object, size: int, each: int) -> list[list[Any]]:
    """Return allgather_coalesced's outputs, one list per rank, as one list per input."""
    found = several(lists, "output_lists")
    if len(found) != size:
        raise InvalidCallError(
            f"output_lists must have {size} lists, one per rank, but has {len(found)}"
        )
    rows = [several(row, f"output_lists[{i}]") for i, row in enumerate(found)]
    for i, row in enumerate(rows):
        if len(row) != each:
            raise InvalidCallError(
                f"output_lists[{i}] must have {each} arrays, one per entry of input_list, "
                f"but has {len(row)}"
            )
    return [[row[k] for row in rows] for k in range(each)]


def empty(shape: object, dtype: object) -> Call:
    """Check the arguments of `empty`; the call's count is in bytes, its payload shape and dtype."""
    extents = shape if isinstance(shape, (list, tuple)) else (shape,)
    sides = tuple(integer(n, f"shape[{i}]") for i, n in enumerate(extents))
    if min(sides, default=0) < 0:
        raise InvalidCallError(f"shape must not have negative extents, but is {sides}")
    try:
        kind = np.dtype(dtype)  # type: ignore[call-overload]
    except TypeError:
        raise InvalidCallError(f"dtype must be a NumPy dtype, but got {dtype!r}") from None
    code = from_numpy(kind, "dtype").code
    nbytes = math.prod(sides) * kind.itemsize
    if nbytes > settings.memory():
        raise InvalidCallError(
            f"shape {sides} of {kind} takes {nbytes} bytes, but this machine has "
            f"{settings.memory()} bytes of memory"
        )
    return Call(kinds.EMPTY, count=nbytes, digest=digest(code), payload=Shape(sides, kind))


def send(size: int, highest_tag: int, tensor: object, dst: object, tag: object) -> Call:
    buffer = as_buffer(tensor, "tensor", write=False)
    return Call(
        kinds.SEND,
        Blocks.single(buffer),
        peer=_peer(dst, "dst", size),
        tag=_tag(tag, highest_tag),
        count=buffer.count,
        outputs=(tensor,),
    )


def recv(size: int, highest_tag: int, tensor: object, src: object, tag: object) -> Call:
    buffer = as_buffer(tensor, "tensor", write=True)
    return Call(
        kinds.RECV,
        None,
        Blocks.single(buffer),
        peer=_peer(src, "src", size),
        tag=_tag(tag, highest_tag),
        count=buffer.count,
        outputs=(tensor,),
    )


def probe(size: int, highest_tag: int, src: object, tag: object) -> tuple[int, int]:
    """Check the arguments of `probe`; return peer and tag as they are in a `Call`."""
    return _peer(src, "src", size), _tag(tag, highest_tag)


def object_call(kind: Kind, rank: int, size: int, obj: object, root: object | None = None) -> Call:
    """Check an object collective; `obj` is pickled here, on the ranks that give one.

    Where the compiled core has pickled it before it left the call to the general way, it is given
    as `Pieces`.
    """
    at = rank_in(root, "root", size) if kind.from_root or kind.to_root else -1
    call = Call(kind, root=at)
    if isinstance(obj, Pieces):
        call.payload = obj
    elif kind.parted:
        if rank == at:
            if not isinstance(obj, (list, tuple)) or len(obj) != size:
                raise InvalidCallError(
                    f"objs must be a list of {size} objects, one per rank, on the root; got "
                    f"{type(obj).__name__}"
                    + (f" of {len(obj)}" if isinstance(obj, (list, tuple)) else "")
                )
            call.payload = Pieces([_pickled(x) for x in obj])
    elif not kind.from_root or rank == at:
        call.payload = Pieces([_pickled(obj)])
    if isinstance(call.payload, Pieces):
        call.extent = call.payload.extent
    return call


def _pickled(obj: object) -> bytes:
    try:
        return pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        if interrupts(error):
            raise
        raise InvalidCallError(
            f"obj of type {type(obj).__name__} can't be pickled: {error}"
        ) from error


def excluded(rank: int, size: int, ranks: object) -> tuple[int, ...]:
    """Check the argument of shrink_group: ranks of the group, this one not among them."""
    if isinstance(ranks, (str, bytes)) or not isinstance(ranks, Iterable):
        raise InvalidCallError(f"ranks_to_exclude must be a list of ranks, but got {ranks!r}")
    given = {rank_in(r, f"ranks_to_exclude[{i}]", size) for i, r in enumerate(ranks)}
    if rank in given:
        raise InvalidCallError(
            f"ranks_to_exclude is {sorted(given)}, and this is rank {rank}: only those that stay "
            "call shrink_group"
        )
    return tuple(sorted(given))


def members(rank: int, size: int, ranks: object) -> Members:
    """Check the argument of subgroup: distinct ranks of the group, this one among them."""
    given = split_ranks(size, ranks)
    if rank not in given.ranks:
        raise InvalidCallError(
            f"ranks is {list(given.ranks)}, and this is rank {rank}: only the members of the new "
            "group call subgroup; in split_group all ranks call"
        )
    return given


def split_ranks(size: int, ranks: object) -> Members:
    """Check the argument of split_group: distinct ranks of the group; none: to be in no group."""
    if isinstance(ranks, (str, bytes)) or not isinstance(ranks, Iterable):
        raise InvalidCallError(f"ranks must be a list of ranks, but got {ranks!r}")
    given = tuple(rank_in(r, f"ranks[{i}]", size) for i, r in enumerate(ranks))
    if len(set(given)) != len(given):
        raise InvalidCallError(f"ranks must not name a rank twice, but is {list(given)}")
    return Members(given)
