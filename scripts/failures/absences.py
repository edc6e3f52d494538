"""Ranks that do not come, and ranks that end."""

from __future__ import annotations

from .contenders import BARE, GLOO, OURS
from .scenario import DEADLINES, ENDINGS, NOTICED, WATCHDOG, Scenario

_stays_away = "if RANK == 2:\n    time.sleep(60)\ncause()\n"
HURRIED = "soon = dist.new_group(timeout=timedelta(seconds=1))\ndist.barrier()\n"
ABSENT = [
    Scenario(
        DEADLINES,
        "never, in an allreduce",
        _stays_away + "pg.allreduce(x, timeout=1).wait()",
        _stays_away + BARE.allreduce,
        HURRIED + _stays_away + "dist.all_reduce(x, group=soon)",
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
        HURRIED + "if RANK == 2:\n    os.kill(os.getpid(), signal.SIGSTOP)\ncause()\n"
        "dist.all_reduce(x, group=soon)",
        WATCHDOG,
        ranks=3,
        culprits=(2,),
    ),
    Scenario(
        DEADLINES,
        "2 s late, where 1 s was asked",
        "time.sleep(2 * (RANK == 2))\ncause()\npg.allreduce(x, timeout=1).wait()\n"
        "right((x == 6).all())",
        "time.sleep(2 * (RANK == 2))\n" + BARE.allreduce + "\nright((x == 6).all())",
        HURRIED + "time.sleep(2 * (RANK == 2))\ncause()\ndist.all_reduce(x, group=soon)\n"
        "right((x == 6).all())",
        WATCHDOG,
        ranks=3,
    ),
    Scenario(
        DEADLINES,
        "never, when a group is made",
        _stays_away + "pg.split_group([0, 1], timeout=1)",
        _stays_away + "comm.Split(0)",
        _stays_away + "dist.new_group([0, 1], timeout=timedelta(seconds=1))\ndist.barrier()",
        "init and split are collective: they wait for the store's or the watchdog's timeout",
        ranks=3,
        culprits=(2,),
    ),
    Scenario(
        DEADLINES,
        "never, as sender of what is received",
        "if RANK == 1:\n    time.sleep(60)\ncause()\npg.recv(x, 1, timeout=1).wait()",
        "if RANK == 1:\n    time.sleep(60)\ncomm.Recv(x, 1)",
        HURRIED + "if RANK == 1:\n    time.sleep(60)\ncause()\ndist.recv(x, 1, group=soon)",
        WATCHDOG,
        culprits=(1,),
    ),
    Scenario(
        DEADLINES,
        "never, as receiver of 4 MB",
        "if RANK == 1:\n    time.sleep(60)\ncause()\n"
        "pg.send(np.ones(1 << 20, 'f4'), 1, timeout=1).wait()",
        "if RANK == 1:\n    time.sleep(60)\ncomm.Send(np.ones(1 << 20, 'f4'), 1)",
        HURRIED + "if RANK == 1:\n    time.sleep(60)\ncause()\n"
        "dist.send(torch.ones(1 << 20), 1, group=soon)",
        WATCHDOG,
        culprits=(1,),
    ),
]


def _ending(name: str, fate: str, nccl: str, *, kills: bool = False) -> Scenario:
    """Rank 2 meets its fate when the others have long been waiting in an allreduce."""
    lines = "\n".join(f"    {line}" for line in fate.splitlines())
    when = f"if RANK == 2:\n    time.sleep(0.5)\n    cause()\n{lines}\n"
    ours, mpi, gloo = (when + contender.allreduce for contender in (OURS, BARE, GLOO))
    return Scenario(ENDINGS, name, ours, mpi, gloo, nccl, ranks=3, culprits=(2,), kills=kills)


_thread = """
def load():
    raise RuntimeError("the loader failed")
loaded = threading.Event()
threading.Thread(target=load).start()
loaded.wait()
"""
_interrupted = """
if RANK == 0:
    time.sleep(60)
def interrupt():
    time.sleep(0.5)
    cause()
    os.kill(os.getpid(), 2)
threading.Thread(target=interrupt).start()
"""
ENDING = [
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
        _interrupted + OURS.allreduce,
        _interrupted + BARE.allreduce,
        _interrupted + GLOO.allreduce,
        "the CPU does not wait in the call",
        culprits=(0,),
        kills=True,
    ),
]
