"""Who is compared: how each is set up, asked for an allreduce, and left.

A scenario's program is the body of `with trial():` and finds in its namespace the contender's own
names, `x` (four float32 of value rank + 1) and what REPORTS defines.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from tests.harness import REPORTING

# Each rank tells in its file when it began, when the cause was there, and how it ended.
REPORTS = (
    REPORTING
    + '''
import contextlib, ctypes, signal

SIZE = int(os.environ.get("PMI_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or 1)


@contextlib.contextmanager
def trial():
    """The scenario's own calls: what they raise is reported, and raised on."""
    report(began=time.time())
    try:
        yield
    except BaseException as error:
        text = str(error).strip()
        kind = type(error)
        name = f"MPI.{kind.__name__}" if kind.__module__ == "mpi4py.MPI" else kind.__name__
        report(at=time.time(), error=name, text=text[:600])
        raise
    report(returned=time.time())


def cause():
    """From now on things go wrong: delays count from here."""
    report(cause=time.time())


def right(yes, seen=""):
    """Say whether the answer is right, and which it was."""
    report(right=bool(yes), seen=str(seen))


def forked(call):
    """Fork a child that makes a call, and return the name of what that raised, "" or "hangs"."""
    global RANK
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        RANK = 99  # what the child reports is not this rank's
        name = ""
        try:
            call()
        except Exception as error:
            name = type(error).__name__
        os.write(writable, name.encode())
        os._exit(0)
    os.close(writable)
    deadline = time.monotonic() + 3
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        time.sleep(0.01)
    return os.read(readable, 100).decode()


def junk():
    """Fill memory that was freed, so that a late write into it would show."""
    return [np.full(1 << 20, 7, np.float32) for _ in range(8)]
'''
)


@dataclass(frozen=True)
class Contender:
    key: str  # "ours", "mpi" or "gloo"
    setup: str
    allreduce: str  # of x, with the contender's own deadline
    farewell: str  # how a program that is well ends
    limit: float = 12.0  # seconds in which a job must have ended by itself

    def preamble(self) -> str:
        return REPORTS + self.setup

    def script(self, body: str) -> str:
        return f"with trial():\n{textwrap.indent(textwrap.dedent(body), '    ')}\n{self.farewell}\n"


OURS = Contender(
    "ours",
    """
import mpicoll as mc
from mpicoll.arrays.ops import ReduceOp
from mpicoll.arrays.ops import ReduceOp as Op

pg = mc.new_group()
x = np.full(4, RANK + 1, np.float32)
pg.barrier().wait()
""",
    "pg.allreduce(x).wait()",
    "pg.shutdown()",
)
BARE = Contender(
    "mpi",
    """
from mpi4py import MPI

comm = MPI.COMM_WORLD
x = np.full(4, RANK + 1, np.float32)
comm.Barrier()
""",
    "comm.Allreduce(MPI.IN_PLACE, x)",
    "",
)
GLOO = Contender(
    "gloo",
    """
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp as Op

store = dist.FileStore(os.path.join(os.environ["MPICOLL_TEST_RESULT"], "store"), SIZE)
dist.init_process_group("gloo", store=store, rank=RANK, world_size=SIZE)
x = torch.full((4,), RANK + 1.0)
dist.barrier()
""",
    "dist.all_reduce(x)",
    "dist.destroy_process_group()",
    limit=16.0,  # its import alone takes seconds, and is not the failure
)
CONTENDERS = (OURS, BARE, GLOO)
