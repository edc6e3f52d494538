"""What goes wrong: one program per contender and scenario.

`nccl` is the answer of NVIDIA's and PyTorch's documentation, which was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .contenders import BARE, GLOO, OURS

UNDEFINED = "undefined: hang, crash or corrupted data"
NOT_COMPARED = "not compared; undefined"
WATCHDOG = "watchdog ends the process after the timeout (10 min by default)"
NOTICED = "an asynchronous error where the network notices, else the watchdog"

MISMATCHES = "Ranks that call different things"
DATA = "Data with traps"
DEADLINES = "A rank that does not come"
ENDINGS = "A rank that ends"
BUFFERS = "Buffers in flight"
THREADS = "Threads and forks"
AFTERWARDS = "After a failure"


@dataclass(frozen=True)
class Scenario:
    group: str
    name: str
    ours: str
    mpi: str
    gloo: str
    nccl: str
    ranks: int = 2
    culprits: tuple[int, ...] = ()  # whose fate is the cause: the others are asked what they saw
    kills: bool = False  # a signal is part of the scenario, and no crash
    alike: bool = False  # right is what all ranks agree in
    launcher: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # options, by MPI library

    def body(self, contender: str) -> str:
        return {"ours": self.ours, "mpi": self.mpi, "gloo": self.gloo}[contender]


def both(when: str, ours: str, mpi: str, gloo: str) -> dict[str, str]:
    """The same lines for all three before each's own call."""
    return {"ours": when + ours, "mpi": when + mpi, "gloo": when + gloo}


_mismatches = [
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

_data = [
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
h = torch.full((4,), RANK + 1.0, dtype=torch.bfloat16)
pg.allreduce(h).wait()
right((h == 3).all(), h)
""",
        """
import torch
h = torch.full((4,), RANK + 1.0, dtype=torch.bfloat16)
comm.Allreduce(MPI.IN_PLACE, h)
right((h == 3).all(), h)
""",
        "h = x.bfloat16()\ndist.all_reduce(h)\nright((h == 3).all(), h)",
        "supported",
    ),
    Scenario(
        DATA,
        "NaN under MAX: the same on all ranks?",
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

_absent = "if RANK == 2:\n    time.sleep(60)\ncause()\n"
_hurried = "soon = dist.new_group(timeout=timedelta(seconds=1))\ndist.barrier()\n"
_deadlines = [
    Scenario(
        DEADLINES,
        "never, in an allreduce",
        _absent + "pg.allreduce(x, timeout=1).wait()",
        _absent + BARE.allreduce,
        _hurried + _absent + "dist.all_reduce(x, group=soon)",
        WATCHDOG,
        ranks=3,
        culprits=(2,),
    ),
    Scenario(
        DEADLINES,
        "stopped (SIGSTOP)",
        "if RANK == 2:\n    os.kill(os.getpid(), signal.SIGSTOP)\ncause()\n"
        "pg.allreduce(x, timeout=1).wait()",
        "if RANK == 2:\n    os.kill(os.getpid(), signal.SIGSTOP)\n" + BARE.allreduce,
        _hurried + "if RANK == 2:\n    os.kill(os.getpid(), signal.SIGSTOP)\ncause()\n"
        "dist.all_reduce(x, group=soon)",
        WATCHDOG,
        ranks=3,
        culprits=(2,),
    ),
    Scenario(
        DEADLINES,
        "2 s late, where 1 s was asked",
        "time.sleep(2 * (RANK == 2))\ncause()\npg.allreduce(x, timeout=1).wait()\nright(True)",
        "time.sleep(2 * (RANK == 2))\n" + BARE.allreduce + "\nright(True)",
        _hurried + "time.sleep(2 * (RANK == 2))\ncause()\ndist.all_reduce(x, group=soon)\n"
        "right(True)",
        WATCHDOG,
        ranks=3,
    ),
    Scenario(
        DEADLINES,
        "never, when a group is made",
        _absent + "pg.split_group([0, 1], timeout=1)",
        _absent + "comm.Split(0)",
        _absent + "dist.new_group([0, 1], timeout=timedelta(seconds=1))\ndist.barrier()",
        "init and split are collective: they wait for the store's or the watchdog's timeout",
        ranks=3,
        culprits=(2,),
    ),
    Scenario(
        DEADLINES,
        "never, as sender of what is received",
        "if RANK == 1:\n    time.sleep(60)\ncause()\npg.recv(x, 1, timeout=1).wait()",
        "if RANK == 1:\n    time.sleep(60)\ncomm.Recv(x, 1)",
        _hurried + "if RANK == 1:\n    time.sleep(60)\ncause()\ndist.recv(x, 1, group=soon)",
        WATCHDOG,
        culprits=(1,),
    ),
    Scenario(
        DEADLINES,
        "never, as receiver of 4 MB",
        "if RANK == 1:\n    time.sleep(60)\ncause()\n"
        "pg.send(np.ones(1 << 20, 'f4'), 1, timeout=1).wait()",
        "if RANK == 1:\n    time.sleep(60)\ncomm.Send(np.ones(1 << 20, 'f4'), 1)",
        _hurried + "if RANK == 1:\n    time.sleep(60)\ncause()\n"
        "dist.send(torch.ones(1 << 20), 1, group=soon)",
        WATCHDOG,
        culprits=(1,),
    ),
]


def _ending(name: str, fate: str, nccl: str, *, kills: bool = False) -> Scenario:
    """Rank 2 meets its fate when the others have long been waiting in an allreduce."""
    lines = "\n".join(f"    {line}" for line in fate.splitlines())
    when = f"if RANK == 2:\n    time.sleep(0.5)\n    cause()\n{lines}\n"
    calls = (when + contender.allreduce for contender in (OURS, BARE, GLOO))
    return Scenario(ENDINGS, name, *calls, nccl=nccl, ranks=3, culprits=(2,), kills=kills)


_thread = """
def load():
    raise RuntimeError("the loader failed")
loaded = threading.Event()
threading.Thread(target=load).start()
loaded.wait()
"""
_endings = [
    Scenario(
        ENDINGS,
        "none: all is well",
        "pg.allreduce(x).wait()\nright((x == 6).all())",
        "comm.Allreduce(MPI.IN_PLACE, x)\nright((x == 6).all())",
        "dist.all_reduce(x)\nright((x == 6).all())",
        "right answer",
        ranks=3,
    ),
    _ending("by an uncaught exception", "raise ValueError('bad file')", NOTICED),
    _ending("by `sys.exit(4)`", "sys.exit(4)", NOTICED),
    _ending("by `raise SystemExit(4)`", "raise SystemExit(4)", NOTICED),
    _ending("by `sys.exit(0)`: its program is over", "sys.exit(0)", NOTICED),
    _ending("it waits for a thread that raised", _thread.strip(), WATCHDOG),
    _ending("by Ctrl-C (SIGINT) while it computes", "os.kill(os.getpid(), 2)", NOTICED, kills=True),
    _ending("by SIGKILL", "os.kill(os.getpid(), 9)", NOTICED, kills=True),
    _ending("by SIGSEGV", "os.kill(os.getpid(), 11)", NOTICED, kills=True),
    _ending("by `os._exit(0)`", "os._exit(0)", NOTICED),
    _ending("by `os._exit(3)`", "os._exit(3)", NOTICED),
    Scenario(
        ENDINGS,
        "SIGINT to a rank that waits in a call",
        **both(
            "if RANK == 0:\n    time.sleep(60)\n"
            "def interrupt():\n    time.sleep(0.5)\n    cause()\n    os.kill(os.getpid(), 2)\n"
            "threading.Thread(target=interrupt).start()\n",
            OURS.allreduce,
            BARE.allreduce,
            GLOO.allreduce,
        ),
        nccl="the CPU does not wait in the call",
        culprits=(0,),
        kills=True,
    ),
]

_late = "if RANK == 1:\n    time.sleep(0.5)\n"
_buffers = [
    Scenario(
        BUFFERS,
        "the array of an allreduce is dropped",
        _late + "x = np.ones(1 << 20, 'f4')\nwork = pg.allreduce(x)\n"
        "del x\ngc.collect()\nothers = junk()\nwork.wait()\n"
        "right(all((other == 7).all() for other in others))",
        _late + "x = np.ones(1 << 20, 'f4')\nwork = comm.Iallreduce(MPI.IN_PLACE, x)\n"
        "del x\ngc.collect()\nothers = junk()\nwork.Wait()\n"
        "right(all((other == 7).all() for other in others))",
        _late + "x = torch.ones(1 << 20)\nwork = dist.all_reduce(x, async_op=True)\n"
        "del x\ngc.collect()\nothers = junk()\nwork.wait()\n"
        "right(all((other == 7).all() for other in others))",
        "PyTorch keeps it until the work is done",
    ),
    Scenario(
        BUFFERS,
        "the input is dropped, the output kept",
        _late + "x = np.full(1 << 20, RANK + 1, 'f4')\nout = np.zeros(1 << 21, 'f4')\n"
        "work = pg.all_gather_single(out, x)\ndel x\ngc.collect()\nothers = junk()\nwork.wait()\n"
        "right((out[: 1 << 20] == 1).all() and (out[1 << 20 :] == 2).all())",
        _late + "x = np.full(1 << 20, RANK + 1, 'f4')\nout = np.zeros(1 << 20, 'f4')\n"
        "work = comm.Iallreduce(x, out)\ndel x\ngc.collect()\nothers = junk()\nwork.Wait()\n"
        "right((out == 3).all())",
        _late + "x = torch.full((1 << 20,), RANK + 1.0)\nout = list(torch.zeros(2, 1 << 20))\n"
        "work = dist.all_gather(out, x, async_op=True)\n"
        "del x\ngc.collect()\nothers = junk()\nwork.wait()\n"
        "right((out[0] == 1).all() and (out[1] == 2).all())",
        "PyTorch keeps it until the work is done",
    ),
    Scenario(
        BUFFERS,
        "one array in two calls at once",
        _late + "x = np.ones(1 << 20, 'f4')\n"
        "works = [pg.allreduce(x), pg.allreduce(x)]\nmc.wait_all(works)\nright((x == 4).all())",
        _late + "x = np.ones(1 << 20, 'f4')\n"
        "works = [comm.Iallreduce(MPI.IN_PLACE, x) for _ in range(2)]\nMPI.Request.Waitall(works)\n"
        "right((x == 4).all())",
        _late + "x = torch.ones(1 << 20)\n"
        "works = [dist.all_reduce(x, async_op=True) for _ in range(2)]\n"
        "[work.wait() for work in works]\nright((x == 4).all())",
        "right answer: calls of one stream follow one another",
    ),
]

_two_threads = """
def work(group, found):
    for _ in range(100):
        y = np.full(1000, RANK + 1, np.float32)
        {call}
        found.append(bool((np.asarray(y) == 3).all()))
found = [[], []]
threads = [threading.Thread(target=work, args=pair) for pair in zip(groups, found)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
right(all(map(all, found)) and list(map(len, found)) == [100, 100])
"""
_fork_uses = """
child = ""
if RANK == 0:
    child = forked(again)
{call}
right(child not in ("", "hangs") and (x == 3).all(), "the child's call: " + (child or "accepted"))
"""
_fork_exits = """
if RANK == 0:
    pid = os.fork()
    if pid == 0:
        RANK = 99  # what it reports is not rank 0's
        sys.exit(0)
    cause()
    os.waitpid(pid, 0)
    time.sleep(0.5)
{call}
right((x == 3).all())
"""
_threads = [
    Scenario(
        THREADS,
        "two threads, a group each",
        "groups = [pg.split(0), pg.split(0)]"
        + _two_threads.format(call="group.allreduce(y).wait()"),
        "groups = [comm.Dup(), comm.Dup()]"
        + _two_threads.format(call="group.Allreduce(MPI.IN_PLACE, y)"),
        "groups = [dist.new_group(), dist.new_group()]"
        + _two_threads.format(call="y = torch.from_numpy(y); dist.all_reduce(y, group=group)"),
        "works where the order per device is the same on all ranks, else may deadlock",
    ),
    Scenario(
        THREADS,
        "a forked child uses the group",
        "again = lambda: pg.allreduce(x.copy()).wait()" + _fork_uses.format(call=OURS.allreduce),
        "again = lambda: comm.Allreduce(MPI.IN_PLACE, x.copy())"
        + _fork_uses.format(call=BARE.allreduce),
        "again = lambda: dist.all_reduce(x.clone())" + _fork_uses.format(call=GLOO.allreduce),
        "CUDA refuses to work in a forked child",
    ),
    Scenario(
        THREADS,
        "a forked child ends by `sys.exit(0)`",
        _fork_exits.format(call=OURS.allreduce),
        _fork_exits.format(call=BARE.allreduce),
        _fork_exits.format(call=GLOO.allreduce),
        "not documented",
    ),
]

_lives = {"mpich": ("-disable-auto-cleanup",), "openmpi": ("--with-ft", "ulfm")}
_afterwards = [
    Scenario(
        AFTERWARDS,
        "a refused call: does the group go on?",
        """
try:
    pg.allreduce(np.ones(4 - RANK)).wait()
except Exception:
    pass
pg.allreduce(x).wait()
right((x == 3).all())
""",
        """
try:
    comm.Allreduce(MPI.IN_PLACE, np.ones(4 - RANK))
except Exception:
    pass
comm.Allreduce(MPI.IN_PLACE, x)
right((x == 3).all())
""",
        """
try:
    dist.all_reduce(torch.ones(4 - RANK))
except Exception:
    pass
dist.all_reduce(x)
right((x == 3).all())
""",
        "undefined",
    ),
    Scenario(
        AFTERWARDS,
        "a rank that is stuck: do the others go on?",
        """
if RANK == 2:
    time.sleep(60)
try:
    pg.allreduce(x, timeout=1).wait()
except mc.MpicollError:
    cause()
    rest = pg.shrink_group(ranks_to_exclude=[2], timeout=5)
    y = np.full(4, RANK + 1, np.float32)
    rest.allreduce(y).wait()
    right((y == 3).all())
""",
        """
if RANK == 2:
    time.sleep(60)
work, deadline = comm.Iallreduce(MPI.IN_PLACE, x), time.monotonic() + 1
while not work.Test() and time.monotonic() < deadline:
    time.sleep(0.001)
cause()
rest = comm.Create_group(comm.group.Excl([2]))
y = np.full(4, RANK + 1, np.float32)
rest.Allreduce(MPI.IN_PLACE, y)
right((y == 3).all())
""",
        _hurried
        + """
if RANK == 2:
    time.sleep(60)
try:
    dist.all_reduce(x, group=soon)
except RuntimeError:
    cause()
    rest = dist.new_group([0, 1], use_local_synchronization=True)
    y = torch.full((4,), RANK + 1.0)
    dist.all_reduce(y, group=rest)
    right((y == 3).all())
""",
        "`ncclCommShrink` with NCCL_SHRINK_ABORT (from 2.27), if the program knows whom to exclude",
        ranks=3,
        culprits=(2,),
    ),
    Scenario(
        AFTERWARDS,
        "a rank killed, the launcher told to keep the rest",
        """
if RANK == 2:
    time.sleep(0.5)
    cause()
    os.kill(os.getpid(), 9)
try:
    pg.allreduce(x, timeout=5).wait()
except mc.MpicollError:
    rest = pg.shrink_group(timeout=5)
    y = np.full(4, RANK + 1, np.float32)
    rest.allreduce(y).wait()
    right((y == 3).all())
""",
        """
if RANK == 2:
    time.sleep(0.5)
    cause()
    os.kill(os.getpid(), 9)
try:
    comm.Allreduce(MPI.IN_PLACE, x)
except MPI.Exception:
    comm.Revoke()
    rest = comm.Shrink()
    y = np.full(4, RANK + 1, np.float32)
    rest.Allreduce(MPI.IN_PLACE, y)
    right((y == 3).all())
""",
        """
if RANK == 2:
    time.sleep(0.5)
    cause()
    os.kill(os.getpid(), 9)
try:
    dist.all_reduce(x)
except RuntimeError:
    rest = dist.new_group([0, 1], use_local_synchronization=True)
    y = torch.full((4,), RANK + 1.0)
    dist.all_reduce(y, group=rest)
    right((y == 3).all())
""",
        "`ncclCommShrink` with NCCL_SHRINK_ABORT (from 2.27), if the program knows who died",
        ranks=3,
        culprits=(2,),
        kills=True,
        launcher=_lives,
    ),
]

SCENARIOS = (
    *_mismatches,
    *_data,
    *_deadlines,
    *_endings,
    *_buffers,
    *_threads,
    *_afterwards,
)
