"""Buffers in flight, threads and forks, and what is left after a failure."""

from __future__ import annotations

from .absences import HURRIED
from .contenders import BARE, GLOO, OURS
from .scenario import AFTERWARDS, BUFFERS, THREADS, Scenario

_late = "if RANK == 1:\n    time.sleep(0.5)\ncause()\n"
IN_FLIGHT = [
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
child = "it has none"
if RANK == 0:
    child = forked(again)
{call}
seen = "the child's call " + ("raises `%s`" % child if child else "is accepted")
if child in ("hangs", "it has none"):
    seen = "the child's call hangs" if RANK == 0 else ""
right(child not in ("", "hangs") and (x == 3).all(), seen)
"""
_fork_exits = """
hangs = RANK == 0 and forked(lambda: sys.exit(0)) == "hangs"
{call}
right(not hangs and (x == 3).all(), "the child's exit hangs" if hangs else "")
"""
THREADED = [
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
SURVIVING = [
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
        HURRIED
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
    os._exit(0)  # alike for the peers, and no launcher ends the job for it
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
