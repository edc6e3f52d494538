"""Ranks that call different things, and data with traps."""

from __future__ import annotations

from .scenario import DATA, MISMATCHES, NOT_COMPARED, UNDEFINED, Scenario

MISMATCHING = [
    Scenario(
        MISMATCHES,
        "allreduce with another op",
        "pg.allreduce(x, op=[Op.SUM, Op.MAX][RANK]).wait()",
        "comm.Allreduce(MPI.IN_PLACE, x, op=[MPI.SUM, MPI.MAX][RANK])",
        "dist.all_reduce(x, op=[Op.SUM, Op.MAX][RANK])",
        NOT_COMPARED,
    ),
    Scenario(
        MISMATCHES,
        "allreduce of another dtype, same size",
        "pg.allreduce(np.ones(4, ['f4', 'i4'][RANK])).wait()",
        "comm.Allreduce(MPI.IN_PLACE, np.ones(4, ['f4', 'i4'][RANK]))",
        "dist.all_reduce(torch.ones(4, dtype=[torch.float32, torch.int32][RANK]))",
        UNDEFINED,
    ),
    Scenario(
        MISMATCHES,
        "allreduce of 4 and of 3 elements",
        "pg.allreduce(np.ones(4 - RANK)).wait()",
        "comm.Allreduce(MPI.IN_PLACE, np.ones(4 - RANK))",
        "dist.all_reduce(torch.ones(4 - RANK))",
        UNDEFINED,
    ),
    Scenario(
        MISMATCHES,
        "broadcast with another root",
        "pg.broadcast(x, root=RANK).wait()",
        "comm.Bcast(x, root=RANK)",
        "dist.broadcast(x, src=RANK)",
        NOT_COMPARED,
    ),
    Scenario(
        MISMATCHES,
        "reduce with another root",
        "pg.reduce(x, root=RANK).wait()",
        "comm.Reduce(x, np.zeros_like(x), root=RANK)",
        "dist.reduce(x, dst=RANK)",
        NOT_COMPARED,
    ),
    Scenario(
        MISMATCHES,
        "allreduce against barrier",
        "(pg.barrier() if RANK else pg.allreduce(x)).wait()",
        "comm.Barrier() if RANK else comm.Allreduce(MPI.IN_PLACE, x)",
        "dist.barrier() if RANK else dist.all_reduce(x)",
        UNDEFINED,
    ),
    Scenario(
        MISMATCHES,
        "broadcast against reduce",
        "(pg.reduce(x, 0) if RANK else pg.broadcast(x, 0)).wait()",
        "comm.Reduce(x, None, root=0) if RANK else comm.Bcast(x, root=0)",
        "dist.reduce(x, 0) if RANK else dist.broadcast(x, 0)",
        UNDEFINED,
    ),
    Scenario(
        MISMATCHES,
        "two calls in another order",
        """
y = x.copy()
for kind in ["ab", "ba"][RANK]:
    (pg.allreduce(x) if kind == "a" else pg.broadcast(y, 0)).wait()
""",
        """
y = x.copy()
for kind in ["ab", "ba"][RANK]:
    comm.Allreduce(MPI.IN_PLACE, x) if kind == "a" else comm.Bcast(y, root=0)
""",
        """
y = x.clone()
for kind in ["ab", "ba"][RANK]:
    dist.all_reduce(x) if kind == "a" else dist.broadcast(y, 0)
""",
        UNDEFINED,
    ),
    Scenario(
        MISMATCHES,
        "float32[4] sent, int32[3] received",
        "(pg.recv(np.zeros(3, 'i4'), 0) if RANK else pg.send(x, 1)).wait()",
        "comm.Recv(np.zeros(3, 'i4'), 0) if RANK else comm.Send(x, 1)",
        "dist.recv(torch.zeros(3, dtype=torch.int32), 0) if RANK else dist.send(x, 1)",
        UNDEFINED,
        culprits=(0,),
    ),
    Scenario(
        MISMATCHES,
        "float32[4] sent, int32[4] received",
        "(pg.recv(np.zeros(4, 'i4'), 0) if RANK else pg.send(x, 1)).wait()",
        "comm.Recv(np.zeros(4, 'i4'), 0) if RANK else comm.Send(x, 1)",
        "dist.recv(torch.zeros(4, dtype=torch.int32), 0) if RANK else dist.send(x, 1)",
        UNDEFINED,
        culprits=(0,),
    ),
    Scenario(
        MISMATCHES,
        "groups [0, 1] and [1, 2], made in one call",
        """
part = pg.split_group([[0, 1], [1, 2], [1, 2]][RANK])
if part is not None:
    part.allreduce(x).wait()
""",
        """
part = comm.Create(comm.group.Incl([[0, 1], [1, 2], [1, 2]][RANK]))
if part != MPI.COMM_NULL:
    part.Allreduce(MPI.IN_PLACE, x)
""",
        """
part = dist.new_group([[0, 1], [1, 2], [1, 2]][RANK])
dist.all_reduce(x, group=part)
""",
        "not compared",
        ranks=3,
    ),
]

TRICKY = [
    Scenario(
        DATA,
        "every second column of a matrix",
        """
m = np.ones((4, 4), np.float32)
pg.allreduce(m[:, ::2]).wait()
right((m[:, ::2] == 2).all() and (m[:, 1::2] == 1).all())
""",
        """
m = np.ones((4, 4), np.float32)
comm.Allreduce(MPI.IN_PLACE, m[:, ::2])
right((m[:, ::2] == 2).all() and (m[:, 1::2] == 1).all())
""",
        """
m = torch.ones(4, 4)
dist.all_reduce(m[:, ::2])
right((m[:, ::2] == 2).all() and (m[:, 1::2] == 1).all())
""",
        "PyTorch refuses tensors that are not contiguous",
    ),
    Scenario(
        DATA,
        "the same on one rank alone",
        """
m = np.ones((4, 4), np.float32)
pg.allreduce(m[:, ::2] if RANK else m[:, :2].copy()).wait()
right(RANK == 0 or (m[:, ::2] == 2).all() and (m[:, 1::2] == 1).all())
""",
        """
m = np.ones((4, 4), np.float32)
comm.Allreduce(MPI.IN_PLACE, m[:, ::2] if RANK else m[:, :2].copy())
right(RANK == 0 or (m[:, ::2] == 2).all() and (m[:, 1::2] == 1).all())
""",
        """
m = torch.ones(4, 4)
dist.all_reduce(m[:, ::2] if RANK else m[:, :2].clone())
right(RANK == 0 or (m[:, ::2] == 2).all() and (m[:, 1::2] == 1).all())
""",
        "PyTorch refuses it there; the others: the watchdog",
    ),
    Scenario(
        DATA,
        "float16 SUM",
        "h = x.astype('f2')\npg.allreduce(h).wait()\nright((h == 3).all(), h)",
        "h = x.astype('f2')\ncomm.Allreduce(MPI.IN_PLACE, h)\nright((h == 3).all(), h)",
        "h = x.half()\ndist.all_reduce(h)\nright((h == 3).all(), h)",
        "supported",
    ),
    Scenario(
        DATA,
        "bfloat16 SUM, a torch tensor",
        """
import torch
cause()
h = torch.full((4,), RANK + 1.0, dtype=torch.bfloat16)
pg.allreduce(h).wait()
right((h == 3).all(), h)
""",
        """
import torch
cause()
h = torch.full((4,), RANK + 1.0, dtype=torch.bfloat16)
comm.Allreduce(MPI.IN_PLACE, h)
right((h == 3).all(), h)
""",
        "h = x.bfloat16()\ndist.all_reduce(h)\nright((h == 3).all(), h)",
        "supported",
    ),
    Scenario(
        DATA,
        "NaN under MAX: kept, as NumPy keeps it?",
        """
n = np.array([[1, np.nan, np.nan], [np.nan, 1, np.nan]][RANK], np.float32)
pg.allreduce(n, op=Op.MAX).wait()
right(np.isnan(n).all(), n)
""",
        """
n = np.array([[1, np.nan, np.nan], [np.nan, 1, np.nan]][RANK], np.float32)
comm.Allreduce(MPI.IN_PLACE, n, op=MPI.MAX)
right(np.isnan(n).all(), n)
""",
        """
n = torch.tensor([[1, np.nan, np.nan], [np.nan, 1, np.nan]][RANK])
dist.all_reduce(n, op=Op.MAX)
right(n.isnan().all(), n)
""",
        "not documented",
    ),
    Scenario(
        DATA,
        "NaN under MAX: the same on all ranks?",
        """
n = np.where(np.arange(100_000) % 3 == RANK, np.nan, 1).astype(np.float32)
pg.allreduce(n, op=Op.MAX).wait()
right(True, [np.isnan(n[i::3]).sum() for i in range(3)])
""",
        """
n = np.where(np.arange(100_000) % 3 == RANK, np.nan, 1).astype(np.float32)
comm.Allreduce(MPI.IN_PLACE, n, op=MPI.MAX)
right(True, [np.isnan(n[i::3]).sum() for i in range(3)])
""",
        """
n = torch.where(torch.arange(100_000) % 3 == RANK, np.nan, 1.0)
dist.all_reduce(n, op=Op.MAX)
right(True, [n[i::3].isnan().sum() for i in range(3)])
""",
        "not documented",
        ranks=3,
        alike=True,
    ),
    Scenario(
        DATA,
        "int8 SUM of 100 + 100: as NumPy wraps?",
        """
b = np.full(4, 100, np.int8)
pg.allreduce(b).wait()
right((b == -56).all(), b)
""",
        """
b = np.full(4, 100, np.int8)
comm.Allreduce(MPI.IN_PLACE, b)
right((b == -56).all(), b)
""",
        """
b = torch.full((4,), 100, dtype=torch.int8)
dist.all_reduce(b)
right((b == -56).all(), b)
""",
        "not documented",
    ),
]
