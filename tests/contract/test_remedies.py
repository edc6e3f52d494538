"""What an error text tells the user to do is done, to the letter, and gives what he wanted.

Each case is source code over the arguments' own names: the call that is refused, pieces of the
remedy that must stand in the error's text, and a program that follows it.  A piece that is code
must stand in that program, too, as it is.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mpicoll as mc
from mpicoll.errors import CollectiveMismatchError, InvalidCallError, UnsupportedError
from tests.contract.arrays import BFLOAT16, reduced

pytestmark = pytest.mark.mpi


@dataclass
class Case:
    """One refusal.

    Attributes:
        call: what is refused.
        code: pieces of the remedy, in the text and in `follow`.
        follow: what the user then does.
        have: what is true afterwards.
        given: makes the names that the code uses; `n` ranks, of which this is `me`.
        words: what else the text says.
        ranks: how many it takes at least.
    """

    call: str
    code: tuple[str, ...]
    follow: str
    have: str
    given: str = ""
    words: tuple[str, ...] = ()
    ranks: int = 1


def reduce_by(given: str, code: tuple[str, ...], have: str, **more: Any) -> Case:
    """An allreduce of `tensor` that is refused; what is passed instead is `y`."""
    made = next(piece for piece in code if piece.startswith("y = "))
    back = [piece for piece in code if piece.endswith(("[...] = y", "copy_(y)"))]
    follow = "\n".join([made, "pg.allreduce(y).wait()", *back])
    return Case("pg.allreduce(tensor)", code, follow, have, given, **more)


BACK = "tensor[...] = y"
ARRAYS = {
    "strided": reduce_by(
        "whole = np.full((4, 4), me + 1.0); tensor = whole[:, ::2]",
        ("y = np.ascontiguousarray(tensor)", BACK),
        "(whole[:, ::2] == total).all() and (whole[:, 1::2] == me + 1).all()",
    ),
    "reversed": reduce_by(
        "whole = np.arange(4.0) + me; tensor = whole[::-1]",
        ("y = np.ascontiguousarray(tensor)", BACK),
        "(whole == np.arange(4) * n + total - n).all()",
    ),
    "Fortran": reduce_by(
        "tensor = np.asfortranarray(np.full((3, 4), me + 1.0))",
        ("y = np.ascontiguousarray(tensor)", BACK),
        "(tensor == total).all()",
    ),
    "Fortran, all of them": Case(
        "pg.allreduce(tensor)",
        ("tensor.T",),
        "pg.allreduce(tensor.T).wait()",
        "(tensor == np.arange(12.0).reshape(3, 4) * n).all()",
        "tensor = np.asfortranarray(np.arange(12.0).reshape(3, 4))",
    ),
    "strided memoryview": reduce_by(
        "tensor = memoryview(bytearray([me + 1] * 8))[::2]",
        ("y = np.ascontiguousarray(np.asarray(tensor))", "np.asarray(tensor)[...] = y"),
        "bytes(tensor) == bytes([total] * 4)",
    ),
    "strided, by its interface": reduce_by(
        "array = np.full((4, 4), me + 1.0)[:, 1]; tensor = Interface(array)",
        ("y = np.ascontiguousarray(np.asarray(tensor))", "np.asarray(tensor)[...] = y"),
        "(array == total).all()",
    ),
    "read-only": reduce_by(
        "tensor = locked(np.full(4, me + 1.0))",
        ('y = np.array(tensor, order="C")',),
        "(y == total).all()",
        words=("take the result from y",),
    ),
    "read-only, Fortran": reduce_by(
        "tensor = locked(np.asfortranarray(np.full((3, 4), me + 1.0)))",
        ('y = np.array(tensor, order="C")',),
        "y.shape == (3, 4) and (y == total).all()",
    ),
    "broadcast": reduce_by(
        "tensor = np.broadcast_to(me + 1.0, (4,))",
        ('y = np.array(tensor, order="C")',),
        "(y == total).all()",
    ),
    "read-only, by DLPack": reduce_by(
        "tensor = Capsule(locked(np.full(4, me + 1.0)))",
        ('y = np.array(np.from_dlpack(tensor), order="C")',),
        "(y == total).all()",
    ),
    "bytes": reduce_by(
        "tensor = bytes([me + 1] * 5)",
        ("y = bytearray(tensor)",),
        "y == bytearray([total] * 5)",
        words=("take the result from y",),
    ),
    "masked": Case(
        "pg.allreduce(tensor)",
        ("y = tensor.filled(value)", BACK),
        "value = 0\ny = tensor.filled(value)\npg.allreduce(y).wait()\ntensor[...] = y",
        "tensor.tolist() == [0, total]",
        "tensor = np.ma.masked_array([7, me + 1], mask=[True, False])",
    ),
    "masked, with all of its data": Case(
        "pg.allreduce(tensor)",
        ("tensor.data",),
        "pg.allreduce(tensor.data).wait()",
        "tensor.tolist() == [None, total] and tensor.data[0] == 7 * n",
        "tensor = np.ma.masked_array([7, me + 1], mask=[True, False])",
    ),
    "list of numbers": reduce_by(
        "tensor = [1.0, me + 1.0]",
        ("y = np.array(tensor)",),
        "y.tolist() == [n, total]",
        words=("take the result from y",),
    ),
    "list of one number": reduce_by(
        "tensor = [me + 1]", ("y = np.array(tensor)",), "y.tolist() == [total]"
    ),
    "list of lists": reduce_by(
        "tensor = [[1, 2], [3, 4]]",
        ("y = np.array(tensor)",),
        "y.tolist() == [[n, 2*n], [3*n, 4*n]]",
    ),
    "list of arrays": reduce_by(
        "tensor = [np.full(3, me + 1), np.zeros(3, int)]",
        ("y = np.array(tensor)",),
        "y.tolist() == [[total] * 3, [0] * 3]",
    ),
    "scalar": reduce_by("tensor = me + 1.0", ("y = np.array(tensor)",), "y == total"),
    "NumPy's scalar": reduce_by(
        "tensor = np.float32(me + 1)", ("y = np.array(tensor)",), "y == total and y.dtype == 'f4'"
    ),
    "bool": reduce_by("tensor = me == 0", ("y = np.array(tensor)",), "y == True"),
    "None": Case(
        "pg.broadcast(tensor, 0)",
        ("y = np.empty(shape, dtype)",),
        "shape, dtype = (3,), 'f4'\ny = np.empty(shape, dtype)\nif me == 0: y[...] = 7\n"
        "pg.broadcast(y, 0).wait()",
        "(y == 7).all()",
        "tensor = None",
    ),
    "None, to be an object": Case(
        "pg.broadcast(tensor, 0)",
        ("broadcast_object",),
        "y = pg.broadcast_object({1: 2} if me == 0 else tensor, 0)",
        "y == {1: 2}",
        "tensor = None",
    ),
    **{
        f"object {text}": Case(
            "pg.broadcast(tensor, 0)",
            ("broadcast_object",),
            "y = pg.broadcast_object(tensor, 0)",
            "repr(y) == repr(tensor)",
            f"tensor = {text}",
        )
        for text in (
            *("'text'", "{1: 2}", "[[1], [1, 2]]", "[None, 'a']", "np.array([None, 'a'])"),
            *("np.zeros(2, [('a', 'f4'), ('b', 'O')])", "np.array(['a'], np.dtypes.StringDType())"),
        )
    },
    "swapped": reduce_by(
        "tensor = np.full(3, me + 1, '>i4')",
        ("y = tensor.astype(tensor.dtype.newbyteorder('='))", BACK),
        "tensor.tolist() == [total] * 3 and tensor.dtype == '>i4'",
    ),
    "swapped structure": Case(
        "pg.recv(tensor, me)",
        ("y = tensor.astype(tensor.dtype.newbyteorder('='))", BACK),
        "sent = pg.send(np.full(3, me + 1, [('a', '=f4'), ('b', '=i2')]), me)\n"
        "y = tensor.astype(tensor.dtype.newbyteorder('='))\n"
        "pg.recv(y, me).wait()\nsent.wait()\ntensor[...] = y",
        "tensor['a'].tolist() == tensor['b'].tolist() == [me + 1] * 3",
        "tensor = np.zeros(3, [('a', '>f4'), ('b', '>i2')])",
    ),
    "unknown to us": Case(
        "pg.broadcast(tensor, 0)",
        ("tensor.view(np.uint8)",),
        "pg.broadcast(tensor.view(np.uint8), 0).wait()",
        "(tensor.view('u4') == 5).all()",
        "tensor = np.full(3, 5 + me, 'u4').view(ml_dtypes.complex32)",
    ),
    "strided input": Case(
        "pg.all_gather_single(output, input)",
        ("np.ascontiguousarray(input)",),
        "pg.all_gather_single(output, np.ascontiguousarray(input)).wait()",
        "output.tolist() == [[r] * 3 for r in range(n)]",
        "output, input = np.zeros((n, 3)), np.full((3, 3), float(me))[:, 1]",
    ),
    "swapped input": Case(
        "pg.all_gather_single(output, input)",
        ("input.astype(input.dtype.newbyteorder('='))",),
        "pg.all_gather_single(output, input.astype(input.dtype.newbyteorder('='))).wait()",
        "output.tolist() == list(range(n))",
        "output, input = np.zeros(n), np.full(1, me, '>f8')",
    ),
    "scalar input": Case(
        "pg.all_gather_single(output, input)",
        ("np.array(input)",),
        "pg.all_gather_single(output, np.array(input)).wait()",
        "output.tolist() == list(range(n))",
        "output, input = np.zeros(n, int), me",
    ),
    "masked input": Case(
        "pg.all_gather_single(output, input)",
        ("input.filled(value)",),
        "value = 5\npg.all_gather_single(output, input.filled(value)).wait()",
        "output.tolist() == [5] * n",
        "output, input = np.zeros(n, int), np.ma.masked_array([me], mask=[True])",
    ),
}


def gathered(dtype: str, value: str, op: str, follow: str, have: str) -> Case:
    """A reduction of what only moves: it is gathered, and NumPy reduces it."""
    return Case(
        f"pg.allreduce(tensor, mc.ReduceOp.{op})",
        ("allgather",),
        "outputs = [np.empty_like(tensor) for _ in range(n)]\n"
        f"pg.allgather(outputs, tensor).wait()\n{follow}",
        have,
        f"tensor = np.full(3, {value}, {dtype})",
        ("by NumPy",),
    )


def reduction(op: str, given: str, follow: str, have: str, *words: str) -> Case:
    return Case(f"pg.allreduce(tensor, mc.ReduceOp.{op})", (), follow, have, given, words)


REDUCTIONS = {
    "AVG of integers": reduction(
        "AVG",
        "tensor = np.full(3, me + 1)",
        "y = tensor.astype('f8')\npg.allreduce(y, mc.ReduceOp.AVG).wait()",
        "np.allclose(y, total / n)",
        "cast to a float dtype",
    ),
    "AVG of integers by SUM": reduction(
        "AVG",
        "tensor = np.full(3, me + 1)",
        "pg.allreduce(tensor, mc.ReduceOp.SUM).wait()\ny = tensor / n",
        "np.allclose(y, total / n)",
        "use SUM and divide by the ranks",
    ),
    "AVG of bool": reduction(
        "AVG",
        "tensor = np.array([True, me == 0])",
        "y = tensor.astype('f4')\npg.allreduce(y, mc.ReduceOp.AVG).wait()",
        "np.allclose(y, [1, 1 / n])",
        "cast to a float dtype first",
    ),
    "PREMUL_SUM of integers": reduction(
        "PREMUL_SUM(3)",
        "tensor = np.full(3, me + 1)",
        "tensor *= 3\npg.allreduce(tensor, mc.ReduceOp.SUM).wait()",
        "(tensor == 3 * total).all()",
        "multiply first and use SUM",
    ),
    "PREMUL_SUM of integers, cast": reduction(
        "PREMUL_SUM(0.5)",
        "tensor = np.full(3, me + 1)",
        "y = tensor.astype('f8')\npg.allreduce(y, mc.ReduceOp.PREMUL_SUM(0.5)).wait()",
        "(y == total / 2).all()",
        "cast to a float dtype",
    ),
    "PREMUL_SUM of bool": reduction(
        "PREMUL_SUM(0.5)",
        "tensor = np.array([True, me == 0])",
        "y = tensor.astype('f4')\npg.allreduce(y, mc.ReduceOp.PREMUL_SUM(0.5)).wait()",
        "y.tolist() == [n / 2, 0.5]",
        "cast to a float dtype first",
    ),
    **{
        f"BOR of {dtype}": reduction(
            "BOR",
            f"bits = np.frombuffer(bytes([1 << me] * 64), np.uint8).copy(); "
            f"tensor = bits.view({dtype})",
            "pg.allreduce(tensor.view(np.uint8), mc.ReduceOp.BOR).wait()",
            "(bits == 2**n - 1).all()",
            "a view as integers, of which uint8 fits",
        )
        for dtype in ("'f4'", "'c16'", "'g'", "BFLOAT16")
    },
    "MAX of complex numbers": reduction(
        "MAX",
        "tensor = np.full(3, (me + 1) * 1j)",
        "y = np.abs(tensor)\npg.allreduce(y, mc.ReduceOp.MAX).wait()",
        "(y == n).all()",
        "reduce abs(x)",
    ),
    "MAX of complex numbers, by parts": reduction(
        "MAX",
        "tensor = np.full(3, me + 1 - me * 1j)",
        "y, z = tensor.real.copy(), tensor.imag.copy()\n"
        "pg.allreduce(y, mc.ReduceOp.MAX).wait()\npg.allreduce(z, mc.ReduceOp.MAX).wait()",
        "(y == n).all() and (z == 0).all()",
        "copies of x.real and x.imag",
    ),
    "MAX of longdouble": reduction(
        "MAX",
        "tensor = np.full(3, me + 1, 'g')",
        "y = tensor.astype('f8')\npg.allreduce(y, mc.ReduceOp.MAX).wait()\ntensor[...] = y",
        "(tensor == n).all()",
        "cast to float64, reduce that, and cast back",
    ),
    "SUM of float8": reduction(
        "SUM",
        "tensor = np.full(3, 1, ml_dtypes.float8_e4m3fn)",
        "y = tensor.astype('f4')\npg.allreduce(y).wait()\ntensor[...] = y",
        "(tensor.astype('f4') == n).all()",
        "cast to float32, reduce that, and cast back",
    ),
    "a complex factor": reduction(
        "PREMUL_SUM(1j)",
        "tensor = np.full(3, me + 1.0)",
        "y = tensor.astype('c16')\npg.allreduce(y, mc.ReduceOp.PREMUL_SUM(1j)).wait()",
        "(y == total * 1j).all()",
        "cast to a complex dtype",
    ),
    "too large a factor": reduction(
        "PREMUL_SUM(1e300)",
        "tensor = np.full(3, 1, 'f4')",
        "y = tensor.astype('f8')\npg.allreduce(y, mc.ReduceOp.PREMUL_SUM(1e300)).wait()",
        "np.allclose(y, n * 1e300)",
        "cast to a wider dtype",
    ),
    "AVG in a scan": Case(
        "pg.scan(tensor, mc.ReduceOp.AVG)",
        (),
        "pg.scan(tensor, mc.ReduceOp.SUM).wait()\ntensor /= me + 1",
        "(tensor == (me + 2) / 2).all()",
        "tensor = np.full(3, me + 1.0)",
        ("use ReduceOp.SUM, then divide",),
    ),
    "SUM of durations": gathered(
        "'m8[s]'",
        "me + 1",
        "SUM",
        "y = np.sum(outputs, axis=0)",
        "(y == np.timedelta64(total)).all()",
    ),
    "AVG of dates": gathered(
        "'M8[s]'",
        "1000 * me",
        "AVG",
        "first = outputs[0]\ny = first + np.mean(np.stack(outputs) - first, axis=0)",
        "(y == np.datetime64(500 * (n - 1), 's')).all()",
    ),
    "MIN of strings": gathered(
        "'U5'", "f'r{me}'", "MIN", "y = np.sort(np.stack(outputs), axis=0)[0]", "(y == 'r0').all()"
    ),
    "SUM of a field": gathered(
        "[('a', 'f4'), ('b', 'i4')]",
        "me + 1",
        "SUM",
        "y = sum(out['a'] for out in outputs)",
        "(y == total).all()",
    ),
    "no operator": Case(
        "pg.allreduce(tensor, 'SUM')",
        ("ReduceOp.SUM",),
        "pg.allreduce(tensor, mc.ReduceOp.SUM).wait()",
        "(tensor == total).all()",
        "tensor = np.full(3, me + 1)",
    ),
    "no factor": Case(
        "pg.allreduce(tensor, mc.ReduceOp.PREMUL_SUM(True))",
        ("ReduceOp.PREMUL_SUM(0.5)",),
        "pg.allreduce(tensor, mc.ReduceOp.PREMUL_SUM(0.5)).wait()",
        "(tensor == total / 2).all()",
        "tensor = np.full(3, me + 1.0)",
    ),
}

CALLS = {
    "input that overlaps": Case(
        "pg.all_gather_single(output, input)",
        ("input.copy()",),
        "pg.all_gather_single(output, input.copy()).wait()",
        "output.tolist() == [v for r in range(n) for v in (r, r)]",
        "x = np.full(2 * n + 1, float(me)); output, input = x[:-1], x[1:3]",
    ),
    "output that overlaps": Case(
        "pg.reduce_scatter_single(output, input)",
        ("input.copy()",),
        "pg.reduce_scatter_single(output, input.copy()).wait()",
        "(output == total).all()",
        "x = np.full(2 * n + 1, me + 1.0); output, input = x[1:3], x[:-1]",
    ),
    "outputs that overlap": Case(
        "pg.allreduce_coalesced(tensors)",
        ("y = tensors[1].copy()",),
        "y = tensors[1].copy()\npg.allreduce_coalesced([tensors[0], y]).wait()",
        "(tensors[0] == total).all() and (y == total).all()",
        "x = np.full(5, me + 1.0); tensors = [x[:3], x[2:]]",
        ("take the result from y",),
    ),
    "memoryview that overlaps": Case(
        "pg.all_gather_single(output, input)",
        ("np.array(input)",),
        "pg.all_gather_single(output, np.array(input)).wait()",
        "list(output) == [v for r in range(n) for v in (r, r)]",
        "x = memoryview(bytearray([me] * (2 * n + 1))); output, input = x[:-1], x[1:3]",
    ),
    "coalesced input that overlaps another's output": Case(
        "pg.all_gather_single_coalesced(outputs, inputs)",
        ("inputs[0].copy()",),
        "pg.all_gather_single_coalesced(outputs, [inputs[0].copy(), inputs[1]]).wait()",
        "[x.tolist() for x in outputs] == [[v for r in range(n) for v in (r, r)]] * 2",
        "x, y, z = (np.full(2 * n, float(me)) for _ in range(3)); "
        "outputs, inputs = [x, y], [y[:2], z[:2]]",
    ),
    "input of another dtype": Case(
        "pg.all_gather_single(output, input)",
        ("input.astype(output.dtype)",),
        "pg.all_gather_single(output, input.astype(output.dtype)).wait()",
        "output.tolist() == list(range(n))",
        "output, input = np.zeros(n, 'f4'), np.full(1, me, 'i8')",
    ),
    "other input of another dtype": Case(
        "pg.reduce_scatter_single(output, input)",
        ("np.array(input, dtype=output.dtype)",),
        "pg.reduce_scatter_single(output, np.array(input, dtype=output.dtype)).wait()",
        "output.tolist() == [n * me]",
        "import array; output, input = np.zeros(1, 'i4'), array.array('d', range(n))",
    ),
    "scattered inputs of another dtype": Case(
        "pg.scatter(output_tensor, input_tensors, me)",
        ("input_tensors[0].astype(output_tensor.dtype)",),
        "converted = [input_tensors[0].astype(output_tensor.dtype)]\n"
        "converted += [x.astype(output_tensor.dtype) for x in input_tensors[1:]]\n"
        "pg.scatter(output_tensor, converted, 0).wait()",
        "output_tensor == me",
        "output_tensor = np.zeros(1, 'f4'); input_tensors = [np.full(1, r) for r in range(n)]",
    ),
    "outputs of two dtypes": Case(
        "pg.allgather(output_tensors, input_tensor)",
        ("y = output_tensors[1].astype(output_tensors[0].dtype)", "output_tensors[1][...] = y"),
        "y = output_tensors[1].astype(output_tensors[0].dtype)\n"
        "pg.allgather([output_tensors[0], y, *output_tensors[2:]], input_tensor).wait()\n"
        "output_tensors[1][...] = y",
        "[x.tolist() for x in output_tensors] == [[r] for r in range(n)]",
        "output_tensors = [np.zeros(1, 'f8' if r == 1 else 'f4') for r in range(n)]; "
        "input_tensor = np.full(1, me, 'f4')",
        ranks=2,
    ),
    "no list of arrays": Case(
        "pg.allgather(output_tensors, input_tensor)",
        (),
        "pg.allgather(np.frombuffer(output_tensors, np.uint8), input_tensor).wait()",
        "output_tensors == bytearray(range(n))",
        "output_tensors, input_tensor = bytearray(n), np.full(1, me, np.uint8)",
        ("a NumPy array or tensor of", "rows"),
    ),
    "one array to coalesce": Case(
        "pg.allreduce_coalesced(tensors)",
        ("[tensors]",),
        "pg.allreduce_coalesced([tensors]).wait()",
        "(tensors == total).all()",
        "tensors = np.full(3, me + 1)",
    ),
    "rows that don't divide": Case(
        "pg.all_to_all_single(output, input)",
        ("output_split_sizes",),
        "sizes = [n + 1 if r == me else 0 for r in range(n)]\n"
        "pg.all_to_all_single(output, input, output_split_sizes=sizes, input_split_sizes=sizes)"
        ".wait()",
        "(output == me).all()",
        "output, input = np.zeros(n + 1), np.full(n + 1, float(me))",
        ranks=2,
    ),
    "a negative rank for nobody": Case(
        "pg.recv(tensor, me - 1 if me == 0 else -1)",
        ("mpicoll.PROC_NULL",),
        "import mpicoll\npg.recv(tensor, mpicoll.PROC_NULL).wait()",
        "(tensor == 5).all()",
        "tensor = np.full(3, 5)",
    ),
    "a negative rank for anybody": Case(
        "pg.recv(tensor, -1)",
        ("mpicoll.ANY_SOURCE",),
        "import mpicoll\nsent = pg.send(np.full(3, me), (me + 1) % n)\n"
        "pg.recv(tensor, mpicoll.ANY_SOURCE).wait()\nsent.wait()",
        "(tensor == (me - 1) % n).all()",
        "tensor = np.full(3, 5)",
    ),
    # Of sizes such that no rank's call is right by itself.
    "inputs of several sizes": Case(
        "pg.all_gather_single(output, input)",
        ("allgather",),
        "output_tensors = np.split(output, np.cumsum(sizes[:-1]))\n"
        "pg.allgather(output_tensors, input).wait()",
        "output.tolist() == [r for r in range(n) for _ in range(sizes[r])]",
        "sizes = [r * r + 1 for r in range(n)]; "
        "output, input = np.zeros(sum(sizes)), np.full(sizes[me], float(me))",
        ranks=2,
    ),
    "outputs of several sizes": Case(
        "pg.reduce_scatter_single(output, input)",
        ("reduce_scatter",),
        "pg.reduce_scatter(output, np.split(input, np.cumsum(sizes[:-1]))).wait()",
        "output.tolist() == [n * me] * sizes[me]",
        "sizes = [r * r + 1 for r in range(n)]; "
        "output, input = np.zeros(sizes[me]), np.repeat(np.arange(float(n)), sizes)",
        ranks=2,
    ),
    "an array in use": Case(
        "pg.allreduce(x)",
        ("wait()",),
        "sent = pg.send(np.full(3, me + 1), me, tag=3)\npending.wait()\nsent.wait()\n"
        "pg.allreduce(x).wait()",
        "(x == total).all()",
        "x = np.zeros(3, int); pending = pg.recv(x, me, tag=3)",
    ),
    "result() of a call under way": Case(
        "work.result()",
        ("wait()",),
        "pg.send(np.full(3, me), me, tag=4).wait()\nwork.wait()\ny = work.result()",
        "(y[0] == me).all()",
        "x = np.zeros(3, int); work = pg.recv(x, me, tag=4)",
    ),
    "source_rank() of a call under way": Case(
        "work.source_rank()",
        ("wait()",),
        "pg.send(np.full(3, me), me, tag=5).wait()\nwork.wait()\ny = work.source_rank()",
        "y == me",
        "x = np.zeros(3, int); work = pg.recv(x, me, tag=5)",
    ),
    "a group that was closed": Case(
        "closed.barrier()",
        ("new_group()",),
        "with mc.new_group() as again: again.barrier().wait()",
        "again.is_closed",
        "closed = pg.split(0); closed.shutdown()",
    ),
    "checks for GPUs": Case(
        "mc.new_group(checks='first')",
        ("checks='full'",),
        "with mc.new_group(checks='full') as again: again.barrier().wait()",
        "again.is_closed",
    ),
    "an unknown backend": Case(
        "mc.new_group('nonesuch')",
        ("'auto'",),
        "with mc.new_group('auto') as again: again.barrier().wait()",
        "again.is_closed",
    ),
    "no store": Case(
        "pg.merge_remote_group(store, n)",
        ("FileStore",),
        "from mpicoll import FileStore\n"
        "with pg.merge_remote_group(FileStore(folder), n) as again: again.barrier().wait()",
        "again.size() == n",
        "store = folder",
    ),
}

TENSORS = {
    "transposed": reduce_by(
        "whole = torch.arange(12.0).reshape(3, 4); tensor = whole.t()",
        ("y = tensor.contiguous()", "tensor.detach().copy_(y)"),
        "whole.equal(torch.arange(12.0).reshape(3, 4) * n)",
    ),
    "transposed, with a gradient": reduce_by(
        "whole = torch.full((3, 4), me + 1.0, requires_grad=True); tensor = whole.t()",
        ("y = tensor.contiguous()", "tensor.detach().copy_(y)"),
        "(whole == total).all()",
    ),
    "strided": reduce_by(
        "whole = torch.full((4, 4), me + 1.0); tensor = whole[:, ::2]",
        ("y = tensor.contiguous()", "tensor.detach().copy_(y)"),
        "(whole[:, ::2] == total).all() and (whole[:, 1::2] == me + 1).all()",
    ),
    "expanded": reduce_by(
        "tensor = torch.full((1,), me + 1.0).expand(4)",
        ("y = tensor.contiguous()",),
        "y.tolist() == [total] * 4",
        words=("take the result from y",),
    ),
    "sparse": reduce_by(
        "tensor = (torch.eye(3) * (me + 1)).to_sparse()",
        ("y = tensor.to_dense()",),
        "y.equal(torch.eye(3) * total)",
        words=("take the result from y",),
    ),
    "quantized": reduce_by(
        "tensor = torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8)",
        ("y = tensor.dequantize()",),
        "y.tolist() == [n] * 3",
        words=("take the result from y",),
    ),
    "conjugated": reduce_by(
        "whole = torch.full((3,), 1 + 1j); tensor = whole.conj()",
        ("y = tensor.resolve_conj()", "tensor.detach().copy_(y)"),
        "tensor.tolist() == [n * (1 - 1j)] * 3 and whole.tolist() == [n * (1 + 1j)] * 3",
    ),
    "negated": reduce_by(
        "whole = torch.full((3,), 1 + 1j); tensor = torch._neg_view(whole.real.clone())",
        ("y = tensor.resolve_neg()", "tensor.detach().copy_(y)"),
        "tensor.tolist() == [-n] * 3",
    ),
    "meta": Case(
        "pg.broadcast(tensor, 0)",
        ('y = torch.empty_like(tensor, device="cpu")',),
        'y = torch.empty_like(tensor, device="cpu").fill_(me)\npg.broadcast(y, 0).wait()',
        "y.tolist() == [0] * 3",
        "tensor = torch.ones(3, device='meta')",
    ),
    "complex half": Case(
        "pg.broadcast(tensor, 0)",
        ("torch.view_as_real(tensor)",),
        "pg.broadcast(torch.view_as_real(tensor), 0).wait()",
        "torch.view_as_real(tensor).tolist() == [[1, 0]] * 3",
        "tensor = torch.full((3,), float(me + 1)).to(torch.complex32)",
    ),
    "bits": Case(
        "pg.broadcast(tensor, 0)",
        ("tensor.view(torch.uint8)",),
        "pg.broadcast(tensor.view(torch.uint8), 0).wait()",
        "tensor.view(torch.uint8).tolist() == [0] * 3",
        "tensor = torch.full((3,), me, dtype=torch.uint8).view(torch.bits8)",
    ),
    "strided input": Case(
        "pg.all_gather_single(output, input)",
        ("input.contiguous()",),
        "pg.all_gather_single(output, input.contiguous()).wait()",
        "output.tolist() == [r for r in range(n) for _ in range(2)]",
        "output, input = torch.zeros(2 * n), torch.full((2, 2), float(me))[:, 1]",
    ),
    "input of another dtype": Case(
        "pg.all_gather_single(output, input)",
        ("input.to(torch.float32)",),
        "pg.all_gather_single(output, input.to(torch.float32)).wait()",
        "output.tolist() == list(range(n))",
        "output, input = torch.zeros(n), torch.full((1,), me)",
    ),
    "outputs of two dtypes": Case(
        "pg.allgather(output_tensors, input_tensor)",
        ("y = output_tensors[1].to(torch.float32)", "output_tensors[1].detach().copy_(y)"),
        "y = output_tensors[1].to(torch.float32)\n"
        "pg.allgather([output_tensors[0], y, *output_tensors[2:]], input_tensor).wait()\n"
        "output_tensors[1].detach().copy_(y)",
        "[x.tolist() for x in output_tensors] == [[r] for r in range(n)]",
        "output_tensors = [torch.zeros(1, dtype=(torch.float32, torch.int64)[r == 1]) "
        "for r in range(n)]; input_tensor = torch.full((1,), float(me))",
        ranks=2,
    ),
    "input that overlaps": Case(
        "pg.all_gather_single(output, input)",
        ("input.clone()",),
        "pg.all_gather_single(output, input.clone()).wait()",
        "output.tolist() == [v for r in range(n) for v in (r, r)]",
        "x = torch.full((2 * n + 1,), float(me)); output, input = x[:-1], x[1:3]",
    ),
    "parameter that overlaps": Case(
        "pg.all_gather_single(output, input)",
        ("input.clone()",),
        "pg.all_gather_single(output, input.clone()).wait()",
        "output.tolist() == [v for r in range(n) for v in (r, r)]",
        "x = torch.full((2 * n + 1,), float(me)); output = x[:-1]; "
        "input = torch.nn.Parameter(x[1:3])",
    ),
    "outputs that overlap": Case(
        "pg.allreduce_coalesced(tensors)",
        ("y = tensors[1].clone()",),
        "y = tensors[1].clone()\npg.allreduce_coalesced([tensors[0], y]).wait()",
        "(tensors[0] == total).all() and (y == total).all()",
        "x = torch.full((5,), me + 1.0); tensors = [x[:3], x[2:]]",
    ),
    "BAND of floats": reduction(
        "BAND",
        "tensor = torch.full((3,), 1.0 if me else 1.5)",
        "pg.allreduce(tensor.view(torch.uint8), mc.ReduceOp.BAND).wait()",
        "tensor.tolist() == [1.0 if n > 1 else 1.5] * 3",
        "a view as integers, of which uint8 fits",
    ),
}


class Interface:
    """An array known by its `__array_interface__` alone."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__
        self.array = array


class Capsule:
    """An array known by DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def locked(array):
    array.flags.writeable = False
    return array


def try_out(pg, case, **names):
    n, me = pg.size(), pg.rank()
    if n < case.ranks:
        pytest.skip(f"takes {case.ranks} ranks")
    names |= {"pg": pg, "n": n, "me": me, "total": n * (n + 1) // 2, "np": np, "mc": mc}
    names |= {"Interface": Interface, "Capsule": Capsule, "locked": locked}
    names |= {"ml_dtypes": ml_dtypes, "BFLOAT16": BFLOAT16}
    exec(case.given, names)
    # The store is the leader's business; the others hear of it.
    refusals = InvalidCallError, UnsupportedError, mc.GroupClosedError, CollectiveMismatchError
    with pytest.raises(refusals) as caught:
        exec(case.call, names)
    for piece in (*case.code, *case.words):
        assert piece in str(caught.value)
    for piece in case.code:
        assert piece in case.follow, "the case doesn't follow the remedy to the letter"
    exec(case.follow, names)
    assert eval(case.have, names), str(caught.value)


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(pg, name):
    try_out(pg, ARRAYS[name])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(pg, name):
    try_out(pg, REDUCTIONS[name])


@pytest.mark.parametrize("name", CALLS)
def test_calls(pg, name, folder):
    try_out(pg, CALLS[name], folder=str(folder))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch is in two minds about some
@pytest.mark.parametrize("name", TENSORS)
def test_tensors(pg, name):
    pytest.importorskip("torch", reason="torch is not installed (extra: torch)")
    try_out(pg, TENSORS[name], torch=importlib.import_module("torch"))


@pytest.mark.mpi(min_size=2)
def test_a_root_of_the_world_is_translated(pg):
    """In a group of other ranks than the world's: `pg.ranks.index` gives the group's."""
    n, me = pg.size(), pg.rank()
    part = pg.split_group(list(range(1, n)) if me else [])
    if part is None:
        return
    root = n - 1  # of the world
    x = np.full(3, me)
    with pytest.raises(InvalidCallError, match=r"rank of this group.*pg\.ranks\.index\(i\)"):
        part.broadcast(x, root)
    part.broadcast(x, part.ranks.index(root)).wait()
    assert (x == root).all()
    part.shutdown()


@pytest.mark.mpi(min_size=2)
def test_inputs_that_are_each_of_another_size(pg):
    """Each rank's arguments are right by themselves; what is compared is not."""
    n, me = pg.size(), pg.rank()
    mine = np.full(me + 1, float(me))
    with pytest.raises(CollectiveMismatchError, match=r"gathered by allgather, into a list"):
        pg.all_gather_single(np.zeros(n * (me + 1)), mine).wait()
    outputs = [np.zeros(r + 1) for r in range(n)]
    pg.allgather(outputs, mine).wait()
    assert [x.tolist() for x in outputs] == [[r] * (r + 1) for r in range(n)]
    with pytest.raises(CollectiveMismatchError, match=r"taken by reduce_scatter, from a list"):
        pg.reduce_scatter_single(mine, np.zeros(n * (me + 1))).wait()
    pg.reduce_scatter(mine, outputs).wait()
    assert mine.tolist() == reduced("SUM", [np.full(me + 1, float(me))] * n).tolist()


@pytest.mark.mpi(min_size=2)
def test_a_message_that_is_longer_than_the_array(pg):
    """The text says what came: an array of that size and dtype receives the next such message."""
    n, me = pg.size(), pg.rank()
    for dtype, named in (("f4", r"float32\[5\]"), ("S3", r"S3\[5\]")):
        sent = np.full(5, me, dtype)
        sending = [pg.send(sent, (me + 1) % n) for _ in range(2)]
        with pytest.raises(CollectiveMismatchError, match=f"sent {named}"):
            pg.recv(np.zeros(3, "i2"), (me - 1) % n).wait()
        got = np.zeros(5, dtype)
        pg.recv(got, (me - 1) % n).wait()
        assert got.tolist() == np.full(5, (me - 1) % n, dtype).tolist()
        mc.wait_all(sending)


@pytest.mark.parametrize("axis", [0, 1])
def test_what_needs_no_remedy_any_more(pg, kind, axis):
    """An array stands for the list of its rows, wherever they lie in it."""
    n, me = pg.size(), pg.rank()
    shape, part = ((n, 3), (3,)) if axis else ((n,), ())

    def rows(value):
        whole = kind.full((n, 5) if axis else n, value)
        return whole, (whole[:, 1:4] if axis else whole)

    def mine():
        return kind.full(part, me + 1)

    every = np.arange(1, n + 1, dtype="f4").reshape(n, *[1] * axis) + np.zeros(shape, "f4")
    for root in {0, n - 1}:
        whole, output = rows(9)
        pg.gather(output, mine(), root).wait()
        if me == root:
            assert kind.same(output, every)
            assert not axis or (kind.numpy(whole)[:, ::4] == 9).all()
        x = mine()
        _, source = rows(root + 5)
        pg.scatter(x, source, root).wait()
        assert (kind.numpy(x) == root + 5).all()
    _, output = rows(9)
    work = pg.allgather(output, mine())
    work.wait()
    assert kind.same(output, every) and len(work.result()) == n
    x = mine()
    pg.reduce_scatter(x, rows(me + 1)[1]).wait()
    assert (kind.numpy(x) == n * (n + 1) // 2).all()
    _, output = rows(9)
    pg.alltoall(output, rows(me + 1)[1]).wait()
    assert kind.same(output, every)
